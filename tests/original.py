"""Checkpoints in the layout of the released MERV, and its forward pass, in plain torch.

The state dicts of these modules have the keys of the release: `nn.MultiheadAttention` in the mixer, nested
Linears in the projectors, and a causal LM of transformers with the enlarged vocabulary. Sizes are arbitrary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d


class Mixer(nn.Module):
    """A learned query attends to the mean token of each encoder; the attention weights mix the tokens."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.Q = nn.Parameter(torch.randn(1, hidden))
        self.attention = nn.MultiheadAttention(hidden, 1, batch_first=True, kdim=width, vdim=width)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, streams: Tensor) -> Tensor:
        """[B, E, N, L] → [B, N, L]."""
        means = streams.mean(dim=2)
        _, weights = self.attention(self.Q.expand(len(streams), 1, -1), means, means)  # [B, 1, E]
        return torch.einsum("b e, b e n l -> b n l", weights[:, 0], streams)


class OriginalMERV(nn.Module):
    """Projectors, mixer and language model, without encoders.

    Args:
        llm: A causal language model of transformers.
        widths: Channels of each encoder.
        side: A frame becomes side × side tokens.
        hidden: Hidden dimensions of the mixer.
        mlp: Whether a projector is an MLP of two layers instead of one Linear.
    """

    def __init__(
        self, llm: Any, widths: list[int], *, side: int = 2, hidden: int = 48, mlp: bool = False
    ) -> None:
        super().__init__()
        self.side, width = side, llm.config.hidden_size
        heads = [
            nn.Sequential(nn.Linear(embed_dim, width), nn.GELU(), nn.Linear(width, width))
            if mlp
            else nn.Linear(embed_dim, width)
            for embed_dim in widths
        ]
        nested = [nn.ModuleDict({"projector": nn.ModuleDict({"projector": head})}) for head in heads]
        self.heads, self.projectors = heads, nn.ModuleList(nested)
        self.feature_fusion = Mixer(width, hidden)
        self.llm_backbone = nn.ModuleDict({"llm": llm})

    @torch.no_grad()
    def forward(self, features: list[Tensor], ids: list[int]) -> Tensor:
        """Features [1, t, h, w, D] and token ids that begin with BOS → logits [1, S, vocabulary]."""
        streams = []
        for head, grid in zip(self.heads, features, strict=True):
            cells = (grid.shape[1], self.side, self.side)
            pooled = adaptive_avg_pool3d(grid.movedim(-1, 1), cells).movedim(1, -1)
            streams.append(head(pooled.flatten(1, 3)))
        visual = self.feature_fusion(torch.stack(streams, dim=1))
        llm = self.llm_backbone["llm"]
        text = llm.get_input_embeddings()(torch.tensor([ids]))
        return llm(inputs_embeds=torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)).logits

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state dicts that the release saves under `model`."""
        parts = ("projectors", "feature_fusion", "llm_backbone")
        return {part: self.get_submodule(part).state_dict() for part in parts}


def grown(llm: Any, tokens: int) -> Any:
    """A random language model like `llm`, with a vocabulary for `tokens` tokens and <PAD>."""
    config = type(llm.config).from_dict(llm.config.to_dict())
    config.vocab_size = math.ceil((tokens + 1) / 64) * 64
    return type(llm)(config).eval()


def config_of(ids: list[str], frames: list[int], steps: int, **overrides: Any) -> dict[str, Any]:
    """The release's config.json for the encoders `ids`, with 4 tokens per time step."""
    model = {
        "type": "merv-base",
        "model_id": "merv-base",
        "arch_specifier": "no-align+3davg+linear",
        "feature_fusion": "cross_attention_avg_lq",
        "video_backbone_ids": ids,
        "llm_backbone_id": "llama2-7b-pure",
        "image_resize_strategy": "resize-naive",
        "llm_max_length": 2048,
        "num_frames": frames,
        "projector_token_length": 4,
        "visual_feature_length": 4 * steps,
        "align_epochs": 1,
        "finetune_learning_rate": 2e-5,
        "enable_gradient_checkpointing": True,
        "save_checkpoint_after": 512,
        "reduce_in_full_precision": False,
        **overrides,
    }
    return {"model": model, "stage": "finetune", "seed": 7}


def write(folder: Path, model: dict[str, Any], config: dict[str, Any], **extra: Any) -> Path:
    """Write latest-checkpoint.pt, with `extra` entries, and config.json. Returns the checkpoint's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"model": model, **extra}, folder / "latest-checkpoint.pt")
    return folder / "latest-checkpoint.pt"

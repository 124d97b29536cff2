"""Train: a LightningModule that teaches mixer and projector (and a LoRA) to feed the LLM.

Encoders are frozen, so each video goes through them once, before the first step; what is kept
are its aligned features, in memory or on disk.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from merv.data import ChatData, Group, Sample
from merv.errors import TrainingError
from merv.llm import LoraOptions, load_llm
from merv.multi_encoder import MultiEncoder
from merv.store import FeatureStore
from merv.video_llm import VideoLLM

log = logging.getLogger(__name__)


class Training(LightningModule):
    """What `merv fit` trains: a VideoLLM built from names.

    llm: folder or hub id. encoders, grid, mixer, projector, norm, mixer_options, frames, sampling: of the
        MultiEncoder. weights: of encoders, by name.
    train: the parts to train: projector, mixer, lora, llm. lora: with `lora` among them.
    lr: peak learning rate; lr_of: another one for a part, by name. weight_decay: not on biases, norms
        and other vectors. warmup: share of the steps; then cosine down to zero.
    dtype: of the LLM; fp32 where `llm` itself is trained. All that is trained is in fp32.
    token_rms: scale at which tokens enter the LLM; None: that of its own embeddings.
    store: folder for the encoders' features; None keeps them in memory.
    """

    def __init__(
        self,
        llm: str,
        encoders: list[str],
        grid: tuple[int, int, int] = (16, 8, 8),
        mixer: str = "cross_attention",
        projector: str = "linear",
        norm: bool = True,
        mixer_options: dict[str, Any] | None = None,
        weights: dict[str, str] | None = None,
        frames: dict[str, int] | None = None,
        sampling: str = "uniform",
        train: Sequence[str] = ("projector", "mixer"),
        lora: LoraOptions | None = None,
        lr: float = 1e-3,
        lr_of: dict[str, float] | None = None,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        dtype: str = "auto",
        token_rms: float | None = None,
        store: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["lora"])  # plain values only: checkpoints are never unpickled
        self.lora = lora
        self.model: VideoLLM | None = None

    # Parts --------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the VideoLLM; Lightning calls this when the place to build it is known."""
        if self.model is not None:
            return
        h: Any = self.hparams
        llm, tokenizer = load_llm(h.llm, h.dtype)
        if "llm" in h.train and llm.dtype != torch.float32:
            raise TrainingError(
                f"The LLM is in {str(llm.dtype).removeprefix('torch.')}, where small steps of its weights "
                "are lost. Set dtype: fp32 (with trainer.precision: bf16-mixed for speed), or train a lora."
            )
        vision = MultiEncoder(
            h.encoders,
            grid=tuple(h.grid),
            width=llm.get_input_embeddings().embedding_dim,
            mixer=h.mixer,
            projector=h.projector,
            norm=h.norm,
            mixer_options=h.mixer_options,
            weights=h.weights or {},
            frames=h.frames,
            sampling=h.sampling,
        )
        assert vision.fusion is not None
        table = llm.get_input_embeddings().weight
        vision.fusion.scale_to(h.token_rms or table.float().pow(2).mean().sqrt().item())
        self.model = VideoLLM(llm, tokenizer, vision, FeatureStore(h.store))
        if "lora" in h.train:
            self.model.add_lora(self.lora or LoraOptions())
        self.model.train_only(h.train)

    def configure_optimizers(self) -> Any:
        """AdamW over the trained parts, linear warm-up, cosine to zero."""
        h: Any = self.hparams
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise TrainingError("The schedule needs an end: set trainer.max_steps or trainer.max_epochs.")
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=h.lr)
        warm = max(1, round(h.warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(warm_up_and_cosine, warm=warm, steps=steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Per part a group with weight decay for matrices, and one without for the rest."""
        assert self.model is not None
        h: Any = self.hparams
        rates: Mapping[str, float] = h.lr_of or {}
        parts = self.model.parts()
        groups = []
        for part in self.model.trained:
            rate = rates.get(part, h.lr)
            matrices = [p for p in parts[part].values() if p.ndim > 1]
            vectors = [p for p in parts[part].values() if p.ndim <= 1]
            decays = ((matrices, h.weight_decay), (vectors, 0.0))
            groups += [{"params": ps, "lr": rate, "weight_decay": decay} for ps, decay in decays if ps]
        return groups

    # Steps --------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Run the frozen encoders over all videos, once."""
        assert self.model is not None
        for part, parameters in self.model.parts().items():
            count = sum(p.numel() for p in parameters.values())
            log.info(
                "%-10s %12s parameters, %s",
                part,
                f"{count:,}",
                "trained" if part in self.model.trained else "frozen",
            )
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ChatData):
            encode_all(self.model, list(data.videos()))

    def training_step(self, batch: Sequence[Group], index: int) -> Tensor:
        """Mean loss over the answers' tokens of a few groups of conversations."""
        assert self.model is not None
        loss = self.model(batch)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.right: dict[str, list[bool]] = defaultdict(list)

    def validation_step(self, batch: Sequence[Sample], index: int) -> None:
        """Which answers greedy decoding would get exactly right, by kind."""
        assert self.model is not None
        said = self.model.would_say([sample.conversations for sample in batch])
        for sample, hits in zip(batch, said, strict=True):
            for kind, hit in zip(sample.kinds, hits, strict=True):
                self.right[kind].append(hit)

    def on_validation_epoch_end(self) -> None:
        for kind, hits in self.right.items():
            self.log(f"val/{kind or 'accuracy'}", sum(hits) / len(hits))
        every = [hit for hits in self.right.values() for hit in hits]
        if every:
            self.log("val/all", sum(every) / len(every), prog_bar=True)

    def train(self, mode: bool = True) -> Training:
        """Frozen parts stay in eval mode; what is trained follows `mode`."""
        super().train(mode)
        if self.model is not None and not {"llm", "lora"} & set(self.model.trained):
            self.model.llm.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only what is trained: Lightning's checkpoints hold nothing frozen."""
        state = super().state_dict(*args, **kwargs)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` holds; anything else in it, or missing from it, is an error."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        if strict and trained != set(state):
            raise TrainingError(
                f"The checkpoint does not fit: it lacks {sorted(trained - set(state))[:4]} and has "
                f"{sorted(set(state) - trained)[:4]} besides."
            )
        return super().load_state_dict(state, strict=False, assign=assign)


def warm_up_and_cosine(step: int, *, warm: int, steps: float) -> float:
    """Share of the peak learning rate: up in a line over `warm` steps, down to 0 at `steps`.

    >>> [round(warm_up_and_cosine(step, warm=2, steps=10), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def encode_all(model: VideoLLM, videos: Sequence[Any]) -> None:
    """Fill the model's feature store, with a progress bar; what is there already is not computed."""
    from tqdm import tqdm

    for video in tqdm(videos, "Encoding videos, once", unit="video", mininterval=1.0):
        model.vision.features([video], store=model.store)


def save(training: Training, folder: str | Path) -> Path:
    """Write the trained VideoLLM where `VideoLLM.from_pretrained` finds it."""
    assert training.model is not None
    training.model.save_pretrained(folder)
    return Path(folder)

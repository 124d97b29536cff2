"""VideoLLM: a causal language model of transformers that sees through a MultiEncoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from merv.checkpoints.folder import fill_exactly, load_folder
from merv.checkpoints.pretrained import PretrainedMixin, bundled_llm, find_model
from merv.errors import PromptError, ShapeError
from merv.features.store import FeatureStore
from merv.fusion.fusion import Fusion
from merv.models.chat import NOT_LEARNED, Conversation, Prompt, Visual, check_messages, render
from merv.models.generation import GenerationMixin
from merv.models.llm import LoraOptions, check_same, identity, load_llm, supports_shared_prefix
from merv.models.multi_encoder import Encoded, MultiEncoder, source_key
from merv.models.outputs import VideoLLMOutput, VisualTokens
from merv.models.packing import Packed, pack, tokens_of
from merv.models.scoring import ScoringMixin
from merv.models.trainable import TrainablePartsMixin


class VideoLLM(GenerationMixin, ScoringMixin, TrainablePartsMixin, PretrainedMixin):
    """Any causal LM, any encoders: chat messages with videos in, answers out.

    llm, tokenizer: of transformers. vision: a MultiEncoder whose output_dim is the LLM's width.
    feature_store: where aligned features are kept, so that encoders run once per video.

    Raises ShapeError where the widths differ.

    >>> from merv.testing import tiny_llm
    >>> llm, tokenizer = tiny_llm()
    >>> vision = MultiEncoder(["fake"], grid=(2, 2, 2), output_dim=llm.config.hidden_size)
    >>> model = VideoLLM(llm, tokenizer, vision).eval()
    >>> video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    >>> from merv.models.chat import user_message
    >>> len(model.generate([user_message("What is this?", video)], max_new_tokens=4))
    1
    >>> model([[user_message("What is this?", video, answer="Nothing.")]]).loss.shape
    torch.Size([])
    """

    kind = "VideoLLM"

    def __init__(
        self, llm: Any, tokenizer: Any, vision: MultiEncoder, feature_store: FeatureStore | None = None
    ) -> None:
        super().__init__()
        width = llm.get_input_embeddings().embedding_dim
        if vision.fusion is None or vision.fusion.output_dim != width:
            came = None if vision.fusion is None else vision.fusion.output_dim
            raise ShapeError(
                f"The LLM is {width} wide; build the MultiEncoder with output_dim={width}, not {came}."
            )
        self.llm, self.tokenizer, self.vision = llm, tokenizer, vision
        self.feature_store = feature_store
        self.identity = identity(llm)
        self.train_only(("projector", "mixer"))

    # The path -----------------------------------------------------------------------------

    def forward(
        self, groups: Sequence[Sequence[Conversation]], packed_length: int | None = None
    ) -> VideoLLMOutput:
        """What the LLM expects where the answers are; `.loss` of it is the training loss.

        groups: conversations that end in an answer; those of a group share their video, which
            the LLM then reads once for all of them, if its attention can
            (`merv.models.llm.supports_shared_prefix`).
            Without any, the result has nothing to learn, and still a gradient, zero, for all that is trained.
        packed_length: put groups together in rows of up to so many tokens.

        Raises PromptError where a conversation has no answer.
        """
        if not groups:
            return self._nothing()
        _check_answered(groups)
        prompts = self.render(groups)  # messages → token ids, with gaps for the videos
        visual = self.encode_visuals(prompts)  # videos → tokens: read, encode, align, fuse
        packed = self.pack(prompts, visual, packed_length=packed_length)  # both → rows for the LLM
        keep = _before_answers(packed)
        logits = self.logits(packed, visual.tokens, keep)
        return VideoLLMOutput(
            logits.float(),
            packed.labels[:, keep + 1],
            packed.branches[:, keep + 1],
            visual.mix_weights,
        )

    def rows(self, groups: Sequence[Sequence[Conversation]]) -> list[Sequence[Conversation]]:
        """The groups as rows of a batch; each conversation has its own where the LLM cannot share one."""
        if supports_shared_prefix(self.llm):
            return list(groups)
        return [[conversation] for group in groups for conversation in group]

    def render(self, groups: Sequence[Sequence[Conversation]]) -> list[list[Prompt]]:
        """The prompts of the conversations in each row."""
        return [[render(messages, self.tokenizer) for messages in row] for row in self.rows(groups)]

    def encode_visuals(self, prompts: Sequence[Sequence[Prompt]]) -> VisualTokens:
        """The tokens of all videos in the prompts."""
        visuals = [visual for row in prompts for prompt in row for visual in prompt.visuals]
        if not visuals:  # for gradients, and for other processes
            return VisualTokens(self.fusion.nothing()[:0].to(self.device), [], {})
        keys = [(source_key(v.source), v.question if self.fusion.mixer.conditioned else "") for v in visuals]
        distinct = dict(zip(keys, visuals, strict=True))
        fused = self._see(list(distinct.values())).fused
        ends = fused.mask.sum(dim=1).cumsum(0).tolist()
        own = {key: range(start, end) for key, start, end in zip(distinct, [0, *ends], ends, strict=False)}
        shares = _mean_weights(fused.mix_weights, self.fusion.names)
        return VisualTokens(fused.tokens[fused.mask], [own[key] for key in keys], shares)

    def pack(
        self,
        prompts: Sequence[Sequence[Prompt]],
        visual: VisualTokens,
        *,
        side: Literal["left", "right"] = "right",
        packed_length: int | None = None,
    ) -> Packed:
        """Prompts and visual tokens as the LLM's input; side: where the padding goes."""
        ranges = iter(visual.ranges)
        sequences = [[tokens_of(prompt, ranges) for prompt in row] for row in prompts]
        packed = pack(sequences, self.pad_id, side, packed_length)
        return Packed(*(tensor.to(self.device) for tensor in vars(packed).values()))

    def prepare(
        self, groups: Sequence[Sequence[Conversation]], **options: Any
    ) -> tuple[Packed, VisualTokens]:
        """All that comes before the LLM: `render`, `encode_visuals` and `pack`, whose options these are."""
        prompts = self.render(groups)
        visual = self.encode_visuals(prompts)
        return self.pack(prompts, visual, **options), visual

    def logits(self, packed: Packed, visual: Tensor, keep: Tensor) -> Tensor:
        """What follows the tokens `keep` [K] of each row: [B, K, vocabulary]."""
        embeddings = packed.embed(self.llm.get_input_embeddings(), visual)
        eager = self.llm.config.get_text_config()._attn_implementation == "eager"
        shared = {"position_ids": packed.positions} if packed.mask.ndim == 4 else {}  # else 0, 1, 2, …
        out = self.llm(
            inputs_embeds=embeddings,
            attention_mask=packed.attention_mask(like=embeddings, additive=eager),
            logits_to_keep=keep,
            use_cache=False,
            **shared,
        )
        return out.logits

    def encode(self, conversation: Conversation) -> Encoded:
        """Features, tokens and weights of the videos of one conversation: a batch of them, in order."""
        visuals = render(conversation, self.tokenizer).visuals
        if not visuals:
            raise PromptError("There is no video or image in this conversation.")
        return self._see(visuals)

    def _see(self, visuals: Sequence[Visual]) -> Encoded:
        question = self._embed([v.question for v in visuals]) if self.fusion.mixer.conditioned else None
        return self.vision([visual.source for visual in visuals], question, store=self.feature_store)

    def _embed(self, questions: Sequence[str]) -> Tensor:
        """The mean embedding of each question's tokens, [B, L]: what a mixer may be conditioned on."""
        table = self.llm.get_input_embeddings()
        ids = [self.tokenizer(q or " ", add_special_tokens=False).input_ids for q in questions]
        return torch.stack([table(torch.tensor(own, device=self.device)).mean(dim=0) for own in ids])

    def _nothing(self) -> VideoLLMOutput:
        """All that is trained, run on nothing: a process without data still takes part in a step."""
        visual = self.fusion.nothing()
        words = self.llm.get_input_embeddings()(torch.tensor([[self.pad_id]], device=self.device))
        embeddings = torch.cat([words, visual[None, :1].to(words)], dim=1)
        logits = self.llm(inputs_embeds=embeddings, use_cache=False).logits.float()
        none = torch.full(logits.shape[:2], NOT_LEARNED, device=logits.device)
        return VideoLLMOutput(logits, none, torch.full_like(none, -1), {})

    @property
    def pad_id(self) -> int:  # type: ignore[override]
        """What fills up short rows: masked, so that any token will do."""
        own = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if own is None else own

    @property
    def fusion(self) -> Fusion:  # type: ignore[override]
        """The MultiEncoder's projectors and mixer."""
        assert self.vision.fusion is not None
        return self.vision.fusion

    @property
    def device(self) -> torch.device:
        """Where the LLM is."""
        return self.llm.get_input_embeddings().weight.device

    # Saving -------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """All that `from_pretrained` needs besides tensors, as JSON.

        Raises CheckpointError where an encoder has random weights, which nothing could load again, or where
        a part was put in by hand.
        """
        return {
            "llm": {**self.identity, "dtype": str(self.llm.dtype).removeprefix("torch.")},
            "lora": None
            if self.lora is None
            else {**vars(self.lora), "target_modules": list(self.lora.target_modules)},
            "trained": list(self.trained),
            "modified_parts": sorted(self.modified_parts()),
            "vision": self.vision.config(),
        }

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        llm: str | Path | None = None,
        weights: Mapping[str, str | None] | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        feature_store: FeatureStore | None = None,
    ) -> VideoLLM:
        """Load what `save_pretrained` or `push_to_hub` wrote: a folder, or "owner/name@revision".

        llm: where the language model is now, if not where it was. weights: the same for encoders,
        by name. dtype: of the LLM; None: as it was. quantize: its weights, see `load_llm`.
        feature_store: as of the constructor.
        Raises CheckpointError where something is not what it was, naming both.
        """
        folder = find_model(folder)
        config, state = load_folder(folder, cls.kind)
        was = config["llm"]
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        source = llm or bundled_llm(folder, was["source"]) or was["source"]
        loaded, tokenizer = load_llm(source, dtype or names.get(was["dtype"], "auto"), quantize)
        model = cls(
            loaded, tokenizer, MultiEncoder.from_config(config["vision"], weights or {}), feature_store
        )
        check_same(was, model.identity, folder)
        if config["lora"] is not None:
            model.add_lora(LoraOptions(**config["lora"]))
        model.train_only(config["trained"])
        model._fill(state, config["modified_parts"], folder)
        return model.eval()

    def _fill(self, state: Mapping[str, Tensor], modified: Sequence[str], folder: Path) -> None:
        """Copy in what was saved; modified: the frozen parts that are in it."""
        fill_exactly(self.trainable_state_dict(modified), state, folder)
        self._llm_changed |= "llm" in modified
        for name, encoder in self.vision.named():
            if name in modified:
                encoder.mark_modified()


def _before_answers(packed: Packed) -> Tensor:
    """[K], the places of a row whose next token is an answer's in any row."""
    return (packed.labels[:, 1:] != NOT_LEARNED).any(dim=0).nonzero()[:, 0]


def _check_answered(groups: Sequence[Sequence[Conversation]]) -> None:
    for conversation in (conversation for group in groups for conversation in group):
        check_messages(conversation)
        if not any(turn["role"] == "assistant" for turn in conversation):
            raise PromptError("There is nothing to predict where a conversation has no assistant's turn.")


def _mean_weights(weights: Tensor | None, names: Sequence[str]) -> dict[str, Tensor]:
    """Mean weight [B, E, t, h, w] of each encoder over all cells, 0-dim; nothing where a mixer has none."""
    if weights is None:
        return {}
    return dict(zip(names, weights.detach().float().mean(dim=(0, 2, 3, 4)), strict=True))

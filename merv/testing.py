"""Testing: a conformance suite for encoders, a tiny LLM and a tiny video.

For tests, documentation and bug reports: everything here is small, offline and the same
on every machine.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merv.encode import Encoder
from merv.types import Frames, Grid

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TOLERANCE = 1e-3  # of the features' own spread: batched kernels may sum in another order


# Conformance of encoders ------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What one check found; `message` says what came and what was wanted if it failed."""

    name: str
    passed: bool
    message: str = ""

    def __str__(self) -> str:
        return f"ok    {self.name}" if self.passed else f"FAIL  {self.name}: {self.message}"


def check_encoder(encoder: Encoder | type[Encoder], *, variant: str | None = None) -> list[Finding]:
    """Check that an encoder keeps its contract; a class is created with random weights first.

    Costs about eight passes over one window of frames (two frames of an image encoder).
    A check that raises has failed, and the others still run.

    >>> from merv import find_encoder
    >>> all(finding.passed for finding in check_encoder(find_encoder("fake")))
    True
    """
    if isinstance(encoder, type):
        try:
            encoder = encoder(variant, weights=None)
        except Exception as error:
            return [Finding("is created", False, _words(error))]
    trial = _Trial(encoder)
    return [_finding(check, trial) for check in CHECKS]


def _finding(check: Callable[[_Trial], str | None], trial: _Trial) -> Finding:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        with torch.inference_mode():
            fault = check(trial)
    except Exception as error:
        fault = _words(error)
    return Finding(name, not fault, fault or "")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class _Trial:
    """An encoder, two clips for it, and what it makes of them; each computed once."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.spec = encoder.spec
        self.length = max(2, self.spec.window or 8 * self.spec.tubelet)  # frames a clip

    @cached_property
    def frames(self) -> Frames:
        """Two clips [2, T, 3, H, W]: cropped, and of the second only the first half is real."""
        at = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, self.length, 3, *self.encoder.preset.size, generator=at)
        times_s = torch.stack([torch.arange(self.length) / 8, 3 + torch.arange(self.length) / 25])
        extent = torch.tensor([[0.0, 0.25, 1.0, 0.75], [0.1, 0.2, 0.9, 0.8]])
        mask = torch.ones(2, self.length, dtype=torch.bool)
        mask[1, self.length // 2 :] = False
        return Frames(pixels, times_s.double(), extent, mask)

    @cached_property
    def grid(self) -> Grid:
        return self.encoder(self.frames)

    @cached_property
    def first(self) -> Grid:
        """The first clip alone."""
        return self.encoder(_clip(self.frames, 0))

    def steps(self, frames: int) -> int:
        """How many cells of time the spec promises for that many frames."""
        return frames * self.spec.grid[0] // self.spec.frames


def _clip(frames: Frames, index: int) -> Frames:
    one = slice(index, index + 1)
    return Frames(frames.pixels[one], frames.times_s[one], frames.extent[one], frames.mask[one])


def _far(one: Tensor, other: Tensor) -> str | None:
    """How far two tensors of features are from each other, if further than rounding takes them."""
    if one.shape != other.shape:
        return f"shapes {list(one.shape)} and {list(other.shape)} differ"
    distance = ((one - other).abs().max() / other.std().clamp_min(1e-6)).item()
    return None if distance <= TOLERANCE else f"they differ by {distance:.2g} standard deviations"


def _spec_is_consistent(trial: _Trial) -> str | None:
    spec = trial.spec
    if spec.frames % spec.grid[0]:
        return f"{spec.grid[0]} steps of time in the grid do not divide {spec.frames} frames"
    own = sum(p.numel() for p in trial.encoder.parameters())
    if spec.parameters is not None and not math.isclose(own, spec.parameters, rel_tol=0.01):
        return f"spec.parameters is {spec.parameters}; the encoder has {own}"
    return None


def _is_frozen(trial: _Trial) -> str | None:
    open_ones = [name for name, p in trial.encoder.named_parameters() if p.requires_grad]
    return f"{open_ones[0]} requires a gradient; all parameters should be frozen" if open_ones else None


def _stays_in_eval_mode(trial: _Trial) -> str | None:
    trial.encoder.train()
    training = [name or "it" for name, module in trial.encoder.named_modules() if module.training]
    return f"{training[0]} is in training mode after .train()" if training else None


def _shape_is_what_the_spec_says(trial: _Trial) -> str | None:
    wanted = [2, trial.steps(trial.length), *trial.spec.grid[1:], trial.spec.width]
    came = list(trial.grid.values.shape)
    return None if came == wanted else f"features of {trial.length} frames are {came}; wanted {wanted}"


def _features_are_finite(trial: _Trial) -> str | None:
    strange = int((~trial.grid.values.isfinite()).sum())
    return f"{strange} values are NaN or infinite" if strange else None


def _features_depend_on_the_pixels(trial: _Trial) -> str | None:
    same = torch.equal(trial.grid.values[0], trial.grid.values[1])
    return "two different clips have equal features" if same else None


def _is_deterministic(trial: _Trial) -> str | None:
    state = torch.get_rng_state()
    again = trial.encoder(_clip(trial.frames, 0)).values
    if not torch.equal(state, torch.get_rng_state()):
        return "forward() draws random numbers"
    return _far(again, trial.first.values)


def _batch_equals_one_by_one(trial: _Trial) -> str | None:
    second = trial.encoder(_clip(trial.frames, 1))
    return _far(torch.cat([trial.first.values, second.values]), trial.grid.values)


def _windows_are_independent(trial: _Trial) -> str | None:
    if not trial.spec.window:  # a clip is one window: then its padding must not show
        real = trial.encoder(Frames.of(trial.frames.pixels[1:, : trial.length // 2])).values
        return _far(real, trial.grid.values[1:, : real.shape[1]])
    both = Frames.of(trial.frames.pixels.flatten(0, 1)[None])  # the two clips as one
    return _far(trial.encoder(both).values, trial.grid.values.flatten(0, 1)[None])


def _times_pass_through(trial: _Trial) -> str | None:
    came, given = trial.grid.times_s, trial.frames.times_s
    if (came.diff() < 0).any():
        return "times_s do not ascend"
    inside = (came[:, 0] >= given[:, 0]) & (came[:, -1] <= given[:, -1])
    return None if inside.all() else f"times_s {came.tolist()} leave those of the frames {given.tolist()}"


def _mask_passes_through(trial: _Trial) -> str | None:
    real, half = trial.grid.mask
    if not real.all():
        return "cells of a clip without padding are masked"
    if not half[0].all():
        return "cells of real frames are masked"
    if len(half) > 1 and half[-1].any():
        return "cells of padding are not masked"
    return None


def _extent_is_carried(trial: _Trial) -> str | None:
    same = torch.equal(trial.grid.extent, trial.frames.extent)
    return None if same else f"extent is {trial.grid.extent.tolist()}; wanted that of the frames"


def _pickles(trial: _Trial) -> str | None:
    copy = pickle.loads(pickle.dumps(trial.encoder))
    return _far(copy(_clip(trial.frames, 0)).values, trial.first.values)


CHECKS: tuple[Callable[[_Trial], str | None], ...] = (
    _spec_is_consistent,
    _is_frozen,
    _stays_in_eval_mode,
    _shape_is_what_the_spec_says,
    _features_are_finite,
    _features_depend_on_the_pixels,
    _is_deterministic,
    _batch_equals_one_by_one,
    _windows_are_independent,
    _times_pass_through,
    _mask_passes_through,
    _extent_is_carried,
    _pickles,
)


# A tiny language model ----------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_llm(
    folder: str | Path | None = None, *, chat_template: bool = True, bos: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama of 2 layers, 32 wide, and a tokenizer of single bytes; always the same.

    folder: saved there, for everything that wants the folder of a model.
    chat_template: whether the tokenizer has one, with <|system|>, <|user|>, <|assistant|>.
    bos: whether the tokenizer begins texts with <s>, or has no such token.

    >>> llm, tokenizer = tiny_llm()
    >>> tokenizer.decode(tokenizer("a café").input_ids)
    '<s>a café'
    >>> llm.config.hidden_size
    32
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer(chat_template=chat_template, bos=bos)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.2,  # wide enough that answers differ
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model, tokenizer


def _byte_tokenizer(*, chat_template: bool, bos: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", *(["<s>"] if bos else []), "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    if bos:
        bytewise.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    names: dict[str, Any] = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        **({"bos_token": "<s>"} if bos else {}),
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        **names,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# A tiny video -------------------------------------------------------------------------------


def make_video(
    path: str | Path,
    *,
    frames: int = 16,
    fps: int = 8,
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
) -> Path:
    """Write a video of a white square that crosses a blue ground from left to right.

    size: (width, height) in pixels, even numbers. The container is chosen by the suffix of `path`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     make_video(folder + "/square.mp4").name
    'square.mp4'
    """
    import av

    width, height = size
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)  # a VideoStream, if `codec` is one for video
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = _square(width, height, index / max(1, frames - 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def _square(width: int, height: int, place: float) -> Tensor:
    """RGB uint8 [H, W, 3]; place 0 is at the left, 1 at the right."""
    picture = torch.tensor([20, 40, 160], dtype=torch.uint8).repeat(height, width, 1)
    side = min(width, height) // 3
    left, top = round(place * (width - side)), (height - side) // 2
    picture[top : top + side, left : left + side] = 255
    return picture

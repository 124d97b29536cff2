"""Translate the configuration and the tensor names of a released MERV checkpoint to merv's.

This module reads and writes no files. Unknown options and tensors are errors that name them.

Source: https://github.com/princetonvisualai/merv (MIT), commit d5eb1d2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merv.encoding.registry import list_encoders
from merv.errors import BrokenPlugin, CheckpointError
from merv.models.chat import VISUAL
from merv.utils.suggest import nearest

# Configuration ------------------------------------------------------------------------------

NETWORK = (
    "arch_specifier",
    "feature_fusion",
    "video_backbone_ids",
    "llm_backbone_id",
    "image_resize_strategy",
    "num_frames",
    "projector_token_length",
    "visual_feature_length",
)
# Options that do not describe the network: names, length of training texts, hyperparameters of training.
TRAINING = re.compile(
    "type|vidlm_id|model_id|llm_max_length|(align|finetune|enable)_.*|reduce_in_full_precision|"
    "save_checkpoint_after"
)
ARCHITECTURE = re.compile(
    r"(no-align\+)?(avg|3davg(\+frame(?P<frames>[1-9]\d*))?)\+(?P<head>linear|gelu-mlp)"
)
HEADS = {"linear": "linear", "gelu-mlp": "mlp"}
GATE = "cross_attention_avg_lq"  # the default feature_fusion of the release


@dataclass(frozen=True)
class ReleasedConfig:
    """The `model` entry of a released config.json, in merv's terms.

    Attributes:
        encoders: Name of the encoder in the converted model → "encoder/variant", in the order of the config.
        num_frames: Encoder name → number of frames.
        grid: Common grid (t, h, w).
        total_frames: Number of frames read per clip; an encoder gets every k-th of them.
        projector: "linear" or "mlp".
        fusion: Name of the mixer in the release.
        llm: Id of the language model in the release, a key of LLMS.
    """

    encoders: dict[str, str]
    num_frames: dict[str, int]
    grid: tuple[int, int, int]
    total_frames: int
    projector: str
    fusion: str | None
    llm: str


def read_config(config: Mapping[str, Any]) -> ReleasedConfig:
    """Translate the config.json of a released model.

    Raises:
        CheckpointError: An option is missing, unknown or not supported.
    """
    model = config.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(
            f"Expected the config.json of a released MERV, with an entry 'model'; got {few(config)}."
        )
    unknown = [key for key in model if key not in NETWORK and not TRAINING.fullmatch(key)]
    missing = [key for key in NETWORK if key not in model and key != "feature_fusion"]
    if unknown or missing:
        faults = list_faults({"missing": missing, "unknown": unknown})
        raise CheckpointError(f"Options of 'model' in config.json: {faults}. Expected: {few(NETWORK, 9)}.")
    if model["image_resize_strategy"] != "resize-naive":
        raise CheckpointError(
            f"Unsupported image_resize_strategy {model['image_resize_strategy']!r}: only 'resize-naive' is "
            "supported, which all released models use."
        )
    ids = list(model["video_backbone_ids"])
    counts = model["num_frames"]
    counts = [counts] * len(ids) if isinstance(counts, int) else list(counts)
    if not ids or len(counts) != len(ids) or len(set(ids)) < len(ids):
        raise CheckpointError(
            f"Expected distinct video_backbone_ids and one num_frames for each, got {ids} and {counts}."
        )
    total_frames = max(counts)
    if any(count < 1 or total_frames % count for count in counts):
        raise CheckpointError(
            f"Unsupported num_frames {counts}: in the release, only divisors of {total_frames} give exactly "
            "this number of frames."
        )
    encoders, steps = _find_encoders(ids, counts)
    projector, time_pooling = _architecture(model["arch_specifier"])
    grid = _grid(model, [step // time_pooling for step in steps])
    fusion = model.get("feature_fusion", GATE)
    llm = model["llm_backbone_id"]
    if llm not in LLMS:
        reason = UNSUPPORTED_LLMS.get(llm) or nearest(llm, LLMS)
        raise CheckpointError(f"Unsupported llm_backbone_id {llm!r}.{reason} Available: {', '.join(LLMS)}.")
    _check_fusion(fusion, len(ids))
    num_frames = dict(zip(encoders, counts, strict=True))
    return ReleasedConfig(encoders, num_frames, grid, total_frames, projector, fusion, llm)


def _find_encoders(ids: Sequence[str], counts: Sequence[int]) -> tuple[dict[str, str], list[int]]:
    """Return the encoders with these ids in the release, and the number of time steps of each."""
    available = {}
    for listing in list_encoders():
        try:
            encoder: Any = listing.load()
        except BrokenPlugin:  # `merv encoders` reports it
            continue
        for released_name, variant in vars(encoder).get("released_names", {}).items():
            available[released_name] = (listing.name, variant, encoder.variants)
    encoders, steps = {}, []
    for released_name, frames in zip(ids, counts, strict=True):
        if released_name not in available:
            raise CheckpointError(
                f"Unknown encoder {released_name!r} in video_backbone_ids. Available: "
                f"{', '.join(sorted(available))}."
            )
        name, variant, variants = available[released_name]
        is_default = next(iter(variants)) == variant
        encoders[name if is_default else f"{name}_{variant}".replace("-", "_")] = f"{name}/{variant}"
        steps.append(variants[variant].grid[0] * frames // variants[variant].num_frames)
    return encoders, steps


def _architecture(specifier: str) -> tuple[str, int]:
    """Return the projector and how many time steps are pooled into one.

    An arch_specifier looks like `no-align+3davg+frame2+linear`.
    """
    match = ARCHITECTURE.fullmatch(specifier)
    if match is None:
        raise CheckpointError(
            f"Unsupported arch_specifier {specifier!r}: expected [no-align+]{{avg|3davg[+frameN]}}+"
            "{linear|gelu-mlp}. merv has no projectors that pool with parameters."
        )
    return HEADS[match["head"]], int(match["frames"] or 1)


def _grid(model: Mapping[str, Any], steps: Sequence[int]) -> tuple[int, int, int]:
    tokens, length = model["projector_token_length"], model["visual_feature_length"]
    side = math.isqrt(tokens)
    if side * side != tokens or len(set(steps)) > 1 or (len(steps) > 1 and steps[0] * tokens != length):
        raise CheckpointError(
            f"projector_token_length {tokens}, visual_feature_length {length} and the time steps "
            f"{list(steps)} of the encoders do not fit. Expected a square number of tokens, the same number "
            "of steps for all encoders, and their product as visual_feature_length."
        )
    return steps[0], side, side


# Names of tensors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TranslatedFusion:
    """Tensors under merv's names, the mixer that they belong to, and which tensors are left out and why."""

    state: dict[str, Tensor]
    mixer: str
    options: dict[str, Any]
    left_out: list[str]


def translate_projectors(state: Mapping[str, Tensor], names: Sequence[str], kind: str) -> dict[str, Tensor]:
    """Rename the tensors of projectors.

    For example, `{i}.projector.projector.weight` becomes `projectors.NAME.linear.weight`.
    """
    layers = {"linear": {"": "linear"}, "mlp": {"0.": "hidden.0", "2.": "linear"}}[kind]
    new_names = {
        f"{i}.projector.projector.{old_layer}{leaf}": f"projectors.{name}.{new_layer}.{leaf}"
        for i, name in enumerate(names)
        for old_layer, new_layer in layers.items()
        for leaf in ("weight", "bias")
    }
    return _rename(state, new_names, "projectors")


def translate_fusion(kind: str | None, state: Mapping[str, Tensor]) -> TranslatedFusion:
    """Translate the `feature_fusion` of the release (`adapter` in older checkpoints) to a mixer of merv."""
    if kind == GATE:
        return _translate_gate(state)
    mixer, options, names = RELEASED_MIXERS[kind]
    new_names = {old: f"mixer.{new}" for old, new in names.items()}
    return TranslatedFusion(_rename(state, new_names, "feature_fusion"), mixer, options, [])


# feature_fusion of the release → mixer of merv, its options, and its tensors: name in the release → in merv
RELEASED_MIXERS: dict[str | None, tuple[str, dict[str, Any], dict[str, str]]] = {
    None: ("mean", {}, {}),
    "first": ("mean", {}, {}),
    "concat": ("concat", {}, {}),
    "concat_channel": (
        "concat_channels",
        {},
        {"projector.weight": "linear.weight", "projector.bias": "linear.bias"},
    ),
    "concat_channel_ln": (
        "concat_channels",
        {"norm": True},
        {
            "0.weight": "norm.weight",
            "0.bias": "norm.bias",
            "1.projector.weight": "linear.weight",
            "1.projector.bias": "linear.bias",
        },
    ),
}


def _check_fusion(kind: str | None, num_encoders: int) -> None:
    """Raise CheckpointError for a feature_fusion that is unknown or cannot have this many encoders."""
    if kind != GATE and kind not in RELEASED_MIXERS:
        raise CheckpointError(
            f"Unsupported feature_fusion {kind!r}. Available: "
            f"{', '.join([GATE, *map(str, RELEASED_MIXERS)])}."
        )
    if kind in (None, "first") and num_encoders > 1:
        raise CheckpointError(
            f"Unsupported feature_fusion {kind!r} with {num_encoders} encoders: the release then uses only "
            "the first encoder, or fails."
        )


def _translate_gate(state: Mapping[str, Tensor]) -> TranslatedFusion:
    """Translate the learned query and its attention, without tensors that do not affect the tokens."""
    state, hidden = dict(state), state["Q"].shape[1] if "Q" in state else 0
    if "attention.in_proj_weight" in state:  # packed by torch if hidden is the LLM's dimension
        names = [f"attention.{part}_proj_weight" for part in "qkv"]
        state.update(zip(names, state.pop("attention.in_proj_weight").chunk(3), strict=True))
    new_names = {
        "Q": "mixer.query",
        "attention.q_proj_weight": "mixer.to_query.weight",
        "attention.in_proj_bias": "mixer.to_query.bias",
        "attention.k_proj_weight": "mixer.to_key.weight",
    }
    unused = ["attention.v_proj_weight", "attention.out_proj.weight", "attention.out_proj.bias"]
    _check_names(state, [*new_names, *unused], "feature_fusion")
    translated = {new: state[old] for old, new in new_names.items()}
    translated["mixer.to_query.bias"] = translated["mixer.to_query.bias"][:hidden]
    left_out = [f"feature_fusion.{name}: its output is not used" for name in unused]
    left_out.append(
        "feature_fusion.attention.in_proj_bias, its parts for keys and values: the part for keys cancels in "
        "the softmax, the output of the part for values is not used"
    )
    return TranslatedFusion(translated, "gate", {"hidden": hidden}, left_out)


def _rename(state: Mapping[str, Tensor], names: Mapping[str, str], part: str) -> dict[str, Tensor]:
    _check_names(state, names, part)
    return {new: state[old] for old, new in names.items()}


def _check_names(state: Iterable[str], expected: Iterable[str], part: str) -> None:
    """Raise CheckpointError unless `state` has exactly the expected names."""
    state, expected = list(state), list(expected)
    faults = list_faults(
        {
            "missing": [name for name in expected if name not in state],
            "unknown": [name for name in state if name not in expected],
        }
    )
    if faults:
        raise CheckpointError(f"The tensors of {part} do not fit config.json: {faults}.")


def list_faults(faults: Mapping[str, Sequence[str]]) -> str:
    """List the names of each fault, for messages; empty without names."""
    return "; ".join(f"{fault} {few(names)}" for fault, names in faults.items() if names)


def few(names: Iterable[str], limit: int = 6) -> str:
    """List the first names, for messages."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# Language models ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModel:
    """A language model of the release.

    Attributes:
        source: Hub id.
        adds_pad_token: Whether the release adds a <PAD> token.
        chat_template: Chat template that gives the prompt of the release; None for the plain format.
    """

    source: str
    adds_pad_token: bool = True
    chat_template: str | None = None


PAD = "<PAD>"
VOCABULARY_MULTIPLE = 64  # with a <PAD>, the release pads the vocabulary to a multiple of this

_ASSISTANT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_POLITE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)


def _template(system: str, first: str, user: str, assistant: str) -> str:
    """Return a chat template of the release's prompt: BOS, all visual tokens, `first`, then the turns.

    In `first`, the variable `system` is the content of a system turn, or else the release's default.
    """
    return (
        f"{{%- set visual = '{VISUAL}' %}}{{{{- bos_token or '' }}}}"
        "{%- for m in messages %}{{- visual * m.content.count(visual) }}{%- endfor %}"
        f"{{%- set system = messages[0].content if messages[0].role == 'system' else {system!r} %}}"
        "{%- for m in messages %}{%- set text = m.content.replace(visual, '').strip() %}"
        "{%- set start = loop.first or (loop.index0 == 1 and messages[0].role == 'system') %}"
        f"{{%- if m.role == 'user' %}}{{{{- {first} if start else '' }}}}{{{{- {user} }}}}"
        f"{{%- elif m.role == 'assistant' %}}{{{{- {assistant} }}}}{{%- endif %}}{{%- endfor %}}"
    )


_HEADER = "'<|start_header_id|>{}<|end_header_id|>\\n\\n'"
VICUNA = _template(_POLITE, "system + ' '", "'USER: ' + text + ' ASSISTANT:'", "' ' + text + eos_token")
LLAMA2_CHAT = _template(
    _ASSISTANT,
    "''",
    # The release has this typo, too: one > is missing.
    "('' if start else bos_token) + '[INST] ' + ('<<SYS>\\n' + system + '\\n<</SYS>>\\n\\n' if start else '')"
    " + text + ' [/INST]'",
    "' ' + text + eos_token",
)
LLAMA31 = _template(
    _ASSISTANT,
    f"{_HEADER.format('system')} + system + '<|eot_id|>'",
    f"{_HEADER.format('user')} + text + '<|eot_id|>' + {_HEADER.format('assistant')}",
    "text + '<|eot_id|>'",
)
QWEN25 = _template(
    _ASSISTANT,
    "'<|im_start|>system\\n' + system + '<|im_end|>\\n'",
    "'<|im_start|>user\\n' + text + '<|im_end|>\\n<|im_start|>assistant\\n'",
    "text + '<|im_end|>'",
)

LLMS = {
    "llama2-7b-pure": LanguageModel("meta-llama/Llama-2-7b-hf"),
    "llama2-13b-pure": LanguageModel("meta-llama/Llama-2-13b-hf"),
    "llama2-7b-chat": LanguageModel("meta-llama/Llama-2-7b-chat-hf", chat_template=LLAMA2_CHAT),
    "llama2-13b-chat": LanguageModel("meta-llama/Llama-2-13b-chat-hf", chat_template=LLAMA2_CHAT),
    "vicuna-v15-7b": LanguageModel("lmsys/vicuna-7b-v1.5", chat_template=VICUNA),
    "vicuna-v15-13b": LanguageModel("lmsys/vicuna-13b-v1.5", chat_template=VICUNA),
    "llama3.1-8b-chat": LanguageModel("meta-llama/Meta-Llama-3.1-8B-Instruct", False, LLAMA31),
    "qwen2.5-7b-instruct": LanguageModel("Qwen/Qwen2.5-7B-Instruct", False, QWEN25),
    "qwen2.5-3b-instruct": LanguageModel("Qwen/Qwen2.5-3B-Instruct", False, QWEN25),
}
_NO_END = " It was trained to end answers with the text </s>, which is not the end token of its tokenizer."
UNSUPPORTED_LLMS = {"llama3-8b-pure": _NO_END, "llama3-8b-chat": _NO_END}

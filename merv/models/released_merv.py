"""Released: what the configuration and the names in a checkpoint of the released MERV mean in ours.

Pure translation: nothing is read or written here. What is not known is refused by name.

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
# What says nothing about the network: names, the length of training texts, how it was trained.
TRAINING = re.compile(
    "type|vidlm_id|model_id|llm_max_length|(align|finetune|enable)_.*|reduce_in_full_precision|"
    "save_checkpoint_after"
)
POOLING, HEADS = ("avg", "3davg"), {"linear": "linear", "gelu-mlp": "mlp"}


@dataclass(frozen=True)
class Released:
    """The `model` of a released config.json in our words.

    encoders: name of the stream → "encoder/variant", in the order of the file. frames: by name.
    grid: (t, h, w). total: frames read of a clip, of which every encoder takes every k-th.
    projector: `linear` or `mlp`. fusion: the release's word for the mixer. llm: a key of LLMS.
    """

    encoders: dict[str, str]
    frames: dict[str, int]
    grid: tuple[int, int, int]
    total: int
    projector: str
    fusion: str | None
    llm: str


def read_config(config: Mapping[str, Any]) -> Released:
    """What config.json of a released model says; CheckpointError names what is missing or not known."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"The config has no 'model', but {few(config)}; wanted that of the release.")
    unknown = [key for key in model if key not in NETWORK and not TRAINING.fullmatch(key)]
    missing = [key for key in NETWORK if key not in model and key != "feature_fusion"]
    if unknown or missing:
        said = [f"{what} {few(keys)}" for what, keys in (("lacks", missing), ("has", unknown)) if keys]
        raise CheckpointError(
            f"The config's model {' and '.join(said)}; the release knows {few(NETWORK, 9)}."
        )
    if model["image_resize_strategy"] != "resize-naive":
        raise CheckpointError(
            f"image_resize_strategy {model['image_resize_strategy']!r}: only 'resize-naive', with which all "
            "released models were trained, is known."
        )
    ids = list(model["video_backbone_ids"])
    counts = model["num_frames"]
    counts = [counts] * len(ids) if isinstance(counts, int) else list(counts)
    if not ids or len(counts) != len(ids) or len(set(ids)) < len(ids):
        raise CheckpointError(
            f"Wanted distinct video_backbone_ids and a num_frames each; got {ids}, {counts}."
        )
    total = max(counts)
    if any(count < 1 or total % count for count in counts):
        raise CheckpointError(
            f"num_frames {counts}: the release gives exact counts only to divisors of {total}."
        )
    encoders, steps = find_encoders(ids, counts)
    projector, every = _architecture(model["arch_specifier"])
    grid = _grid(model, [step // every for step in steps])
    fusion = model.get("feature_fusion", "cross_attention_avg_lq")  # the release's default
    if model["llm_backbone_id"] not in LLMS:
        known = f"There are: {', '.join(LLMS)}."
        reason = REFUSED.get(model["llm_backbone_id"]) or nearest(model["llm_backbone_id"], LLMS)
        raise CheckpointError(f"llm_backbone_id {model['llm_backbone_id']!r} is not known.{reason} {known}")
    check_fusion(fusion, len(ids))
    frames = dict(zip(encoders, counts, strict=True))
    return Released(encoders, frames, grid, total, projector, fusion, model["llm_backbone_id"])


def find_encoders(ids: Sequence[str], counts: Sequence[int]) -> tuple[dict[str, str], list[int]]:
    """Streams of the encoders that the release calls `ids`, and how many steps of time each has."""
    known = {}
    for listing in list_encoders():
        try:
            encoder: Any = listing.load()
        except BrokenPlugin:  # told by `merv encoders`
            continue
        for released, variant in vars(encoder).get("released_names", {}).items():
            known[released] = (listing.name, variant, encoder.variants)
    encoders, steps = {}, []
    for name, frames in zip(ids, counts, strict=True):
        if name not in known:
            raise CheckpointError(
                f"video_backbone_ids has {name!r}, which is not known. There are: {', '.join(sorted(known))}."
            )
        ours, variant, variants = known[name]
        first = next(iter(variants)) == variant
        encoders[ours if first else f"{ours}_{variant}".replace("-", "_")] = f"{ours}/{variant}"
        steps.append(variants[variant].grid[0] * frames // variants[variant].num_frames)
    return encoders, steps


def _architecture(specifier: str) -> tuple[str, int]:
    """Projector and how many steps of time become one, from `no-align+3davg+frame2+linear` and its like."""
    words = [word for word in specifier.split("+") if word != "no-align"]
    every = [word for word in words if re.fullmatch(r"frame[1-9]\d*", word)]
    rest = [word for word in words if word not in every]
    fits = len(rest) == 2 and rest[0] in POOLING and rest[1] in HEADS and len(every) <= 1
    if not fits or (every and rest[0] != "3davg"):
        raise CheckpointError(
            f"arch_specifier {specifier!r} is not known: wanted [no-align+]{{{'|'.join(POOLING)}}}[+frameN]+"
            f"{{{'|'.join(HEADS)}}}. Projectors that pool with parameters of their own have no equal here."
        )
    return HEADS[rest[1]], int(every[0].removeprefix("frame")) if every else 1


def _grid(model: Mapping[str, Any], steps: Sequence[int]) -> tuple[int, int, int]:
    tokens, length = model["projector_token_length"], model["visual_feature_length"]
    side = math.isqrt(tokens)
    if side * side != tokens or len(set(steps)) > 1 or (len(steps) > 1 and steps[0] * tokens != length):
        raise CheckpointError(
            f"projector_token_length {tokens}, visual_feature_length {length} and the encoders' steps "
            f"of time {list(steps)} do not fit: wanted a square, equal steps, and their product."
        )
    return steps[0], side, side


# Names of tensors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Translated:
    """Tensors under our names, the mixer that they are of with its options, what was left out and why."""

    state: dict[str, Tensor]
    mixer: str
    options: dict[str, Any]
    left_out: list[str]


def translate_projectors(state: Mapping[str, Tensor], names: Sequence[str], kind: str) -> dict[str, Tensor]:
    """`{i}.projector.projector.weight` → `projectors.NAME.linear.weight`; MLPs likewise."""
    layers = {"linear": {"": "linear"}, "mlp": {"0.": "hidden.0", "2.": "linear"}}[kind]
    wanted = {
        f"{i}.projector.projector.{theirs}{leaf}": f"projectors.{name}.{ours}.{leaf}"
        for i, name in enumerate(names)
        for theirs, ours in layers.items()
        for leaf in ("weight", "bias")
    }
    return _renamed(state, wanted, "projectors")


def translate_fusion(kind: str | None, state: Mapping[str, Tensor], encoders: int) -> Translated:
    """The release's `feature_fusion` (older: `adapter`) as one of our mixers, its keys all accounted for."""
    check_fusion(kind, encoders)
    if kind == "cross_attention_avg_lq":
        return _gate(state)
    mixer, options, names = FUSIONS[kind]
    ours = _renamed(state, {theirs: f"mixer.{own}" for theirs, own in names.items()}, "feature_fusion")
    return Translated(ours, mixer, options, [])


def check_fusion(kind: str | None, encoders: int) -> None:
    """Raise CheckpointError for a feature_fusion that is not known, or does not suit so many encoders."""
    if kind != "cross_attention_avg_lq" and kind not in FUSIONS:
        known = ["cross_attention_avg_lq", *map(str, FUSIONS)]
        raise CheckpointError(f"feature_fusion {kind!r} is not known. There are: {', '.join(known)}.")
    if kind in (None, "first") and encoders > 1:
        raise CheckpointError(
            f"feature_fusion {kind!r} with {encoders} encoders: the release then uses the first one "
            "alone, or fails. Such a model is not converted."
        )


# feature_fusion → our mixer, its options, and its tensors under both names
FUSIONS: dict[str | None, tuple[str, dict[str, Any], dict[str, str]]] = {
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


def _gate(state: Mapping[str, Tensor]) -> Translated:
    """The learned query and its attention: what acts on the weights is kept, the rest is left out by name."""
    state, hidden = dict(state), state["Q"].shape[1] if "Q" in state else 0
    if "attention.in_proj_weight" in state:  # what torch keeps where hidden and the LLM are equally wide
        names = [f"attention.{part}_proj_weight" for part in "qkv"]
        state.update(zip(names, state.pop("attention.in_proj_weight").chunk(3), strict=True))
    wanted = {
        "Q": "mixer.query",
        "attention.q_proj_weight": "mixer.to_query.weight",
        "attention.in_proj_bias": "mixer.to_query.bias",
        "attention.k_proj_weight": "mixer.to_key.weight",
    }
    dead = ["attention.v_proj_weight", "attention.out_proj.weight", "attention.out_proj.bias"]
    _all_there(state, [*wanted, *dead], "feature_fusion")
    ours = {new: state[old] for old, new in wanted.items()}
    ours["mixer.to_query.bias"] = ours["mixer.to_query.bias"][:hidden]
    left_out = [f"feature_fusion.{name}: acts on nothing that is used" for name in dead]
    left_out.append(
        "feature_fusion.attention.in_proj_bias, its parts for keys and values: the former cancel in the "
        "softmax, the latter act on nothing that is used"
    )
    return Translated(ours, "gate", {"hidden": hidden}, left_out)


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str], what: str) -> dict[str, Tensor]:
    _all_there(state, names, what)
    return {new: state[old] for old, new in names.items()}


def _all_there(state: Iterable[str], wanted: Iterable[str], what: str) -> None:
    """Raise CheckpointError unless exactly the `wanted` keys are in `state`."""
    state, wanted = list(state), list(wanted)
    faults = {
        "missing": [key for key in wanted if key not in state],
        "not known": [key for key in state if key not in wanted],
    }
    if any(faults.values()):
        said = "; ".join(f"{few(keys)} {fault}" for fault, keys in faults.items() if keys)
        raise CheckpointError(f"{what} is not as this config describes it: {said}.")


def few(names: Iterable[str], most: int = 6) -> str:
    """The first of some names, for messages."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Language models ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModel:
    """A language model of the release: hub id, whether it got a <PAD>, chat template (None: plain)."""

    source: str
    grows: bool = True
    template: str | None = None


PAD, MULTIPLE = "<PAD>", 64  # the token that is added, and what the vocabulary is then filled up to

_ASSISTANT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_POLITE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)


def _template(system: str, first: str, user: str, assistant: str) -> str:
    """A chat template of the release's prompt: BOS, all visual tokens, `first`, then the turns.

    In `first`, `system` is what a system turn says, or the release's own words.
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
    # One > is missing in the release too.
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
    "llama2-7b-chat": LanguageModel("meta-llama/Llama-2-7b-chat-hf", template=LLAMA2_CHAT),
    "llama2-13b-chat": LanguageModel("meta-llama/Llama-2-13b-chat-hf", template=LLAMA2_CHAT),
    "vicuna-v15-7b": LanguageModel("lmsys/vicuna-7b-v1.5", template=VICUNA),
    "vicuna-v15-13b": LanguageModel("lmsys/vicuna-13b-v1.5", template=VICUNA),
    "llama3.1-8b-chat": LanguageModel("meta-llama/Meta-Llama-3.1-8B-Instruct", False, LLAMA31),
    "qwen2.5-7b-instruct": LanguageModel("Qwen/Qwen2.5-7B-Instruct", False, QWEN25),
    "qwen2.5-3b-instruct": LanguageModel("Qwen/Qwen2.5-3B-Instruct", False, QWEN25),
}
_NO_END = " It was trained to end answers with the letters </s>, which end nothing for its tokenizer."
REFUSED = {"llama3-8b-pure": _NO_END, "llama3-8b-chat": _NO_END}

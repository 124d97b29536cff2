"""Translate the configuration and the tensor names of a released MERV checkpoint to merv's.

This module reads and writes no files.

Source: https://github.com/princetonvisualai/merv (MIT), commit d5eb1d2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merv.encoding.registry import list_encoders
from merv.encoding.weights import renamed
from merv.errors import BrokenPlugin, CheckpointError
from merv.models.chat import VISUAL
from merv.utils.suggest import nearest
from merv.utils.torch_modules import first_few

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
GATE = "cross_attention_avg_lq"  # the default feature_fusion of the release
# feature_fusion of the release → mixer of merv, its options, and the beginnings of its tensors' names: in the
# release → in merv
MIXERS: dict[str | None, tuple[str, dict[str, Any], dict[str, str]]] = {
    GATE: (
        "gate",
        {},
        {
            "Q": "query",
            "attention.q_proj_weight": "to_query.weight",
            "attention.in_proj_bias": "to_query.bias",
            "attention.k_proj_weight": "to_key.weight",
        },
    ),
    None: ("mean", {}, {}),
    "first": ("mean", {}, {}),
    "concat": ("concat", {}, {}),
    "concat_channel": ("concat_channels", {}, {"projector.": "linear."}),
    "concat_channel_ln": ("concat_channels", {"norm": True}, {"0.": "norm.", "1.projector.": "linear."}),
}
# End of an arch_specifier → projector of merv, and the beginnings of its layers' names
PROJECTORS = {
    "linear": ("linear", {"": "linear."}),
    "gelu-mlp": ("mlp", {"0.": "hidden.0.", "2.": "linear."}),
}
# Tensors that do not affect the tokens → the reason
UNUSED = {
    r"feature_fusion\.attention\.(v_proj_weight|out_proj\.(weight|bias))": "its output is not used",
    # It is saved by the transformers version of the release.
    r"llm\..*rotary_emb\.inv_freq": "the language model computes it",
}
# Beginning of a tensor's name in older checkpoints → in newer ones; last: of the release's language model →
# merv's
RENAMED = {
    r"^adapter\.": "feature_fusion.",
    r"^projector\.": "projectors.0.",
    r"^llm_backbone\.llm\.": "llm.",
}
PACKED = [f"feature_fusion.attention.{part}_proj_weight" for part in "qkv"]


@dataclass(frozen=True)
class ReleasedConfig:
    """The `model` entry of a released config.json.

    Attributes:
        encoders: Name of the encoder in the converted model → "encoder/variant", in the order of the config.
        num_frames: Encoder name → number of frames.
        grid: Common grid (t, h, w).
        projector: Key of PROJECTORS.
        fusion: Key of MIXERS.
        llm: Key of LLMS.
    """

    encoders: dict[str, str]
    num_frames: dict[str, int]
    grid: tuple[int, int, int]
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
            "Expected the config.json of a released MERV, with an entry 'model'; got "
            f"{first_few(list(config))}."
        )
    unknown = [key for key in model if key not in NETWORK and not TRAINING.fullmatch(key)]
    missing = [key for key in NETWORK if key not in model and key != "feature_fusion"]
    if unknown or missing:
        raise CheckpointError(
            f"Options of 'model' in config.json: missing {first_few(missing) or 'none'}; unknown "
            f"{first_few(unknown) or 'none'}. Expected: {', '.join(NETWORK)}."
        )
    if model["image_resize_strategy"] != "resize-naive":
        raise _unsupported(
            model, "image_resize_strategy", "only 'resize-naive' is supported, which all released models use."
        )
    ids, counts = list(model["video_backbone_ids"]), model["num_frames"]
    counts = [counts] * len(ids) if isinstance(counts, int) else list(counts)
    if not ids or len(counts) != len(ids) or len(set(ids)) < len(ids):
        raise CheckpointError(
            f"Expected distinct video_backbone_ids and one num_frames for each, got {ids} and {counts}."
        )
    if any(count < 1 or max(counts) % count for count in counts):
        raise _unsupported(
            model,
            "num_frames",
            f"in the release, only divisors of {max(counts)} give exactly this number of frames.",
        )
    architecture = ARCHITECTURE.fullmatch(model["arch_specifier"])
    if architecture is None:
        raise _unsupported(
            model,
            "arch_specifier",
            "expected [no-align+]{avg|3davg[+frameN]}+{linear|gelu-mlp}. merv has no projectors that pool "
            "with parameters.",
        )
    encoders, steps = _find_encoders(ids, counts)
    grid = _grid(model, [step // int(architecture["frames"] or 1) for step in steps])
    llm, fusion = model["llm_backbone_id"], model.get("feature_fusion", GATE)
    if llm not in LLMS:
        reason = UNSUPPORTED_LLMS.get(llm) or nearest(llm, LLMS)
        raise _unsupported(model, "llm_backbone_id", f"{reason} Available: {', '.join(LLMS)}.")
    if fusion not in MIXERS:
        raise _unsupported(model, "feature_fusion", f"Available: {', '.join(map(str, MIXERS))}.")
    if fusion in (None, "first") and len(ids) > 1:
        raise CheckpointError(
            f"Unsupported feature_fusion {fusion!r} with {len(ids)} encoders: the release then uses only the "
            "first encoder, or fails."
        )
    num_frames = dict(zip(encoders, counts, strict=True))
    return ReleasedConfig(encoders, num_frames, grid, architecture["head"], fusion, llm)


def _unsupported(model: Mapping[str, Any], option: str, reason: str) -> CheckpointError:
    return CheckpointError(f"Unsupported {option} {model[option]!r}: {reason.strip()}")


def _find_encoders(ids: list[str], counts: list[int]) -> tuple[dict[str, str], list[int]]:
    """Return the encoders with these ids in the release, and the number of time steps of each."""
    available = {}
    for listing in list_encoders():
        with suppress(BrokenPlugin):  # `merv encoders` reports it
            encoder: Any = listing.load()
            # vars: a subclass (SigLIP2 of SigLIP) must not inherit the names
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


def _grid(model: Mapping[str, Any], steps: list[int]) -> tuple[int, int, int]:
    tokens, length = model["projector_token_length"], model["visual_feature_length"]
    side = math.isqrt(tokens)
    if side * side != tokens or len(set(steps)) > 1 or (len(steps) > 1 and steps[0] * tokens != length):
        raise CheckpointError(
            f"projector_token_length {tokens}, visual_feature_length {length} and the time steps {steps} of "
            "the encoders do not fit. Expected a square number of tokens, the same number of steps for all "
            "encoders, and their product as visual_feature_length."
        )
    return steps[0], side, side


# Tensors ------------------------------------------------------------------------------------


def translate(
    tensors: Mapping[str, Tensor], released: ReleasedConfig
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename the tensors of a checkpoint to those of a Fusion, and with the prefix "llm." of the LLM.

    Tensors that are unknown keep their names.

    Args:
        tensors: Name → tensor, as in the release, such as `projectors.0.projector.projector.weight`.
        released: The configuration.

    Returns:
        The tensors by their new names, and name → reason for those that are left out, by the names of newer
        checkpoints.

    Raises:
        CheckpointError: Two tensors get the same name.
    """
    state = renamed(tensors, RENAMED)
    if len(state) < len(tensors):
        raise CheckpointError(
            "The checkpoint has a part under an old and a new name: feature_fusion and adapter, or "
            "projectors and projector. Expected one of them."
        )
    packed = state.pop("feature_fusion.attention.in_proj_weight", None)
    if packed is not None:  # by torch, if the hidden dimension is that of the language model
        state |= zip(PACKED, packed.chunk(3), strict=True)
    left_out = {
        name: reason for name in state for pattern, reason in UNUSED.items() if re.fullmatch(pattern, name)
    }
    layers = PROJECTORS[released.projector][1].items()
    table = {
        rf"^feature_fusion\.{re.escape(old)}": f"mixer.{new}"
        for old, new in MIXERS[released.fusion][2].items()
    }
    for i, name in enumerate(released.encoders):
        prefix = rf"^projectors\.{i}\.projector\.projector\."
        table |= {prefix + re.escape(old): f"projectors.{name}.{new}" for old, new in layers}
    state = renamed({name: tensor for name, tensor in state.items() if name not in left_out}, table)
    if "mixer.query" in state and "mixer.to_query.bias" in state:  # the bias is that of query, key and value
        state["mixer.to_query.bias"] = state["mixer.to_query.bias"][: state["mixer.query"].shape[1]]
        left_out["feature_fusion.attention.in_proj_bias, its parts for keys and values"] = (
            "the part for keys cancels in the softmax, the output of the part for values is not used"
        )
    return state, left_out


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

"""The schema of config.json: the keys of a saved model, and the values that they may have.

Every config.json is checked before anything is built from it, because a folder may come from anybody. The
schema is written as type annotations: a TypedDict or dataclass lists the keys of an object, and `Annotated`
adds limits. Limits of numbers are far above those of real models, and low enough that no number fills the
memory. Options of mixers and projectors can be any JSON values; the constructor of the class checks them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from merv.encoding.weights import Identity
from merv.errors import CheckpointError, EncoderError, MervError, SamplingError, ShapeError, TrainingError
from merv.utils.suggest import nearest
from merv.video.reader import BACKENDS
from merv.video.sampling import Sampling
from merv.video.transforms import Resample

MAX_CELLS = 2**18  # of the grid: visual tokens of one video; with 1024 channels, 1 GB per encoder
MAX_ENCODERS = 64
MAX_NAMES = 2**12
MAX_DEPTH = 16  # of options of mixers and projectors
MAX_INTEGER = 2**63


@dataclass(frozen=True)
class Limits:
    """The lowest and highest value of a number, or length of a list or an object; both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return " to ".join(f"{limit:.16g}" for limit in dict.fromkeys((self.low, self.high)))


@dataclass(frozen=True)
class Text:
    """What text must look like."""

    pattern: str = r"(?s:.*)"
    what: str = "text"
    max_characters: int = MAX_NAMES


class Invalid(Exception):
    """A value that the schema does not allow."""

    def __init__(self, key: str, fault: str, allowed: str, hint: str = "") -> None:
        self.key, self.fault, self.allowed, self.hint = key, fault, allowed, hint

    def __str__(self) -> str:
        return f"{self.key or 'it'} {self.fault}; expected {self.allowed}.{self.hint}"


# Checking -----------------------------------------------------------------------------------


def check_value(schema: Any, value: Any, key: str, limits: Any = None) -> None:
    """Raise Invalid, with the dotted `key`, if a value is not allowed.

    Args:
        schema: A type. Any means any JSON value. A dataclass means an object with its fields,
            which its constructor accepts.
        value: The value, read from JSON.
        key: Where the value is.
        limits: What `Annotated` adds: `Limits`, `Text`, a function (value, key) that raises Invalid, or the
            narrower types of some fields of a dataclass.

    Example:
        >>> check_value(Sampling, {**vars(Sampling()), "mode": "unifrom"}, "sampling")
        Traceback (most recent call last):
        merv.checkpoints.config_schema.Invalid: sampling.mode is 'unifrom'; expected one of uniform, fps, ...
    """
    kind = get_origin(schema) or schema
    if kind is Annotated:
        schema, limits = get_args(schema)
        check_value(schema, value, key, limits)
    elif kind in (Union, UnionType):
        _check_optional(schema, value, key)
    elif kind is Any:
        _check_json(value, key)
    elif kind is Literal:
        if value not in get_args(schema):
            hint = nearest(value, get_args(schema)) if isinstance(value, str) else ""
            raise wrong(key, value, f"one of {', '.join(get_args(schema))}", hint)
    elif kind is bool:
        if not isinstance(value, bool):
            raise wrong(key, value, "true or false")
    elif kind in (int, float):
        _check_number(kind, value, key, limits)
    elif kind is str:
        _check_text(value, key, limits or Text())
    elif kind in (list, dict):
        _check_items(schema, value, key, limits or Limits(0, MAX_NAMES))
    else:
        _check_keys(kind, value, key, limits)


def _check_optional(schema: Any, value: Any, key: str) -> None:
    (inner,) = (each for each in get_args(schema) if each is not type(None))
    try:
        if value is not None:
            check_value(inner, value, key)
    except Invalid as error:
        if error.key == key:
            error.allowed = f"null or {error.allowed}"
        raise


def _check_number(kind: type, value: Any, key: str, limits: Limits | None) -> None:
    """NaN is never allowed."""
    limits = limits or (Limits(-MAX_INTEGER, MAX_INTEGER) if kind is int else Limits(-1e9, 1e9))
    numeric = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not (numeric and limits.low <= value <= limits.high):
        what = "an integer" if kind is int else "a number"
        raise wrong(key, value, f"{what} from {limits}")


def _check_text(value: Any, key: str, text: Text) -> None:
    """Text can be part of a path: it is valid for the file system, and has no null characters."""
    expected = f"{text.what} of at most {text.max_characters} characters"
    if not isinstance(value, str) or len(value) > text.max_characters or "\0" in value:
        raise wrong(key, value, expected)
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise wrong(key, value, f"{expected}, which can be encoded as UTF-8") from None
    if not re.fullmatch(text.pattern, value):
        raise wrong(key, value, expected)


def _check_items(schema: Any, value: Any, key: str, limits: Limits) -> None:
    kind: Any = get_origin(schema)
    if not (isinstance(value, kind) and limits.low <= len(value) <= limits.high):
        what = f"a list of {limits} values" if kind is list else f"an object with {limits} keys"
        raise wrong(key, value, what)
    for name in value if kind is dict else ():
        check_value(get_args(schema)[0], name, f"a name in {key}")
    for inner, each in _items(value, key):
        check_value(get_args(schema)[-1], each, inner)


def _items(value: Any, key: str) -> list[tuple[str, Any]]:
    """The keys and values of a list or object."""
    if isinstance(value, dict):
        return [(_join(key, name), each) for name, each in value.items()]
    return [(f"{key}[{index}]", each) for index, each in enumerate(value)]


def _check_json(value: Any, key: str, depth: int = MAX_DEPTH) -> None:
    if isinstance(value, (dict, list)):
        if not depth:
            raise wrong(key, value, f"a value that is nested at most {MAX_DEPTH} levels deep")
        for inner, each in _items(value, key):
            _check_json(each, inner, depth - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise wrong(key, value, "a finite number")
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise wrong(key, value, f"a number from -{MAX_INTEGER} to {MAX_INTEGER}")


def _check_keys(cls: type[Any], value: Any, key: str, limits: Any) -> None:
    """An object with exactly the keys of a TypedDict or dataclass."""
    types = get_type_hints(cls, include_extras=True)
    types.update(limits if isinstance(limits, Mapping) else {})
    required = [name for name in types if name in getattr(cls, "__required_keys__", types)]
    if not isinstance(value, dict):
        raise wrong(key, value, f"an object with the keys {', '.join(required)}")
    for name in required:
        if name not in value:
            raise Invalid(_join(key, name), "is missing", "this key")
    for name in value:
        if name not in types:
            key = ascii(_join(key, name[:64]))
            raise Invalid(key, "is an unknown key", f"one of {', '.join(types)}", nearest(name, types))
        check_value(types[name], value[name], _join(key, name))
    if callable(limits):
        limits(value, key)
    if is_dataclass(cls):
        try:
            cls(**value)
        except MervError as error:
            raise Invalid(key, "is invalid", "options that fit together", f" {error}") from error


def wrong(key: str, value: Any, allowed: str, hint: str = "") -> Invalid:
    """The error for a value of the wrong type or size."""
    return Invalid(key, f"is {shown(value)}", allowed, hint)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def shown(value: Any) -> str:
    """A value for a message: abbreviated, and with escaped characters."""
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, list) and (len(value) > 4 or any(isinstance(item, (list, dict)) for item in value)):
        return f"a list of {len(value)} values"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return ascii(value[:64]) + ("…" if len(value) > 64 else "")
    return json.dumps(value, default=repr)[:128]


# config.json --------------------------------------------------------------------------------

Name = Annotated[str, Text(r".+", "a name")]
Hash = Annotated[str, Text(r"[0-9a-f]{64}", "a SHA-256")]
File = Annotated[str, Text(r"(?!/)(?!(.*/)?\.\.(/|$)).+", "the path of a file in the folder")]
Count = Annotated[int, Limits(1, MAX_CELLS)]
Frames = Annotated[int, Limits(1, 2**12)]  # that an encoder gets of one video; of 224×224 pixels, 2.5 GB
Dtype = Literal["float32", "bfloat16", "float16", "float64"]  # of encoders, fusion and LLM
FLOATING_POINT = get_args(Dtype)

EncoderConfig = TypedDict(
    "EncoderConfig",
    {
        "class": Name,
        "variant": Name,
        "preset": Name,
        "dtype": Dtype,
        "identity": Annotated[Identity, {"sha256": Hash}],
    },
)


class FusionConfig(TypedDict, total=False):
    """The keys that a MultiEncoder has if and only if its `output_dim` is not null."""

    mixer: Name
    mixer_options: dict[str, Any]
    projector: Name
    projector_options: dict[str, Any]
    norm: bool


class MultiEncoderConfig(FusionConfig):
    """The config of a MultiEncoder."""

    grid: Annotated[list[Count], Limits(3, 3)] | None
    output_dim: Annotated[int, Limits(1, 2**16)] | None  # the largest language models have 2**14
    fusion_dtype: Dtype
    align: Literal["area", "released"]
    num_frames: Annotated[dict[str, Frames], Limits(0, MAX_ENCODERS)]
    backend: Literal[tuple(BACKENDS)]  # type: ignore[valid-type]
    resample: Resample
    sampling: Annotated[Sampling, {"total": Count}]
    encoders: Annotated[dict[str, EncoderConfig], Limits(1, MAX_ENCODERS)]


def _check_fusion(config: dict[str, Any], key: str) -> None:
    grid = config["grid"]
    if grid is None and config["output_dim"] is not None:
        raise wrong(_join(key, "grid"), grid, "three integers, because output_dim is not null")
    if grid is not None and math.prod(grid) > MAX_CELLS:
        raise wrong(_join(key, "grid"), config["grid"], f"at most {MAX_CELLS} cells")
    for name in FusionConfig.__annotations__:
        if (name in config) != (config["output_dim"] is not None):
            if name in config:
                raise Invalid(
                    _join(key, name), "is an unknown key", "no such key, because output_dim is null"
                )
            raise Invalid(_join(key, name), "is missing", "this key, because output_dim is not null")


class LLMConfig(TypedDict):
    """The language model of a VideoLLM."""

    source: str
    quantize: Literal["nf4", "int8"] | None
    hashed_dtype: Dtype
    sha256: Hash
    sha256_bfloat16: Hash
    sha256_without_linears: Hash
    dtype: Dtype


class TokenizerConfig(TypedDict):
    """The tokenizer of a VideoLLM."""

    sha256: Hash
    chat_template: Annotated[str, Text(what="a chat template", max_characters=2**20)] | None
    chat_template_kwargs: dict[str, Any]
    end_token: str


class LoraConfig(TypedDict):
    """The fields of merv.models.llm.LoraOptions."""

    r: Annotated[int, Limits(1, 2**13)]
    lora_alpha: Annotated[float, Limits(0, MAX_INTEGER)]
    target_modules: Annotated[list[Name], Limits(1, MAX_NAMES)]
    lora_dropout: Annotated[float, Limits(0, 1)]


class VideoLLMConfig(TypedDict):
    """The config of a VideoLLM."""

    llm: LLMConfig
    tokenizer: TokenizerConfig
    lora: LoraConfig | None
    trained: list[Name]
    modified_parts: list[Name]
    vision: Annotated[MultiEncoderConfig, _check_fusion]


HEADER: dict[str, Any] = {  # of the folder, not of the model
    "model_type": Literal["merv"],
    "sha256": dict[File, Hash],
    "config_sha256": Hash,
}
KINDS: dict[str, Any] = {
    "MultiEncoder": Annotated[MultiEncoderConfig, _check_fusion],
    "VideoLLM": VideoLLMConfig,
}


def check_config(kind: Any, config: Any, where: str | Path) -> None:
    """Check the config of a saved model.

    Args:
        kind: The class that loads it.
        config: What its `config()` returned, read from JSON.
        where: The file, for the message.

    Raises:
        CheckpointError: A key is missing or unknown, or has a value that is not allowed. The message names
            the file, the key, what it is and what is allowed.

    Example:
        >>> check_config("MultiEncoder", {}, "config.json")
        Traceback (most recent call last):
        merv.errors.CheckpointError: config.json: grid is missing; expected this key. Save ...
    """
    check(Literal[tuple(KINDS)], kind, where, "kind")
    check(KINDS[kind], config, where)


@contextmanager
def invalid_config(where: str | Path, *also: type[MervError]) -> Iterator[None]:
    """Turn errors about the options of a part into a CheckpointError that names the file `where`.

    `also` are further errors of merv to turn into one.
    """
    errors: tuple[type[MervError], ...] = (EncoderError, SamplingError, ShapeError, TrainingError, *also)
    try:
        yield
    except errors as error:
        raise CheckpointError(f"{where} describes a model that cannot be created: {error}") from error


def check(schema: Any, value: Any, where: str | Path, key: str = "") -> None:
    """Raise CheckpointError if a value of the file `where` is not allowed."""
    try:
        check_value(schema, value, key)
    except Invalid as error:
        raise CheckpointError(f"{where}: {error} Save the model again, or correct the file.") from error

"""The schema of config.json: the keys of a saved model, and the values that they may have.

Every config.json is checked before anything is built from it, because a folder may come from anybody. Limits
of numbers are far above those of real models, and low enough that no number fills the memory. Options of
mixers and projectors can be any JSON values; the constructor of the class checks them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from merv.encoding.weights import Identity
from merv.errors import CheckpointError, EncoderError, MervError, SamplingError, ShapeError, TrainingError
from merv.utils.suggest import nearest
from merv.video.reader import BACKENDS
from merv.video.sampling import Sampling
from merv.video.transforms import Resample

MAX_CELLS = 2**18  # of the grid: visual tokens of one video; with 1024 channels, 1 GB per encoder
MAX_FRAMES = 2**12  # that an encoder gets of one video; of 224×224 pixels, 2.5 GB
MAX_DIM = 2**16  # of tokens; the largest language models have 2**14
MAX_RANK = 2**13  # of a LoRA
MAX_ENCODERS = 64
MAX_NAMES = 2**12
MAX_CHARACTERS = 2**20
MAX_DEPTH = 16  # of options of mixers and projectors
MAX_INTEGER = 2**63
FLOATING_POINT = ("float32", "bfloat16", "float16", "float64")  # dtypes of encoders, fusion and LLM


class Invalid(Exception):
    """A value that its rule does not allow."""

    def __init__(self, key: str, fault: str, allowed: str, hint: str = "") -> None:
        self.key, self.fault, self.allowed, self.hint = key, fault, allowed, hint
        super().__init__(f"{key or 'it'} {fault}; expected {allowed}.{hint}")


def wrong(key: str, value: Any, allowed: str, hint: str = "") -> Invalid:
    """The error for a value of the wrong type or size."""
    return Invalid(key, f"is {shown(value)}", allowed, hint)


class Rule(Protocol):
    """What a value may be."""

    def check(self, value: Any, key: str) -> None:
        """Raise Invalid, with the dotted `key`, if the value is not allowed."""


# Rules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def check(self, value: Any, key: str) -> None:
        if not (isinstance(value, str) and value in self.names):
            hint = nearest(value, self.names) if isinstance(value, str) else ""
            raise wrong(key, value, f"one of {', '.join(self.names)}", hint)


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, bool):
            raise wrong(key, value, "true or false")


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, both included. NaN is never allowed."""

    low: float
    high: float
    integer: bool = False

    def check(self, value: Any, key: str) -> None:
        numeric = isinstance(value, int if self.integer else (int, float)) and not isinstance(value, bool)
        if not (numeric and self.low <= value <= self.high):
            kind = "an integer" if self.integer else "a number"
            raise wrong(key, value, f"{kind} from {self.low:.16g} to {self.high:.16g}")


@dataclass(frozen=True)
class Text:
    """Text that can be part of a path: valid for the file system, and without null characters."""

    pattern: str = r"(?s:.*)"
    what: str = "text"
    max_characters: int = MAX_NAMES

    def check(self, value: Any, key: str) -> None:
        expected = f"{self.what} of at most {self.max_characters} characters"
        if not isinstance(value, str) or len(value) > self.max_characters or "\0" in value:
            raise wrong(key, value, expected)
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            raise wrong(key, value, f"{expected}, which can be encoded as UTF-8") from None
        if not re.fullmatch(self.pattern, value):
            raise wrong(key, value, expected)


@dataclass(frozen=True)
class Optional:
    """Null, or what another rule allows."""

    rule: Rule

    def check(self, value: Any, key: str) -> None:
        if value is not None:
            try:
                self.rule.check(value, key)
            except Invalid as error:
                allowed = f"null or {error.allowed}" if error.key == key else error.allowed
                raise Invalid(error.key, error.fault, allowed, error.hint) from None


@dataclass(frozen=True)
class ListOf:
    """A list of `low` to `high` values."""

    rule: Rule
    low: int = 0
    high: int = MAX_NAMES

    def check(self, value: Any, key: str) -> None:
        if not (isinstance(value, list) and self.low <= len(value) <= self.high):
            count = str(self.low) if self.low == self.high else f"{self.low} to {self.high}"
            raise wrong(key, value, f"a list of {count} values")
        for index, item in enumerate(value):
            self.rule.check(item, f"{key}[{index}]")


@dataclass(frozen=True)
class MapOf:
    """An object whose keys are names."""

    rule: Rule
    low: int = 0
    high: int = MAX_NAMES
    names: Rule = Text()

    def check(self, value: Any, key: str) -> None:
        if not (isinstance(value, dict) and self.low <= len(value) <= self.high):
            raise wrong(key, value, f"an object with {self.low} to {self.high} keys")
        for name, item in value.items():
            self.names.check(name, f"a name in {key}")
            self.rule.check(item, _join(key, name))


@dataclass(frozen=True)
class Json:
    """Any JSON value that is not nested deeply and has finite numbers."""

    depth: int = MAX_DEPTH

    def check(self, value: Any, key: str) -> None:
        if isinstance(value, (dict, list)):
            if not self.depth:
                raise wrong(key, value, f"a value that is nested at most {MAX_DEPTH} levels deep")
            container: Any = MapOf if isinstance(value, dict) else ListOf
            container(Json(self.depth - 1)).check(value, key)
        elif isinstance(value, str):
            Text(max_characters=MAX_CHARACTERS).check(value, key)
        elif not isinstance(value, (bool, type(None))):
            Number(-sys.float_info.max, sys.float_info.max).check(value, key)


@dataclass(frozen=True)
class Record:
    """An object with exactly these keys.

    Attributes:
        rules: Key → rule of its value.
        more: Keys that are required unless the value of `unless_null` is null, and not allowed otherwise.
        unless_null: One of the keys of `rules`.
        also: Checks the whole value, after its keys. It raises Invalid or an error of merv.
    """

    rules: Mapping[str, Rule]
    more: Mapping[str, Rule] = field(default_factory=dict)
    unless_null: str = ""
    also: Callable[[dict[str, Any], str], object] | None = None

    def check(self, value: Any, key: str) -> None:
        if not isinstance(value, dict):
            raise wrong(key, value, f"an object with the keys {', '.join(self.rules)}")
        for name in self.rules:
            if name not in value:
                raise Invalid(_join(key, name), "is missing", "this key")
        more = self.more if value.get(self.unless_null) is not None else {}
        rules = {**self.rules, **more}
        for name in value:
            if name not in rules:
                key = ascii(_join(key, name[:64]))
                raise Invalid(key, "is an unknown key", f"one of {', '.join(rules)}", nearest(name, rules))
        for name, rule in rules.items():
            if name not in value:
                raise Invalid(_join(key, name), "is missing", f"this key, because of {self.unless_null}")
            rule.check(value[name], _join(key, name))
        if self.also is not None:
            try:
                self.also(value, key)
            except MervError as error:
                raise Invalid(key, "is invalid", "options that fit together", f" {error}") from error


def options_of(cls: type, **rules: Rule) -> Record:
    """The rule of a dataclass whose fields are saved: types from its annotations, values by its constructor.

    >>> options_of(Sampling, total=FRAMES).check({**vars(Sampling()), "mode": "unifrom"}, "sampling")
    Traceback (most recent call last):
    merv.checkpoints.config_schema.Invalid: sampling.mode is 'unifrom'; expected one of uniform, fps, ...
    """
    hints = get_type_hints(cls)
    types = {each.name: _rule_of(hints[each.name]) for each in fields(cls)}
    return Record({**types, **rules}, also=lambda value, _: cls(**value))


def _rule_of(annotation: Any) -> Rule:
    """The rule of an annotation."""
    if get_origin(annotation) in (Union, UnionType):
        (inner,) = (each for each in get_args(annotation) if each is not type(None))
        return Optional(_rule_of(inner))
    if get_origin(annotation) is Literal:
        return Choice(get_args(annotation))
    types: dict[Any, Rule] = {
        str: Text(),
        bool: Flag(),
        int: Number(-MAX_INTEGER, MAX_INTEGER, integer=True),
        float: Number(-1e9, 1e9),
    }
    return types[annotation]


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

NAME, HASH = Text(r".+", "a name"), Text(r"[0-9a-f]{64}", "a SHA-256")
COUNT, FRAMES = Number(1, MAX_CELLS, integer=True), Number(1, MAX_FRAMES, integer=True)
DTYPE = Choice(FLOATING_POINT)
FILE = Text(r"(?!/)(?!(.*/)?\.\.(/|$)).+", "the path of a file in the folder")


def _check_cells(config: dict[str, Any], key: str) -> None:
    t, h, w = config["grid"]
    if t * h * w > MAX_CELLS:
        raise wrong(_join(key, "grid"), config["grid"], f"at most {MAX_CELLS} cells")


ENCODER = Record(
    {
        "class": NAME,
        "variant": NAME,
        "preset": NAME,
        "dtype": DTYPE,
        "identity": options_of(Identity, sha256=HASH),
    }
)
MULTI_ENCODER = Record(
    {
        "grid": ListOf(COUNT, 3, 3),
        "output_dim": Optional(Number(1, MAX_DIM, integer=True)),
        "fusion_dtype": DTYPE,
        "align": Choice(("area", "released")),
        "num_frames": MapOf(FRAMES, high=MAX_ENCODERS),
        "backend": Choice(tuple(BACKENDS)),
        "resample": Choice(get_args(Resample)),
        "sampling": options_of(Sampling, total=COUNT),
        "encoders": MapOf(ENCODER, 1, MAX_ENCODERS),
    },
    more={
        "mixer": NAME,
        "mixer_options": MapOf(Json()),
        "projector": NAME,
        "projector_options": MapOf(Json()),
        "norm": Flag(),
    },
    unless_null="output_dim",
    also=_check_cells,
)
LLM = Record(
    {
        "source": Text(),
        "quantize": Optional(Choice(("nf4", "int8"))),
        "hashed_dtype": DTYPE,
        "sha256": HASH,
        "sha256_bfloat16": HASH,
        "sha256_without_linears": HASH,
        "dtype": DTYPE,
    }
)
TEMPLATE = Text(what="a chat template", max_characters=MAX_CHARACTERS)
TOKENIZER = Record(
    {
        "sha256": HASH,
        "chat_template": Optional(TEMPLATE),
        "chat_template_kwargs": MapOf(Json()),
        "end_token": Text(),
    }
)
LORA = Record(  # the fields of merv.models.llm.LoraOptions
    {
        "r": Number(1, MAX_RANK, integer=True),
        "lora_alpha": Number(0, MAX_INTEGER),
        "target_modules": ListOf(NAME, 1),
        "lora_dropout": Number(0, 1),
    }
)
VIDEO_LLM = Record(
    {
        "llm": LLM,
        "tokenizer": TOKENIZER,
        "lora": Optional(LORA),
        "trained": ListOf(NAME),
        "modified_parts": ListOf(NAME),
        "vision": MULTI_ENCODER,
    }
)
HEADER: dict[str, Rule] = {  # of the folder, not of the model
    "model_type": Choice(("merv",)),
    "sha256": MapOf(HASH, names=FILE),
    "config_sha256": HASH,
}
KINDS: dict[str, Rule] = {"MultiEncoder": MULTI_ENCODER, "VideoLLM": VIDEO_LLM}


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
    check(Choice(tuple(KINDS)), kind, where, "kind")
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


def check(rule: Rule, value: Any, where: str | Path, key: str = "") -> None:
    """Raise CheckpointError if a value of the file `where` is not allowed."""
    try:
        rule.check(value, key)
    except Invalid as error:
        raise CheckpointError(f"{where}: {error} Save the model again, or correct the file.") from error

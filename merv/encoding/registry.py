"""Encoders by name; how they are registered and found is in `merv.utils.plugins`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merv.errors import EncoderError
from merv.utils.plugins import Fault, Plugin, Registry

if TYPE_CHECKING:
    from merv.encoding.base import Encoder


def _contract() -> tuple[type, Fault]:
    from merv.encoding.base import Encoder, class_fault

    return Encoder, class_fault


ENCODERS = Registry("encoder", "merv.encoders", _contract)


def list_encoders() -> list[Plugin]:
    """All registered encoders, by name, without importing any.

    >>> [e.value for e in list_encoders() if e.full_name == "merv:fake"]
    ['merv.encoders.fake:Fake']
    """
    return ENCODERS.plugins()


def find_encoder(name: str) -> type[Encoder]:
    """The encoder class of that name: `name`, `distribution:name` or `module:Class`.

    Raises UnknownPlugin, AmbiguousPlugin, BrokenPlugin.

    >>> find_encoder("fake").__name__
    'Fake'
    """
    return ENCODERS.load(name)


def name_and_variant(typed: str) -> tuple[str, str | None]:
    """The two parts of "dinov2/base"; no variant where there is no slash.

    Raises EncoderError for a slash without a variant.

    >>> name_and_variant("dinov2/base"), name_and_variant("my_module:MyEncoder")
    (('dinov2', 'base'), ('my_module:MyEncoder', None))
    """
    if typed.partition(":")[0].endswith(".py"):  # a file, whose path has slashes of its own
        return typed, None
    name, slash, variant = typed.partition("/")
    if slash and not variant:
        raise EncoderError(f"No variant after the / of {typed!r}. Type {name!r} for the default.")
    return name, variant or None


def create_encoder(name: str, **options: Any) -> Encoder:
    """An encoder, ready to use; `name` may carry a variant, as in "dinov2/base".

    options: those of `Encoder`: variant, weights, preset.

    Raises UnknownPlugin, AmbiguousPlugin, BrokenPlugin, PluginError for an option that it does not have,
    and what the encoder raises.

    >>> create_encoder("fake", weights=None).training
    False
    """
    name, variant = name_and_variant(name)
    if variant:
        if options.get("variant") not in (None, variant):
            raise EncoderError(
                f"Two variants of {name!r}: {variant!r} in its name and {options['variant']!r}. Give one."
            )
        options["variant"] = variant
    return ENCODERS.create(name, **options)

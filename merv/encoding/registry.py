"""Create encoders by name. `merv.utils.plugins` describes how plug-ins are registered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merv.errors import EncoderError
from merv.utils.plugins import Plugin, Registry

if TYPE_CHECKING:
    from merv.encoding.base import Encoder


ENCODERS = Registry("encoder", "merv.encoders", "merv.encoding.base:Encoder")


def list_encoders() -> list[Plugin]:
    """List all registered encoders without importing them.

    Returns:
        The plug-ins, sorted by name. Each has the fields `name`, `distribution`, `version` and `value`
        ("module:Class").

    Example:
        >>> [e.value for e in list_encoders() if e.full_name == "merv:fake"]
        ['merv.encoders.fake:Fake']
    """
    return ENCODERS.plugins()


def find_encoder(name: str) -> type[Encoder]:
    """Import the class of an encoder.

    Args:
        name: `name`, `distribution:name` or `module:Class`.

    Returns:
        The class, a subclass of `merv.Encoder`.

    Raises:
        UnknownPlugin: No encoder has this name.
        AmbiguousPlugin: Several distributions register this name.
        BrokenPlugin: The class cannot be imported, or is not a valid encoder.

    Example:
        >>> find_encoder("fake").__name__
        'Fake'
    """
    return ENCODERS.load(name)


def name_and_variant(text: str, variant: str | None = None) -> tuple[str, str | None]:
    """Split "dinov2/base" into name and variant; without a slash, it is the variant that is passed.

    Raises EncoderError if the variant after the slash is empty, or is not the one that is passed, or if the
    text is the path of a file.

    >>> name_and_variant("dinov2/base"), name_and_variant("my_module:MyEncoder")
    (('dinov2', 'base'), ('my_module:MyEncoder', None))
    """
    if text.partition(":")[0].endswith(".py"):
        raise EncoderError(
            f"{text!r} is a file. Use module:Class, and run merv from the folder of the module."
        )
    name, slash, in_text = text.partition("/")
    if slash and not in_text:
        raise EncoderError(f"{text!r} has no variant after the slash. Use {name!r} for the default variant.")
    if in_text and variant not in (None, in_text):
        raise EncoderError(
            f"Two variants of {name!r}: {in_text!r} in the name and variant={variant!r}. Use one of them."
        )
    return name, in_text or variant


def create_encoder(name: str, **options: Any) -> Encoder:
    """Create an encoder with its weights, frozen and ready to use.

    Args:
        name: Name of the encoder, as in `find_encoder`, with or without a variant: "dinov2", "dinov2/base".
        **options: Arguments of `Encoder`: variant, weights, preset.

    Returns:
        The encoder in eval mode, with weights in float32.

    Raises:
        UnknownPlugin: No encoder has this name.
        AmbiguousPlugin: Several distributions register this name.
        BrokenPlugin: The encoder cannot be imported or created.
        PluginError: The encoder does not accept one of the options.
        EncoderError: The encoder does not have this variant or preset.
        WeightsError: The weights cannot be loaded, or do not fit.

    Example:
        >>> create_encoder("fake", weights=None).training
        False
    """
    name, variant = name_and_variant(name, options.get("variant"))
    if variant is not None:
        options["variant"] = variant
    return ENCODERS.create(name, **options)

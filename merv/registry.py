"""Registry: encoders by name, from entry points of any installed distribution.

A plug-in is registered in the group `merv.encoders` of its pyproject.toml:

    [project.entry-points."merv.encoders"]
    histogram = "my_package.histogram:Histogram"

Entry points are read anew on each call, and nothing is imported before it is used.
The idea of listing without importing is pluggy's and pytest's.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from merv.errors import AmbiguousEncoder, BrokenEncoder, EncoderError, MervError, UnknownEncoder
from merv.suggest import nearest

if TYPE_CHECKING:
    from merv.encode import Encoder

GROUP = "merv.encoders"


@dataclass(frozen=True)
class Listing:
    """One registered encoder, before anything of it is imported.

    name: what is typed; distribution, version: who registered it (both empty for
    `module:Class`, which nobody did); value: where it is, as "module:Class".
    """

    name: str
    distribution: str
    version: str
    value: str

    @property
    def full_name(self) -> str:
        """What can be typed where `name` alone is ambiguous."""
        return f"{self.distribution}:{self.name}" if self.distribution else self.value

    def load(self) -> type[Encoder]:
        """Import the class and check it. Raises BrokenEncoder, from the cause."""
        try:
            loaded = EntryPoint(self.name, self.value, GROUP).load()
        except (Exception, SystemExit) as error:  # whatever a stranger's module does when imported
            raise self.broken(f"cannot be imported: {type(error).__name__}: {error}") from error
        if fault := _fault(loaded):
            raise self.broken(fault)
        return loaded

    def broken(self, fault: str) -> BrokenEncoder:
        """The error that says whose encoder has the `fault`."""
        owner = f" of {self.distribution} {self.version}" if self.distribution else ""
        return BrokenEncoder(
            f"Encoder {self.name!r}{owner} ({self.value}) {fault}. "
            "Other encoders are not affected; see `merv encoders`."
        )


def list_encoders() -> list[Listing]:
    """All registered encoders, by name, without importing any.

    >>> [e.value for e in list_encoders() if e.full_name == "merv:fake"]
    ['merv.encoders.fake:Fake']
    """
    found = [_listing(entry) for entry in entry_points(group=GROUP)]
    return sorted(found, key=lambda e: (e.name, e.distribution))


def find_listing(name: str) -> Listing:
    """The one encoder that `name`, `distribution:name` or `module:Class` means.

    Raises UnknownEncoder, AmbiguousEncoder.

    >>> find_listing("merv:fake").name
    'fake'
    """
    owner, _, short = name.rpartition(":")
    known = list_encoders()
    found = [e for e in known if e.name == short and (not owner or _same(owner, e.distribution))]
    if len(found) == 1:
        return found[0]
    if found:
        owners = " and ".join(f"{e.distribution} {e.version}" for e in found)
        full_names = " or ".join(repr(e.full_name) for e in found)
        raise AmbiguousEncoder(f"Encoder {name!r} is registered by {owners}. Type {full_names}.")
    if owner and _is_module(owner):
        return Listing(short, "", "", name)
    names = list(dict.fromkeys(e.name for e in known))
    guess = nearest(name, names + [e.full_name for e in known])
    raise UnknownEncoder(
        f"Unknown encoder {name!r}.{guess} Installed: {', '.join(names) or 'none'}. See `merv encoders`."
    )


def find_encoder(name: str) -> type[Encoder]:
    """The encoder class of that name: `name`, `distribution:name` or `module:Class`.

    Raises UnknownEncoder, AmbiguousEncoder, BrokenEncoder.

    >>> find_encoder("fake").__name__
    'Fake'
    """
    return find_listing(name).load()


def create_encoder(name: str, **kwargs: Any) -> Encoder:
    """An encoder, ready to use; `name` may carry a variant, as in "dinov2/base".

    kwargs: those of `Encoder`: variant, weights, preset.

    Raises UnknownEncoder, AmbiguousEncoder, BrokenEncoder, and what the encoder raises.

    >>> create_encoder("fake", weights=None).training
    False
    """
    name, _, variant = name.partition("/")
    if variant:
        if kwargs.get("variant", variant) != variant:
            raise EncoderError(
                f"Two variants of {name!r}: {variant!r} in its name and {kwargs['variant']!r}. Give one."
            )
        kwargs["variant"] = variant
    listing = find_listing(name)
    encoder = listing.load()
    try:
        return encoder(**kwargs)
    except MervError:
        raise
    except Exception as error:
        raise listing.broken(f"cannot be created: {type(error).__name__}: {error}") from error


def _listing(entry: EntryPoint) -> Listing:
    dist = entry.dist
    return Listing(entry.name, dist.name if dist else "", dist.version if dist else "", entry.value)


def _fault(loaded: object) -> str | None:
    """What keeps `loaded` from being an encoder class, in words."""
    from merv.encode import Encoder
    from merv.types import EncoderSpec

    if not (isinstance(loaded, type) and issubclass(loaded, Encoder)):
        return f"is {loaded!r}; wanted a subclass of merv.Encoder"
    variants = getattr(loaded, "variants", None)
    if not (variants and isinstance(variants, dict)):
        return f"has variants = {variants!r}; wanted a dict of name → merv.EncoderSpec, the default first"
    strange = [name for name, spec in variants.items() if not isinstance(spec, EncoderSpec)]
    return f"declares {strange[0]!r} as no merv.EncoderSpec" if strange else None


def _same(one: str, other: str) -> bool:
    """Whether two spellings name one distribution (PEP 503)."""
    return _normal(one) == _normal(other)


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _is_module(path: str) -> bool:
    """Whether the outermost package of a dotted path exists; imports nothing."""
    top = path.partition(".")[0]
    return bool(top) and (top in sys.modules or find_spec(top) is not None)

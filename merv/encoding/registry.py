"""Registry: encoders by name, from entry points of any installed distribution.

A plug-in is registered in the group `merv.encoders` of its pyproject.toml:

    [project.entry-points."merv.encoders"]
    histogram = "my_package.histogram:Histogram"

Entry points are read anew on each call, and nothing is imported before it is used. What a stranger's
module does when it is imported is caught and said with the name of its distribution; only a crash of
the interpreter cannot be. The idea of listing without importing is pluggy's and pytest's.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from importlib.util import find_spec
from itertools import chain
from operator import attrgetter
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from merv.errors import AmbiguousEncoder, BrokenEncoder, EncoderError, MervError, UnknownEncoder
from merv.utils.suggest import nearest

if TYPE_CHECKING:
    from merv.encoding.base import Encoder

GROUP = "merv.encoders"
SLOW_S = 3.0  # an import that takes longer is reported

logger = logging.getLogger(__name__)


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
        """Import the class and check it; a warning is logged if that takes longer than SLOW_S.

        Raises BrokenEncoder, from the cause.
        """
        from merv.encoding.base import class_fault  # first, so that only the plug-in's own import is timed

        if not EntryPoint.pattern.match(self.value):
            raise self.broken('is no path to a class; wanted "module:Class"')
        start = time.perf_counter()
        try:
            loaded = EntryPoint(self.name, self.value, GROUP).load()
        except KeyboardInterrupt:  # the user's, as far as anyone can tell
            raise
        except BaseException as error:  # SystemExit too: whatever a stranger's module does when imported
            raise self.broken(f"cannot be imported: {type(error).__name__}: {error}") from error
        took_s = time.perf_counter() - start
        if took_s > SLOW_S:
            logger.warning(
                "%s took %.1f s to import; wanted: under %g s. What is heavy belongs into build(): tell its "
                "author.",
                self,
                took_s,
                SLOW_S,
            )
        if fault := class_fault(loaded):
            raise self.broken(fault)
        return loaded

    def __str__(self) -> str:
        owner = f" of {self.distribution} {self.version}" if self.distribution else ""
        return f"Encoder {self.name!r}{owner} ({self.value})"

    def broken(self, fault: str) -> BrokenEncoder:
        """The error that says whose encoder has the `fault`."""
        return BrokenEncoder(f"{self} {fault}. Other encoders are not affected; see `merv encoders`.")


def list_encoders() -> list[Listing]:
    """All registered encoders, by name, without importing any.

    >>> [e.value for e in list_encoders() if e.full_name == "merv:fake"]
    ['merv.encoders.fake:Fake']
    """
    found: dict[str, list[Listing]] = {}
    for distribution in distributions():  # entry_points() would fail as a whole where one is damaged
        try:
            listings = _listings(distribution)
        except Exception as error:
            logger.warning("%s cannot be read, its encoders are not listed: %r", _place(distribution), error)
            continue
        if listings:  # of two copies the first on the path is the one that would be imported
            found.setdefault(_normal(listings[0].distribution), listings)
    return sorted(chain.from_iterable(found.values()), key=lambda e: (e.name, e.distribution))


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
    module, _, attribute = name.rpartition(".")
    if owner:
        guess += f" No distribution has it, and no module {owner!r} can be imported from here."
    elif _is_module(module):
        guess += f" A class goes by module:Class: '{module}:{attribute}'."
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


def name_and_variant(typed: str) -> tuple[str, str | None]:
    """The two parts of "dinov2/base"; no variant where there is no slash.

    Raises EncoderError for a slash without a variant, UnknownEncoder for the path of a file.

    >>> name_and_variant("dinov2/base"), name_and_variant("my_module:MyEncoder")
    (('dinov2', 'base'), ('my_module:MyEncoder', None))
    """
    path, _, attribute = typed.partition(":")
    if path.endswith(".py"):
        raise UnknownEncoder(
            f"{typed!r} is a file; wanted module:Class, as '{PurePath(path).stem}:{attribute or 'Class'}', "
            "from where that module can be imported: its folder, say."
        )
    name, slash, variant = typed.partition("/")
    if slash and not variant:
        raise EncoderError(f"No variant after the / of {typed!r}. Type {name!r} for the default.")
    return name, variant or None


def is_trusted(path: str) -> bool:
    """Whether the class `module:Class` may be loaded because a file says so: registered, or imported already.

    To import whatever a file names would let it run code, even code that lies beside it.

    >>> is_trusted("merv.encoders.fake:Fake"), is_trusted("antigravity:geohash")
    (True, False)
    """
    module, _, name = path.partition(":")
    with suppress(KeyError, AttributeError):
        return attrgetter(name)(sys.modules[module]) is not None
    listings = list_encoders()
    if any(listing.value == path for listing in listings):
        return True
    for listing in listings:  # a plug-in may register its class by another path than where it is defined
        if re.split("[.:]", listing.value)[0] == re.split("[.:]", path)[0]:
            with suppress(BrokenEncoder):
                found = listing.load()
                if f"{found.__module__}:{found.__qualname__}" == path:
                    return True
    return False


def create_encoder(name: str, **kwargs: Any) -> Encoder:
    """An encoder, ready to use; `name` may carry a variant, as in "dinov2/base".

    kwargs: those of `Encoder`: variant, weights, preset.

    Raises UnknownEncoder, AmbiguousEncoder, BrokenEncoder, and what the encoder raises.

    >>> create_encoder("fake", weights=None).training
    False
    """
    name, variant = name_and_variant(name)
    if variant:
        if kwargs.get("variant") not in (None, variant):
            raise EncoderError(
                f"Two variants of {name!r}: {variant!r} in its name and {kwargs['variant']!r}. Give one."
            )
        kwargs["variant"] = variant
    listing = find_listing(name)
    encoder = listing.load()
    _check_options(name, encoder, kwargs)
    try:
        return encoder(**kwargs)
    except MervError:
        raise
    except (Exception, SystemExit) as error:
        raise listing.broken(f"cannot be created: {type(error).__name__}: {error}") from error


def _check_options(name: str, encoder: type[Encoder], options: dict[str, Any]) -> None:
    """Raise EncoderError, not BrokenEncoder, for options that neither encoders as such have nor this one."""
    from merv.encoding.base import Encoder

    own = inspect.signature(encoder).parameters
    known = [*inspect.signature(Encoder).parameters, *own]
    wrong = [option for option in options if option not in known]
    if wrong and not any(parameter.kind == parameter.VAR_KEYWORD for parameter in own.values()):
        raise EncoderError(
            f"Encoder {name!r} has no option {wrong[0]!r}. It has: {', '.join(dict.fromkeys(known))}."
        )


def _listings(distribution: Distribution) -> list[Listing]:
    if GROUP not in (distribution.read_text("entry_points.txt") or ""):
        return []
    name, version = distribution.metadata["Name"], distribution.metadata["Version"]
    if not (name and version):
        raise ValueError("its METADATA has no name or no version")
    listings = []
    for entry in distribution.entry_points:
        if entry.group == GROUP and re.search("[/:]", entry.name):
            logger.warning(
                "Encoder %r of %s %s is not listed: / and : cannot be in a name. They stand before a variant "
                "and after a distribution: tell its author.",
                entry.name,
                name,
                version,
            )
        elif entry.group == GROUP:
            listings.append(Listing(entry.name, name, version, entry.value))
    return listings


def _place(distribution: Distribution) -> str:
    """Where its metadata is; a damaged one may not know its own name."""
    return str(getattr(distribution, "_path", distribution))


def _same(one: str, other: str) -> bool:
    """Whether two spellings name one distribution (PEP 503)."""
    return _normal(one) == _normal(other)


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _is_module(path: str) -> bool:
    """Whether the outermost package of a dotted path exists; imports nothing."""
    top = path.partition(".")[0]
    return bool(top) and (top in sys.modules or find_spec(top) is not None)

"""Plug-ins by name: one registry for each kind, filled from entry points of any installed distribution.

A plug-in is registered in the group of its kind in its pyproject.toml:

    [project.entry-points."merv.encoders"]
    histogram = "my_package.histogram:Histogram"

Entry points are read anew on each call, and nothing is imported before it is used. What the module of a
plug-in does when it is imported is caught and reported with the name of its distribution; only a crash of
the interpreter cannot be. The idea of listing without importing is pluggy's and pytest's.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, distributions
from importlib.util import find_spec
from itertools import chain
from operator import attrgetter
from pathlib import PurePath
from typing import Any

from merv.errors import AmbiguousPlugin, BrokenPlugin, MervError, PluginError, UnknownPlugin
from merv.utils.suggest import nearest

SLOW_S = 3.0  # an import that takes longer is reported

logger = logging.getLogger(__name__)

Fault = Callable[[object], "str | None"]  # what keeps an object from being a class of its kind, in words


@dataclass(frozen=True)
class Registry:
    """The plug-ins of one kind.

    kind: what one is called, in messages. group: of its entry points. contract: gives the base class of
    the kind, and what checks a class; imported on use, so that listing needs no torch.
    """

    kind: str
    group: str
    contract: Callable[[], tuple[type, Fault]]

    def plugins(self) -> list[Plugin]:
        """All registered plug-ins of this kind, by name, without importing any."""
        found: dict[str, list[Plugin]] = {}
        for distribution in distributions():  # entry_points() would fail as a whole where one is damaged
            try:
                plugins = self._plugins_of(distribution)
            except Exception as error:
                where = getattr(distribution, "_path", distribution)  # it may not know its own name
                logger.warning("%s cannot be read, its %ss are not listed: %r", where, self.kind, error)
                continue
            if plugins:  # of two copies the first on the path is the one that would be imported
                found.setdefault(_normal(plugins[0].distribution), plugins)
        return sorted(chain.from_iterable(found.values()), key=lambda p: (p.name, p.distribution))

    def find(self, name: str) -> Plugin:
        """The one plug-in that `name`, `distribution:name` or `module:Class` means.

        Raises UnknownPlugin, AmbiguousPlugin.
        """
        path, _, attribute = name.partition(":")
        if path.endswith(".py"):
            raise UnknownPlugin(
                f"{name!r} is a file; wanted module:Class, as "
                f"'{PurePath(path).stem}:{attribute or 'Class'}', "
                "from where that module can be imported: its folder, say."
            )
        owner, _, short = name.rpartition(":")
        known = self.plugins()
        found = [p for p in known if p.name == short and (not owner or _same(owner, p.distribution))]
        if len(found) == 1:
            return found[0]
        if found:
            owners = " and ".join(f"{p.distribution} {p.version}" for p in found)
            full_names = " or ".join(repr(p.full_name) for p in found)
            raise AmbiguousPlugin(
                f"{self.kind.capitalize()} {name!r} is registered by {owners}. Type {full_names}."
            )
        if owner and _is_module(owner):
            return Plugin(short, "", "", name, self)
        raise UnknownPlugin(self._unknown(name, known))

    def load(self, name: str) -> type:
        """The class of that name; raises UnknownPlugin, AmbiguousPlugin, BrokenPlugin."""
        return self.find(name).load()

    def create(self, name: str | type, *args: Any, **options: Any) -> Any:
        """An instance of a plug-in, by its name or class.

        args: what the contract gives every class of this kind; options: its own.
        Raises as `load`; PluginError for an option that the class does not have; what the class raises.
        """
        plugin = self._of_class(name) if isinstance(name, type) else self.find(name)
        loaded = name if isinstance(name, type) else plugin.load()
        self._check_options(plugin.name, loaded, len(args), options)
        try:
            return loaded(*args, **options)
        except MervError:
            raise
        except (Exception, SystemExit) as error:
            raise plugin.broken(f"cannot be created: {type(error).__name__}: {error}") from error

    def path(self, name: str) -> str:
        """`module:Class` of the plug-in of that name: what a saved model says of it."""
        return class_path(self.load(name))

    def name(self, path: str) -> str:
        """The name that `module:Class` is registered by, or the path itself."""
        return next((plugin.name for plugin in self.plugins() if plugin.value == path), path)

    def check_trusted(self, path: str, what: str) -> None:
        """Raise PluginError unless the class `module:Class` may be loaded because a saved model names it.

        It may where it is registered or imported already: to import whatever a file names would let that
        file run code, even code that lies beside it. what: who wants it, for the message.
        """
        if self.is_trusted(path):
            return
        raise PluginError(
            f"{what} was saved as {path}, which no installed distribution registers, and code is not run on "
            f"the word of a model's folder. Install the plug-in that it is of. Or, where you trust it: "
            f"`import {path.partition(':')[0]}` before you load the model, or `merv ask --trust {path}`."
        )

    def is_trusted(self, path: str) -> bool:
        """Whether `module:Class` is registered, or imported already."""
        module, _, name = path.partition(":")
        with suppress(KeyError, AttributeError):
            return attrgetter(name)(sys.modules[module]) is not None
        plugins = self.plugins()
        if any(plugin.value == path for plugin in plugins):
            return True
        for plugin in plugins:  # it may be registered by another path than where it is defined
            if re.split("[.:]", plugin.value)[0] == re.split("[.:]", path)[0]:
                with suppress(BrokenPlugin):
                    if class_path(plugin.load()) == path:
                        return True
        return False

    def _of_class(self, given: type) -> Plugin:
        plugin = Plugin(given.__name__, "", "", class_path(given), self)
        if fault := self.contract()[1](given):
            raise plugin.broken(fault)
        return plugin

    def _plugins_of(self, distribution: Distribution) -> list[Plugin]:
        if self.group not in (distribution.read_text("entry_points.txt") or ""):
            return []
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
        if not (name and version):
            raise ValueError("its METADATA has no name or no version")
        plugins = []
        for entry in distribution.entry_points:
            if entry.group == self.group and re.search("[/:]", entry.name):
                logger.warning(
                    "%s %r of %s %s is not listed: / and : cannot be in a name. They stand before a variant "
                    "and after a distribution: tell its author.",
                    self.kind.capitalize(),
                    entry.name,
                    name,
                    version,
                )
            elif entry.group == self.group:
                plugins.append(Plugin(entry.name, name, version, entry.value, self))
        return plugins

    def _unknown(self, name: str, known: list[Plugin]) -> str:
        names = list(dict.fromkeys(p.name for p in known))
        guess = nearest(name, names + [p.full_name for p in known])
        owner = name.rpartition(":")[0]
        module, _, attribute = name.rpartition(".")
        if owner:
            guess += f" No distribution has it, and no module {owner!r} can be imported from here."
        elif _is_module(module):
            guess += f" A class goes by module:Class: '{module}:{attribute}'."
        return (
            f"Unknown {self.kind} {name!r}.{guess} Installed: {', '.join(names) or 'none'}. "
            f"See `merv plugins {self.kind}s`."
        )

    def _check_options(self, name: str, loaded: type, given: int, options: dict[str, Any]) -> None:
        """PluginError, not BrokenPlugin, for options that neither the kind has nor this class."""
        own = inspect.signature(loaded).parameters
        base = inspect.signature(self.contract()[0]).parameters
        known = list(dict.fromkeys([*list(base)[given:], *list(own)[given:]]))
        wrong = [option for option in options if option not in known]
        if wrong and not any(parameter.kind == parameter.VAR_KEYWORD for parameter in own.values()):
            raise PluginError(
                f"{self.kind.capitalize()} {name!r} has no option {wrong[0]!r}.{nearest(wrong[0], known)} "
                f"It has: {', '.join(known) or 'none'}."
            )


@dataclass(frozen=True)
class Plugin:
    """One plug-in, before anything of it is imported.

    name: what is typed; distribution, version: who registered it (both empty for `module:Class`, which
    nobody did); value: where it is, as "module:Class"; registry: of its kind.
    """

    name: str
    distribution: str
    version: str
    value: str
    registry: Registry

    @property
    def full_name(self) -> str:
        """What can be typed where `name` alone is ambiguous."""
        return f"{self.distribution}:{self.name}" if self.distribution else self.value

    def load(self) -> type:
        """Import the class and check it; a warning is logged if that takes longer than SLOW_S.

        Raises BrokenPlugin, from the cause.
        """
        _, fault_of = self.registry.contract()  # first, so that only the plug-in's own import is timed
        if not EntryPoint.pattern.match(self.value):
            raise self.broken('is no path to a class; wanted "module:Class"')
        start = time.perf_counter()
        try:
            loaded = EntryPoint(self.name, self.value, self.registry.group).load()
        except KeyboardInterrupt:  # the user's, as far as anyone can tell
            raise
        except BaseException as error:  # SystemExit too: whatever the module of a plug-in does
            raise self.broken(f"cannot be imported: {type(error).__name__}: {error}") from error
        took_s = time.perf_counter() - start
        if took_s > SLOW_S:
            logger.warning(
                "%s took %.1f s to import; wanted: under %g s. Its module should only define things: tell "
                "its author.",
                self,
                took_s,
                SLOW_S,
            )
        if fault := fault_of(loaded):
            raise self.broken(fault)
        return loaded

    def __str__(self) -> str:
        owner = f" of {self.distribution} {self.version}" if self.distribution else ""
        return f"{self.registry.kind.capitalize()} {self.name!r}{owner} ({self.value})"

    def broken(self, fault: str) -> BrokenPlugin:
        """The error that says whose plug-in has the `fault`."""
        kind = self.registry.kind
        return BrokenPlugin(f"{self} {fault}. Other {kind}s are not affected; see `merv plugins {kind}s`.")


def trust(path: str) -> None:
    """Import the module of a class `module:Class`, so that a saved model may name the class.

    Raises PluginError where it is no such path, or cannot be imported.
    """
    module, colon, name = path.partition(":")
    try:
        found = attrgetter(name)(import_module(module)) if colon else None
    except (Exception, SystemExit) as error:
        raise PluginError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type):
        raise PluginError(f"{path!r} is no class; wanted module:Class.")


def class_path(of: type) -> str:
    """`module:Class`.

    >>> class_path(Registry)
    'merv.utils.plugins:Registry'
    """
    return f"{of.__module__}:{of.__qualname__}"


def is_importable(of: type) -> bool:
    """Whether a later process finds a class by its path: none of a function, a script or a notebook."""
    if of.__module__ == "__main__":
        return False
    with suppress(KeyError, AttributeError):
        return attrgetter(of.__qualname__)(sys.modules[of.__module__]) is of
    return False


def must_subclass(base: type) -> Fault:
    """The check of a kind whose only rule is its base class.

    >>> must_subclass(int)("three")
    "is 'three'; wanted a subclass of int"
    """

    def fault(loaded: object) -> str | None:
        fits = isinstance(loaded, type) and issubclass(loaded, base)
        return None if fits else f"is {loaded!r}; wanted a subclass of {base.__name__}"

    return fault


def _same(one: str, other: str) -> bool:
    """Whether two spellings name one distribution (PEP 503)."""
    return _normal(one) == _normal(other)


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _is_module(path: str) -> bool:
    """Whether the outermost package of a dotted path exists; imports nothing."""
    top = path.partition(".")[0]
    return bool(top) and (top in sys.modules or find_spec(top) is not None)

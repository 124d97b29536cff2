"""Find plug-ins by name. Each kind of plug-in has one registry, filled from entry points.

A package registers a plug-in in the entry-point group of its kind, in its pyproject.toml:

    [project.entry-points."merv.encoders"]
    histogram = "my_package.histogram:Histogram"

Listing plug-ins imports none of them; a plug-in is imported when it is first used. pluggy and pytest
work in the same way.
"""

from __future__ import annotations

import inspect
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

from merv.errors import AmbiguousPlugin, BrokenPlugin, MervError, PluginError, UnknownPlugin
from merv.utils.suggest import nearest


@dataclass(frozen=True)
class Registry:
    """The plug-ins of one kind.

    Args:
        kind: Name of the kind in messages, such as "encoder".
        group: Entry-point group of the kind.
        base: Path of the base class, "module:Class". It is imported only when a plug-in is loaded, so that
            listing plug-ins does not import torch. It may have a class method `class_fault`, which says what
            is wrong with a subclass.
    """

    kind: str
    group: str
    base: str

    def plugins(self) -> list[Plugin]:
        """List the registered plug-ins of this kind by name, without importing them."""
        found = [
            Plugin(entry.name, entry.dist.name, entry.dist.version, entry.value, self)
            for entry in entry_points(group=self.group)
            if entry.dist
        ]
        return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))

    def find(self, name: str) -> Plugin:
        """Find the plug-in called `name`, `distribution:name` or `module:Class`.

        Raises:
            UnknownPlugin: No plug-in has this name.
            AmbiguousPlugin: Several distributions register this name.
        """
        owner, _, short_name = name.rpartition(":")
        known = self.plugins()
        matches = [
            plugin
            for plugin in known
            if plugin.name == short_name
            and (not owner or _canonical(owner) == _canonical(plugin.distribution))
        ]
        if len(matches) == 1:
            return matches[0]
        if matches:
            owners = " and ".join(f"{plugin.distribution} {plugin.version}" for plugin in matches)
            full_names = " or ".join(repr(plugin.full_name) for plugin in matches)
            raise AmbiguousPlugin(
                f"{self.kind.capitalize()} {name!r} is registered by {owners}. Use {full_names}."
            )
        if owner and _is_module(owner):
            return Plugin(short_name, "", "", name, self)
        names = list(dict.fromkeys(plugin.name for plugin in known))
        suggestion = nearest(name, names + [plugin.full_name for plugin in known])
        no_owner = f" There is no distribution or module {owner!r}." if owner else ""
        raise UnknownPlugin(
            f"Unknown {self.kind} {name!r}.{suggestion}{no_owner} Available: {', '.join(names) or 'none'}. "
            f"Use module:Class for a class that no package registers. See `merv plugins {self.kind}s`."
        )

    def load(self, name: str) -> type:
        """Import the class of a plug-in. Raises UnknownPlugin, AmbiguousPlugin or BrokenPlugin."""
        return self.find(name).load()

    def create(self, name: str | type, *args: Any, **options: Any) -> Any:
        """Create an instance of a plug-in.

        Args:
            name: A name as in `find`, or the class itself.
            *args: Arguments that every class of this kind takes.
            **options: Arguments of this class.

        Raises:
            UnknownPlugin, AmbiguousPlugin, BrokenPlugin: As in `load`.
            PluginError: The class does not accept one of the options, or a required one is missing.
            MervError: Raised by the constructor of the class.
        """
        if isinstance(name, type):
            plugin, loaded = Plugin(name.__name__, "", "", class_path(name), self), name
            plugin.check(loaded)
        else:
            plugin = self.find(name)
            loaded = plugin.load()
        signature = inspect.signature(loaded)
        try:
            signature.bind(*args, **options)
        except TypeError as error:
            known = ", ".join(list(signature.parameters)[len(args) :]) or "none"
            raise PluginError(
                f"{self.kind.capitalize()} {plugin.name!r}: {error}. Available options: {known}."
            ) from error
        try:
            return loaded(*args, **options)
        except MervError:
            raise
        except (Exception, SystemExit) as error:
            raise plugin.broken(f"cannot be created: {type(error).__name__}: {error}") from error

    def path(self, name: str) -> str:
        """The `module:Class` path of a plug-in, which saved models contain."""
        return class_path(self.load(name))

    def check_trusted(self, path: str, what: str) -> None:
        """Raise PluginError unless a saved model may load the class `module:Class`.

        A model's folder must not be able to run code. So a class is loaded only if an installed distribution
        registers it, or if it is imported already.

        Args:
            path: The class, as the saved model names it.
            what: The part of the model that needs the class, for the message.
        """
        if not self.is_trusted(path):
            raise PluginError(
                f"{what} was saved as {path}, which no installed distribution registers. merv does not "
                "import code only because a model's folder names it. Install the plug-in. Or, if you trust "
                f"it, `import {path.partition(':')[0]}` before you load the model, or use "
                f"`merv ask --trust {path}`."
            )

    def is_trusted(self, path: str) -> bool:
        """Whether the class `module:Class` is registered, or imported already."""
        module, _, name = path.partition(":")
        with suppress(KeyError, AttributeError):
            return attrgetter(name)(sys.modules[module]) is not None
        plugins = self.plugins()
        if any(plugin.value == path for plugin in plugins):
            return True
        # A package may register a class by another path than the one that defines it.
        for plugin in plugins:
            with suppress(BrokenPlugin):
                if _package(plugin.value) == _package(path) and class_path(plugin.load()) == path:
                    return True
        return False


@dataclass(frozen=True)
class Plugin:
    """A plug-in that may not have been imported yet.

    Args:
        name: The name that users type.
        distribution: The distribution that registers it; empty for a class given as `module:Class`.
        version: The version of the distribution; empty for a class given as `module:Class`.
        value: The path of the class, "module:Class".
        registry: The registry of its kind.
    """

    name: str
    distribution: str
    version: str
    value: str
    registry: Registry

    @property
    def full_name(self) -> str:
        """The unambiguous name, "distribution:name" or "module:Class"."""
        return f"{self.distribution}:{self.name}" if self.distribution else self.value

    def load(self) -> type:
        """Import the class and check it against the contract of its kind.

        Raises:
            BrokenPlugin: The class cannot be imported, or does not satisfy the contract.
        """
        try:
            loaded = _import(self.value)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the module of a plug-in may raise anything, SystemExit included
            raise self.broken(f"cannot be imported: {type(error).__name__}: {error}") from error
        return self.check(loaded)

    def check(self, loaded: Any) -> type:
        """Return `loaded` if it satisfies the contract of its kind; raise BrokenPlugin otherwise."""
        base = _import(self.registry.base)
        is_subclass = isinstance(loaded, type) and issubclass(loaded, base)
        if not is_subclass:
            raise self.broken(f"is {loaded!r}; expected a subclass of merv.{base.__name__}")
        if hasattr(base, "class_fault") and (fault := loaded.class_fault()):
            raise self.broken(fault)
        return loaded

    def __str__(self) -> str:
        owner = f" of {self.distribution} {self.version}" if self.distribution else ""
        return f"{self.registry.kind.capitalize()} {self.name!r}{owner} ({self.value})"

    def broken(self, fault: str) -> BrokenPlugin:
        """An error that names the plug-in, its distribution and what is wrong with it."""
        kind = self.registry.kind
        return BrokenPlugin(f"{self} {fault}. Other {kind}s are not affected; see `merv plugins {kind}s`.")


def trust(path: str) -> None:
    """Import the class `module:Class`, so that a saved model may load it.

    Raises:
        PluginError: The path is not that of a class, or the class cannot be imported.
    """
    try:
        loaded = _import(path)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, type):
        raise PluginError(f"Expected the path of a class, module:Class; got {path!r}.")


def _import(path: str) -> Any:
    """Import the object at `module:name`, or the module; unlike `pkgutil.resolve_name`, of any name."""
    module, _, name = path.partition(":")
    imported = import_module(module.strip())
    return attrgetter(name.strip())(imported) if name else imported


def class_path(cls: type) -> str:
    """The path of a class, `module:Class`.

    >>> class_path(Registry)
    'merv.utils.plugins:Registry'
    """
    return f"{cls.__module__}:{cls.__qualname__}"


def is_importable(cls: type) -> bool:
    """Whether another process can import a class by its path: not if a function or a script defines it."""
    if cls.__module__ == "__main__":
        return False
    with suppress(KeyError, AttributeError):
        return attrgetter(cls.__qualname__)(sys.modules[cls.__module__]) is cls
    return False


def _canonical(distribution: str) -> str:
    """The normalized name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _package(path: str) -> str:
    """The top-level package of a path, `package.module:Class`."""
    return re.split("[.:]", path)[0]


def _is_module(path: str) -> bool:
    """Whether the top-level package of a path exists. Nothing is imported."""
    top = _package(path)
    return bool(top) and (top in sys.modules or find_spec(top) is not None)

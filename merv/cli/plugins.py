"""`merv plugins`: list encoders, mixers and projectors, or check that one satisfies its contract."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import Any

from merv.encoding.registry import ENCODERS, name_and_variant
from merv.errors import BrokenPlugin, MervError, MissingDependency
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.utils.plugins import Plugin, Registry

REGISTRIES: dict[str, Registry] = {"encoders": ENCODERS, "mixers": MIXERS, "projectors": PROJECTORS}
COLUMNS = ("name", "distribution", "version")
LONG_COLUMNS = {
    "encoders": ("frames", "grid", "embed_dim", "parameters", "license"),
    "mixers": ("options", "description"),
    "projectors": ("options", "description"),
}
# Arguments to create a plug-in of a kind: those that every class takes.
CREATED_WITH: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "encoders": ((), {"weights": None}),
    "mixers": ((64, 2), {}),
    "projectors": ((64, 64), {}),
}

EXAMPLES = """\
The plain list imports nothing. `merv plugins KIND --long` imports the plug-ins of a kind, creates one of each
without weights and shows more about them. A plug-in that cannot be imported or created is shown as broken,
and one that needs a package of an extra as missing. Neither affects the others.

examples:
  merv plugins                                  list plug-ins of all kinds
  merv plugins mixers --long                    list each mixer with its options
  merv plugins mixers check my_module:MyMixer   check that a mixer satisfies its contract
  merv plugins encoders check fake              the same as `merv encoders check fake`
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv plugins` to `parser`."""
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(title="kinds", dest="kind", metavar="KIND")
    for kind, registry in REGISTRIES.items():
        kind_parser = kinds.add_parser(
            kind,
            help=f"list or check {kind} (entry-point group {registry.group})",
            description=f"List the installed {kind}.",
        )
        add_kind_arguments(kind_parser, kind)


def add_kind_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the arguments of one kind: `--long`, and `check NAME ...`."""
    parser.add_argument(
        "--long", action="store_true", help=f"also list state, {', '.join(LONG_COLUMNS[kind])}"
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION")
    singular = kind.removesuffix("s")
    check = actions.add_parser(
        "check",
        help=f"check that the {singular} NAME satisfies its contract",
        description=f"Create each {singular} with random weights and check that it satisfies its contract.",
        epilog="example:\n  %(prog)s my_module:MyClass",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = "NAME, NAME/VARIANT or MODULE:CLASS" if kind == "encoders" else "NAME or MODULE:CLASS"
    check.add_argument("names", nargs="+", metavar="NAME", help=names)


def run(args: argparse.Namespace) -> int:
    """List or check plug-ins; return 1 if a check fails."""
    if args.kind is not None:
        return run_kind(args, args.kind)
    rows = [(kind, *_short(plugin)) for kind, registry in REGISTRIES.items() for plugin in registry.plugins()]
    _print_table([("kind", *COLUMNS), *rows])
    return 0


def run_kind(args: argparse.Namespace, kind: str) -> int:
    """List or check plug-ins of one kind; return 1 if a check fails."""
    if args.action == "check":
        return max([_check(kind, name) for name in args.names])
    plugins = REGISTRIES[kind].plugins()
    if args.long:
        with redirect_stdout(sys.stderr):  # keep what a module prints on import out of the table
            rows = [row for plugin in plugins for row in _long(kind, plugin)]
        _print_table([(*COLUMNS, "state", *LONG_COLUMNS[kind]), *rows])
    else:
        _print_table([COLUMNS, *map(_short, plugins)])
    return 0


def _short(plugin: Plugin) -> Sequence[str]:
    return plugin.name, plugin.distribution, plugin.version


def _long(kind: str, plugin: Plugin) -> Iterable[Sequence[str]]:
    """The rows of a plug-in in the long list; an encoder has one for each variant."""
    name, *owner = _short(plugin)
    try:
        loaded: Any = plugin.load()
        state = _state(kind, loaded)
    except MissingDependency as error:  # a package of an extra, which the user may not want
        state = f"missing: {error.__cause__ or error}"
    except MervError as error:
        return [(name, *owner, "broken: " + " ".join(str(error.__cause__ or error).split()))]
    if kind == "encoders":
        return [
            (f"{name}/{variant}", *owner, state, *_cells(spec)) for variant, spec in loaded.variants.items()
        ]
    options = list(inspect.signature(loaded).parameters.values())[2:]  # merv passes the first two itself
    description = (vars(loaded).get("__doc__") or "").strip().partition("\n")[0]
    return [(name, *owner, state, ", ".join(map(_option, options)) or "-", description)]


def _state(kind: str, plugin: type) -> str:
    """Create a plug-in without weights, which shows whether its packages are there: "ok" if it works."""
    from merv.utils.torch_modules import without_weights

    arguments, options = CREATED_WITH[kind]
    try:
        inspect.signature(plugin).bind(*arguments, **options)
    except TypeError as error:  # it has options without a default
        return f"not created: {error}"
    without_weights(lambda: REGISTRIES[kind].create(plugin, *arguments, **options), BrokenPlugin)
    return "ok"


def _option(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default}"


def _cells(spec: Any) -> Sequence[str]:
    frames = f"{spec.num_frames}" if spec.fps is None else f"{spec.fps:g}/s, at most {spec.num_frames}"
    parameters = "?" if spec.parameters is None else f"{spec.parameters / 1e6:.1f} M"
    return frames, "×".join(map(str, spec.grid)), str(spec.embed_dim), parameters, spec.weights_license


def _check(kind: str, name: str) -> int:
    from merv.testing.conformance import check_plugin

    bare_name, variant = name_and_variant(name) if kind == "encoders" else (name, None)
    plugin = REGISTRIES[kind].find(bare_name)
    owner = f" (distribution {plugin.distribution} {plugin.version})" if plugin.distribution else ""
    print(f"{name}{owner}")
    try:
        loaded = plugin.load()
    except BrokenPlugin as error:
        print(error)
        return 1
    options = {"variant": variant} if kind == "encoders" else {}
    findings = check_plugin(kind.removesuffix("s"), loaded, **options)
    for finding in findings:
        print(f"  {finding}")
    failed = sum(finding.status == "FAIL" for finding in findings)
    if failed:
        print(f"{name}{owner} fails {failed} of {len(findings)} checks.")
    return int(failed > 0)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their cells; the last cell of a row can have any length."""
    columns = max(map(len, rows))
    widths = [max([len(row[i]) for row in rows if i < len(row) - 1], default=0) for i in range(columns)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())

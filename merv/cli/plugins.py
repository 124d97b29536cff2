"""`merv plugins`: list encoders, mixers and projectors, check that one keeps the contract of its kind."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import Any

from merv.encoding.registry import ENCODERS, name_and_variant
from merv.errors import BrokenPlugin
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.utils.plugins import Plugin, Registry

REGISTRIES: dict[str, Registry] = {"encoders": ENCODERS, "mixers": MIXERS, "projectors": PROJECTORS}
SHORT = ("name", "distribution", "version")
LONG = {
    "encoders": ("frames", "grid", "width", "parameters", "license"),
    "mixers": ("options", "what it is"),
    "projectors": ("options", "what it is"),
}

EXAMPLES = """\
Nothing is imported for the plain list. --long imports one by one; a plug-in that does not load is shown
as broken and hides nothing.

examples:
  merv plugins                                  all kinds
  merv plugins mixers --long                    what each mixer is, and its options
  merv plugins mixers check my_module:MyMixer   whether a mixer keeps its contract
  merv plugins encoders check fake              the same as `merv encoders check fake`
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv plugins` to `parser`."""
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(title="kinds", dest="kind", metavar="KIND")
    for kind, registry in REGISTRIES.items():
        own = kinds.add_parser(kind, help=f"those of the entry-point group {registry.group}")
        add_kind_arguments(own, kind)


def add_kind_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """The arguments of one kind: `--long`, and `check NAME`."""
    one = kind.removesuffix("s")
    parser.add_argument("--long", action="store_true", help=f"import each: state, {', '.join(LONG[kind])}")
    actions = parser.add_subparsers(title="instead of the list", dest="action", metavar="ACTION")
    check = actions.add_parser("check", help=f"test whether a {one} keeps its contract (random weights)")
    names = "NAME, NAME/VARIANT or MODULE:CLASS" if kind == "encoders" else "NAME or MODULE:CLASS"
    check.add_argument("names", nargs="+", metavar="NAME", help=names)


def run(args: argparse.Namespace) -> int:
    """List, or check; 1 if a plug-in fails its check."""
    if args.kind is not None:
        return run_kind(args, args.kind)
    rows = [(kind, *_short(plugin)) for kind, registry in REGISTRIES.items() for plugin in registry.plugins()]
    _print_table([("kind", *SHORT), *rows])
    return 0


def run_kind(args: argparse.Namespace, kind: str) -> int:
    """List the plug-ins of one kind, or check some."""
    if args.action == "check":
        return max([_check(kind, name) for name in args.names])
    plugins = REGISTRIES[kind].plugins()
    if args.long:
        with redirect_stdout(sys.stderr):  # what modules print when imported is not part of the table
            rows = [row for plugin in plugins for row in _long(kind, plugin)]
        _print_table([(*SHORT, "state", *LONG[kind]), *rows])
    else:
        _print_table([SHORT, *map(_short, plugins)])
    return 0


def _short(plugin: Plugin) -> Sequence[str]:
    return plugin.name, plugin.distribution, plugin.version


def _long(kind: str, plugin: Plugin) -> Iterable[Sequence[str]]:
    try:
        loaded: Any = plugin.load()
    except BrokenPlugin as error:
        return [(*_short(plugin), "broken: " + " ".join(str(error.__cause__ or error).split()))]
    if kind == "encoders":
        name, *owner = _short(plugin)
        return [
            (f"{name}/{variant}", *owner, "ok", *_described(spec))
            for variant, spec in loaded.variants.items()
        ]
    options = list(inspect.signature(loaded).parameters.values())[2:]  # behind what the kind gives
    first_line = (vars(loaded).get("__doc__") or "").strip().partition("\n")[0]
    return [(*_short(plugin), "ok", ", ".join(map(_option, options)) or "-", first_line)]


def _option(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default}"


def _described(spec: Any) -> Sequence[str]:
    frames = f"{spec.num_frames}" if spec.fps is None else f"{spec.fps:g}/s, at most {spec.num_frames}"
    parameters = "?" if spec.parameters is None else f"{spec.parameters / 1e6:.1f} M"
    return frames, "×".join(map(str, spec.grid)), str(spec.embed_dim), parameters, spec.weights_license


def _check(kind: str, name: str) -> int:
    from merv.testing.conformance import check_plugin

    bare, variant = name_and_variant(name) if kind == "encoders" else (name, None)
    plugin = REGISTRIES[kind].find(bare)
    print(f"{name}, of {plugin.distribution} {plugin.version}" if plugin.distribution else name)
    try:
        loaded = plugin.load()
    except BrokenPlugin as error:
        print(error)
        return 1
    options = {"variant": variant} if kind == "encoders" else {}
    findings = check_plugin(kind.removesuffix("s"), loaded, **options)
    for finding in findings:
        print(f"  {finding}")
    if kind == "encoders" and findings[0].passed and (left_out := _left_out(loaded, variant)):
        print(f"  not run: {left_out}")
    failed = sum(not finding.passed for finding in findings)
    if failed:
        owner = f" (distribution {plugin.distribution})" if plugin.distribution else ""
        print(f"{name}{owner} fails {failed} of {len(findings)} checks.")
    return int(failed > 0)


def _left_out(encoder: Any, variant: str | None) -> str:
    """Which variants and presets a check of `variant` says nothing of."""
    tried = variant or next(iter(encoder.variants))
    left_out = {
        "variants": [name for name in encoder.variants if name != tried],
        "presets": list(encoder.variants[tried].presets)[1:],
    }
    return "; ".join(f"{what} {', '.join(names)}" for what, names in left_out.items() if names)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their entries; the last entry of a row may be of any length."""
    columns = max(map(len, rows))
    widths = [max([len(row[i]) for row in rows if i < len(row) - 1], default=0) for i in range(columns)]
    for row in rows:
        print("  ".join(f"{entry:{width}}" for entry, width in zip(row, widths, strict=False)).rstrip())

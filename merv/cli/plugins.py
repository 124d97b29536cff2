"""List encoders, mixers and projectors, or check that one satisfies its contract.

The plain list imports nothing. --long imports the plug-ins of a kind, creates one of each without weights and
shows more about them. A plug-in that cannot be imported or created is shown as broken, and one that needs a
package of an extra as missing. Neither affects the others.

examples:
  merv plugins                                  list plug-ins of all kinds
  merv plugins mixers --long                    list each mixer with its options
  merv plugins mixers check my_module:MyMixer   check that a mixer satisfies its contract
  merv plugins encoders check fake              the same as `merv encoders check fake`
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from merv.encoding.registry import ENCODERS
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
# Arguments to create a plug-in of a kind: those that every class takes
CREATED_WITH: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "encoders": ((), {"weights": None}),
    "mixers": ((64, 2), {}),
    "projectors": ((64, 64), {}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv plugins` to `parser`."""
    kinds = "{" + ",".join(REGISTRIES) + "}"
    forms = ("[-h]", f"{kinds} [--long]", f"{kinds} check NAME [NAME ...]")
    parser.usage = "\n       ".join(f"merv plugins {form}" for form in forms)
    parser.add_argument("kind", nargs="?", choices=REGISTRIES, help="(default: list all kinds)")
    add_actions(parser)


def add_actions(parser: argparse.ArgumentParser) -> None:
    """Add the arguments after the kind: `--long`, and `check NAME ...`."""
    parser.add_argument("--long", action="store_true", help="import the plug-ins and show more about them")
    parser.add_argument("check", nargs="?", choices=["check"], help="check instead of listing")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="what to check: NAME, ENCODER/VARIANT or MODULE:CLASS"
    )


def run(args: argparse.Namespace) -> int:
    """List or check plug-ins; return 1 if a check fails."""
    if args.check:
        if not args.names:
            raise MervError(f"Expected the names of {args.kind} after `check`.")
        return max([_check(args.kind, name) for name in args.names])
    if args.kind is None:
        if args.long:
            raise MervError("--long needs a kind, such as `merv plugins mixers --long`.")
        rows = [(kind, *_short(plugin)) for kind in REGISTRIES for plugin in REGISTRIES[kind].plugins()]
        _print_table([("kind", *COLUMNS), *rows])
    elif args.long:
        with redirect_stdout(sys.stderr):  # keep what a module prints on import out of the table
            rows = [row for plugin in REGISTRIES[args.kind].plugins() for row in _long(args.kind, plugin)]
        _print_table([(*COLUMNS, "state", *LONG_COLUMNS[args.kind]), *rows])
    else:
        _print_table([COLUMNS, *map(_short, REGISTRIES[args.kind].plugins())])
    return 0


def _short(plugin: Plugin) -> tuple[str, ...]:
    return plugin.name, plugin.distribution, plugin.version


def _long(kind: str, plugin: Plugin) -> list[tuple[str, ...]]:
    """The rows of a plug-in in the long list; an encoder that works has one for each variant."""
    from merv.utils.torch_modules import without_weights

    arguments, options = CREATED_WITH[kind]
    try:
        created: Any = without_weights(
            lambda: plugin.registry.create(plugin.full_name, *arguments, **options), BrokenPlugin
        )
    except MervError as error:
        state = {MissingDependency: "missing", BrokenPlugin: "broken"}.get(type(error), "not created")
        return [(*_short(plugin), f"{state}: {' '.join(str(error.__cause__ or error).split())}")]
    if kind == "encoders":
        return [
            (f"{plugin.name}/{variant}", *_short(plugin)[1:], "ok", *_cells(spec))
            for variant, spec in created.variants.items()
        ]
    parameters = list(inspect.signature(type(created)).parameters.values())[len(arguments) :]
    description = (vars(type(created)).get("__doc__") or "").strip().partition("\n")[0]
    return [(*_short(plugin), "ok", ", ".join(map(_option, parameters)) or "-", description)]


def _option(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default}"


def _cells(spec: Any) -> tuple[str, ...]:
    frames = f"{spec.num_frames}" if spec.fps is None else f"{spec.fps:g}/s, at most {spec.num_frames}"
    parameters = "?" if spec.parameters is None else f"{spec.parameters / 1e6:.1f} M"
    return frames, "×".join(map(str, spec.grid)), str(spec.embed_dim), parameters, spec.weights_license


def _check(kind: str, name: str) -> int:
    from merv import testing

    check = getattr(testing, f"check_{REGISTRIES[kind].kind}")  # check_encoder, check_mixer, check_projector
    results = check(name)
    plugin = REGISTRIES[kind].find(name.partition("/")[0])
    print(f"{name}, {plugin}")
    for result in results:
        print(f"  {result}")
    failed = sum(result.status == "FAIL" for result in results)
    if failed:
        print(f"{name} fails {failed} of {len(results)} checks.")
    return int(failed > 0)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their cells; the last cell of a row can have any length."""
    columns = max(map(len, rows))
    widths = [max([len(row[i]) for row in rows if i < len(row) - 1], default=0) for i in range(columns)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())

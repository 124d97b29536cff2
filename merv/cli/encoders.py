"""`merv encoders`: the short form of `merv plugins encoders`."""

from __future__ import annotations

import argparse

from merv.cli.plugins import add_kind_arguments, run_kind

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
    add_kind_arguments(parser, "encoders")


def run(args: argparse.Namespace) -> int:
    """List, or check; 1 if an encoder fails its check."""
    return run_kind(args, "encoders")

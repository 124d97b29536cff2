"""`merv doctor`: check the installation and print what a bug report needs."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

State = Literal["ok", "note", "broken"]
MARKS: dict[State, str] = {"ok": " ", "note": "?", "broken": "!"}

EXAMPLES = """\
A ! marks something required that does not work; the exit status is then 1. A ? marks something optional.
For GPUs and drivers, run `python -m torch.utils.collect_env`; for plug-ins, `merv plugins`.

examples:
  merv doctor                 paste the output into a bug report
"""


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Args:
        name: What was checked.
        text: The result in words.
        state: "ok"; "note" for something optional; "broken" if merv does not work without it.
    """

    name: str
    text: str
    state: State = "ok"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv doctor` to `parser`; there are none."""
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    """Print all sections; return 1 if something is broken."""
    broken = []
    for section, check in SECTIONS.items():
        print(section)
        for line in run_section(section, check):
            text = line.text.replace(str(Path.home()), "~")  # it contains the user's name
            print(f"{MARKS[line.state]} {line.name:34}  {text}".rstrip(), flush=True)
            if line.state == "broken":
                broken.append(line.name)
        print()
    print(f"Broken: {', '.join(broken)}." if broken else "merv works on this machine.")
    return int(bool(broken))


def run_section(section: str, check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """Yield the lines of one section; an exception becomes a line, so that the other sections still run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from check()
    except Exception as error:
        yield Line(section, f"the check failed: {_one_line(error)}", "broken")


# Sections -----------------------------------------------------------------------------------


def versions() -> Iterator[Line]:
    """Python, merv and its packages. The required ones are imported."""
    yield Line("python", f"{platform.python_version()} ({sys.executable})")
    yield Line("platform", platform.platform())
    yield Line("merv", f"{version('merv')} ({Path(__file__).parents[1]})")
    for package, extra in _requirements().items():
        try:
            installed = version(package)
            if not extra:
                import_module(_module_of(package))
        except PackageNotFoundError:
            install = f'pip install ".[{extra}]" in the clone' if extra else f"pip install {package}"
            text = f"is not installed. Run: {install}"
            yield Line(package, text, "note" if extra else "broken")
        except Exception as error:  # for example a torchvision that was built for another torch
            yield Line(package, f"{installed} cannot be imported: {_one_line(error)}", "broken")
        else:
            yield Line(package, installed)


def _requirements() -> dict[str, str]:
    """Package → the extra that needs it, or "", for each requirement in merv's metadata."""
    result: dict[str, str] = {}
    for line in requires("merv") or []:
        package, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)", line)
        if package and package[0] != "merv" and not (extra and extra[1] == "dev"):
            result.setdefault(package[0], extra[1] if extra else "")
    return result


def _module_of(package: str) -> str:
    """The module that an installed package is imported as."""
    modules = sorted(name for name, owners in packages_distributions().items() if package in owners)
    same_name = package.replace("-", "_")
    return same_name if same_name in modules or not modules else modules[0]


def decoding() -> Iterator[Line]:
    """Decode a small video with each backend."""
    from merv.testing import make_video
    from merv.video.open import open_video
    from merv.video.reader import BACKENDS

    with TemporaryDirectory() as folder:
        path = make_video(Path(folder, "square.mp4"), frames=8)
        for backend in BACKENDS:
            try:
                with open_video(path, backend=backend) as video:
                    frames = len(video.read(range(8)))
            except Exception as error:
                yield Line(backend, _one_line(error), "broken" if backend == "pyav" else "note")
            else:
                yield Line(backend, f"decodes {frames} of 8 frames of an MP4 file")


def devices() -> Iterator[Line]:
    """The CPU and the GPUs that torch can use."""
    import torch

    yield Line("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if gpu.major >= 8 else "no bf16, use fp32"
        yield Line(f"cuda:{i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {bf16}")
    if not torch.cuda.is_available():
        yield Line("cuda", f"no GPU; torch is built for CUDA {torch.version.cuda}")


SECTIONS: dict[str, Callable[[], Iterator[Line]]] = {
    "versions": versions,
    "decoding": decoding,
    "devices": devices,
}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

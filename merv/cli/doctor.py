"""Check the installation and print what a bug report needs.

A ! marks something required that does not work; the exit status is then 1. A ? marks something optional.
For GPUs and drivers, run `python -m torch.utils.collect_env`; for plug-ins, `merv plugins`.

examples:
  merv doctor                 paste the output into a bug report
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory

Check = tuple[str, bool, Callable[[], str]]  # a name, whether merv needs it, and a function that describes it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv doctor` to `parser`; there are none."""


def run(args: argparse.Namespace) -> int:
    """Print one line for each check; return 1 if something required is broken. A check that raises fails."""
    broken = []
    for name, required, check in checks():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mark, text = " ", check()
        except Exception as error:
            mark, text = (
                "!" if required else "?",
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            )
            broken += [name] * required
        text = text.replace(str(Path.home()), "~")  # it contains the user's name
        print(f"{mark} {name:34}  {text}", flush=True)
    print(f"\nBroken: {', '.join(broken)}." if broken else "\nmerv works on this machine.")
    return int(bool(broken))


def checks() -> Iterator[Check]:
    """Versions of Python, merv and its packages; decoding with each backend; CPU and GPUs."""
    yield "python", True, lambda: f"{platform.python_version()} ({sys.executable})"
    yield "platform", True, platform.platform
    yield "merv", True, lambda: f"{version('merv')} ({Path(__file__).parents[1]})"
    for package, extra in _requirements().items():
        yield package, not extra, partial(_version, package, extra)
    from merv.video.reader import BACKENDS

    for backend in BACKENDS:
        yield backend, backend == "pyav", partial(_decode, backend)
    yield "devices", True, _devices


def _requirements() -> dict[str, str]:
    """Package → the extra that needs it, or "", for each requirement in merv's metadata."""
    result: dict[str, str] = {}
    for line in requires("merv") or []:
        package, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)", line)
        if package and package[0] != "merv" and not (extra and extra[1] == "dev"):
            result.setdefault(package[0], extra[1] if extra else "")
    return result


def _version(package: str, extra: str) -> str:
    """The version of a package. A required one is imported: it may be built for another torch."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        install = f'pip install ".[{extra}]" in the clone' if extra else f"pip install {package}"
        raise PackageNotFoundError(f"{package}. Run: {install}") from None
    if not extra:
        owners_of = packages_distributions().items()
        wanted = _normalized(package)
        modules = [name for name, owners in owners_of if wanted in map(_normalized, owners)]
        modules.sort(key=lambda name: (name.startswith("_"), name))  # public ones first
        same_name = package.replace("-", "_")
        import_module(same_name if same_name in modules or not modules else modules[0])
    return installed


def _normalized(distribution: str) -> str:
    """The name of a distribution as requirements write it.

    >>> _normalized("PyYAML")
    'pyyaml'
    """
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _decode(backend: str) -> str:
    from merv.testing import make_video
    from merv.video.open import open_video

    with TemporaryDirectory() as folder:
        path = make_video(Path(folder, "square.mp4"), frames=8)
        with open_video(path, backend=backend) as video:
            return f"decodes {len(video.read(range(8)))} of 8 frames of an MP4 file"


def _devices() -> str:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {'bf16' if gpu.major >= 8 else 'no bf16, use fp32'}"
        for gpu in gpus
    ] or [f"no GPU; torch is built for CUDA {torch.version.cuda}"]
    return "; ".join([f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads", *names])

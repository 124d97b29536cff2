"""Create the golden tensors of tests/golden: features of small upstream networks, stage by stage.

    python benchmarks/encoders/golden.py NAME ...

NAME is a file of benchmarks/encoders/references. Run it with a Python that has the library of the reference;
merv is not needed. Each file holds slices of the pixels, of the input of the first block and of the tokens,
for each preset, and the names and shapes of the checkpoint, from which its weights are computed.
tests/encoding/test_golden.py compares merv's encoders with them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from references import Size, read
from references.__main__ import run
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "tests" / "golden"
SIZE = Size(depth=3, width=128)


def sliced(stage: str, whole: Tensor) -> Tensor:
    """The slice to store of pixels [T, 3, H, W], embeddings [K, N, D] or tokens [t, h, w, D]."""
    if stage.endswith("pixels"):
        return whole[::5, :, ::31, ::31]
    return whole[::5, ::5, ::5, ::16] if whole.ndim == 4 else whole[::5, ::41, ::16]


def main() -> None:
    """Write one file for each NAME, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME")
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            run(name, Path(folder), SIZE)
            print(save_golden(name, Path(folder)))


def save_golden(name: str, folder: Path) -> Path:
    """Write tests/golden/NAME.safetensors from the files that `run` wrote into the folder."""
    stages = load_file(folder / "reference.safetensors")
    slices = {
        stage: sliced(stage, t).contiguous() for stage, t in stages.items() if not stage.endswith("bf16")
    }
    (weights,) = (file for file in (folder / "hub").iterdir() if file.suffix in (".safetensors", ".bin"))
    shapes = {key: list(t.shape) for key, t in read(weights).items() if t.is_floating_point()}
    config = folder / "hub" / "config.json"
    metadata = {
        "file": weights.name,
        "shapes": json.dumps(shapes),
        "config": config.read_text() if config.exists() else "null",
    }
    target = FOLDER / f"{name}.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_file(slices, target, metadata)
    return target


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

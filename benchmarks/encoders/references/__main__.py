"""Run one reference: `python -m references NAME FOLDER [--depth N] [--width N]`, in benchmarks/encoders.

It writes the weights into FOLDER in the layout of the hub (`hub/`), and `reference.safetensors`: the pixels,
the input of the first block, the tokens, and the tokens of the network in bf16, for each preset.
"""

from __future__ import annotations

import argparse
import importlib
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from references import Size, inputs_of, moving_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, help="channels, instead of those of the full-size network")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    width = args.width or importlib.import_module(f"references.{args.name}").WIDTH
    run(args.name, args.folder, Size(args.depth, width))


@torch.inference_mode()
def run(name: str, folder: Path, size: Size) -> None:
    """Write the weights, run the model, and save its features."""
    reference = importlib.import_module(f"references.{name}")
    model = reference.publish(folder / "hub", size).eval()
    images = [Image.fromarray(picture) for picture in moving_picture(reference.FRAMES)]
    outputs = {}
    first = model.get_submodule(reference.BLOCKS[0])[0]
    for preset, transform in reference.PRESETS.items():
        outputs[f"{preset}.pixels"] = pixels = transform(images)
        with inputs_of(first) as seen:
            outputs[f"{preset}.tokens"] = reference.tokens(model, pixels)
        outputs[f"{preset}.embeddings"] = seen[0]
    model.bfloat16()
    for preset in reference.PRESETS:
        outputs[f"{preset}.tokens_bf16"] = reference.tokens(model, outputs[f"{preset}.pixels"].bfloat16())
    outputs = {key: tensor.contiguous() for key, tensor in outputs.items()}
    save_file(outputs, folder / "reference.safetensors", {"version": version(reference.LIBRARY)})


if __name__ == "__main__":
    main()

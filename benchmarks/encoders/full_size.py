"""Measure the five encoders of MERV at full size: token shapes, parameters, seconds for one clip.

    python benchmarks/encoders/full_size.py [NAME ...] [--weights FOLDER_OR_HUB_ID] [--threads N]

Weights are random by default: shapes and seconds do not depend on them. The clip is 32 frames of 320×240
noise. Each encoder gets the number of frames of its spec, with its preset `merv`.
"""

from __future__ import annotations

import argparse
import time

import torch

from merv import Frames, find_encoder
from merv.video.transforms import preprocess

NAMES = ("languagebind", "dinov2", "vivit", "siglip", "clip")
ROW = "{:14} {:18} {:>20} {:>13} {:>9} {:>13} {:>9}"


def main() -> None:
    """Build, run and release one encoder after the other, so that 8 GB of memory suffice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--weights", metavar="FOLDER_OR_HUB_ID", help="(default: random weights)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, fp32, {args.threads} threads")
    print(ROW.format("encoder", "variant", "tokens", "parameters", "build s", "preprocess s", "encode s"))
    for name in args.names:
        print(measure(name, args.weights), flush=True)


def measure(name: str, weights: str | None) -> str:
    """Compute one row of the table. Exit if shape or size is not what the spec declares."""
    torch.manual_seed(0)
    started = time.perf_counter()
    encoder = find_encoder(name)(weights=weights)
    built = time.perf_counter()
    spec = encoder.spec
    noise = torch.randint(0, 256, (1, 32, 3, 240, 320), dtype=torch.uint8)
    frames = preprocess(Frames.of(noise[:, :: 32 // spec.num_frames]), spec.presets["merv"])
    preprocessed = time.perf_counter()
    values = encoder(frames).values
    encoded = time.perf_counter()
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    if values.shape != (1, *spec.grid, spec.embed_dim) or parameters != spec.parameters:
        expected = f"{[1, *spec.grid, spec.embed_dim]} and {spec.parameters} parameters"
        raise SystemExit(f"{name}: the spec says {expected}; got {list(values.shape)} and {parameters}.")
    tokens = "×".join(map(str, values.shape[1:]))
    seconds = (built - started, preprocessed - built, encoded - preprocessed)
    return ROW.format(
        name, encoder.variant, tokens, f"{parameters:,}", *(f"{second:.1f}" for second in seconds)
    )


if __name__ == "__main__":
    main()

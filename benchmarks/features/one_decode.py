"""Compare four encoders that share one decoding of a video with four extractors that each decode it.

    python benchmarks/features/one_decode.py [--full] [--clips FOLDER] [--quick] [--write]

Clips of 10 s at 640×360 with H.264, or those of --clips, are encoded without a store by one MultiEncoder with
four encoders, and by four MultiEncoders with one each. Both get the same frames, and both must give the same
features, bit for bit. The first table has encoders of the size of ViT-S, which are resized as those of MERV
are; the second one, with --full, those of MERV, on the first clip. All weights are random: they do not change
the time. The order alternates; numbers are medians of the repetitions.

Decoding alone, without resizing, and each encoder alone are timed, too. They give the predicted ratio,
(Σ dᵢ + Σ eᵢ) / (d + Σ eᵢ): d is decoding of the frames of all encoders, dᵢ of those of one, eᵢ resizing,
normalizing and encoding for one. Sharing can win more, since encoders with the same resizing share that, too.

Predictions, made before the first run, for one thread at 40 GFLOP/s:

    ViT-S      H.264 at 360p decodes at 1 ms a frame, and all 300 frames of a clip must be decoded, as it has
               one or two key frames: d = 0.3 s. 16 frames need 16 · 9.2 GFLOP, 4 s (dinov2 5 s), and resizing
               0.1 s. So (1.2 + 17.4) / (0.3 + 17.4) = 1.05.
    full       The same d. languagebind 3.4 TFLOP, dinov2 2.6, vivit 0.9, siglip 0.6: 190 s. So 1.005.

On a GPU, encoders are 100 times as fast and decoding is not: the ratio is then near 4.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import torch
from torch import Tensor

from merv import Encoder, EncoderSpec, MultiEncoder, Preset
from merv.data.sources import VIDEOS
from merv.demo.run import machine
from merv.encoders.dinov2 import MEAN, STD
from merv.types import Grid
from merv.video.open import open_video

REPEATS = 3
FPS, SIZE, SECONDS = 30, (640, 360), 10
NAMES = ("languagebind", "dinov2", "vivit", "siglip")
FULL = ("languagebind/large", "dinov2/large", "vivit", "siglip/base")


class ViTSmall(Encoder):
    """ViT-S/16 of timm, with the preprocessing of one of the encoders of MERV as a variant."""

    variants: ClassVar = {
        name: EncoderSpec(
            "vit_small",
            num_frames=16,
            grid=(16, 14, 14),
            embed_dim=384,
            presets={"merv": preset},
            patch=16,
            layer="last, after the final norm",
            parameters=21_665_664,
        )
        for name, preset in {
            "languagebind": Preset("crop", (224, 224), "bilinear_plain", mean=MEAN, std=STD),
            "vivit": Preset("squash", (224, 224), "bilinear"),
            "siglip": Preset("squash", (224, 224), "bicubic"),
        }.items()
    }

    def build(self) -> None:
        """Create the network."""
        import timm

        self.net = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)

    def tokens(self, windows: Tensor) -> Tensor:
        """Encode frames: [K, 1, 3, 224, 224] → [K, 196, 384]."""
        return self.net.forward_features(windows[:, 0])[:, 1:]


def make_clip(path: Path, seed: int) -> None:
    """Write 10 s of moving squares with noise: 0.7 Mbit/s, as in videos of the web at 360p."""
    generator, (width, height) = np.random.default_rng(seed), SIZE
    small = generator.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    picture = np.kron(small, np.ones((40, 40, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(FPS * SECONDS):
            noise = generator.integers(0, 24, picture.shape, dtype=np.uint8)
            pixels = np.roll(picture, (index, 3 * index), axis=(0, 1)) // 2 + noise
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def decode(clip: Path, indices: set[int]) -> None:
    """Decode frames and do nothing with them."""
    with open_video(clip) as reader:
        for _ in reader.frames(indices):
            pass


@dataclass
class Times:
    """Seconds by the clock and of the CPU, of one repetition over all clips.

    Attributes:
        together: One MultiEncoder with four encoders.
        apart: Four with one each.
        read: The reading of `together` alone.
        reads: The reading of `apart` alone, by encoder.
        decoding: Decoding of the frames of all encoders.
        decodings: Decoding of the frames of each encoder.
        encodings: Encoding by each encoder, of frames that were read before.
    """

    together: tuple[float, float]
    apart: tuple[float, float]
    read: tuple[float, float]
    reads: list[tuple[float, float]]
    decoding: tuple[float, float]
    decodings: list[tuple[float, float]]
    encodings: list[tuple[float, float]]

    def predicted(self, unit: int) -> float:
        """The ratio that follows from the times of the parts."""
        decode_all = sum(one[unit] for one in self.decodings)
        preprocess = sum(one[unit] for one in self.reads) - decode_all
        encode = sum(one[unit] for one in self.encodings) + preprocess
        return (decode_all + encode) / (self.decoding[unit] + encode)


def measure(
    together: MultiEncoder, apart: Sequence[MultiEncoder], clips: Sequence[Path], reverse: bool
) -> Times:
    """Time both ways and their parts once."""

    outputs: dict[int, list[Grid]] = {}

    def features(encoders: Sequence[MultiEncoder]) -> None:
        grids = [one.features(clip) for one in encoders for clip in clips]
        outputs[len(encoders)] = [grid[name] for name in together.encoders for grid in grids if name in grid]

    ways = [timed(lambda way=way: features(way)) for way in (apart, [together])[:: -1 if reverse else 1]]
    for one_grid, other_grid in zip(outputs[1], outputs[len(apart)], strict=True):
        assert torch.equal(one_grid.values, other_grid.values)
    apart_s, together_s = reversed(ways) if reverse else ways
    one_read, four_reads = together.reader(), [one.reader() for one in apart]
    read = timed(lambda: [one_read.read(clip) for clip in clips])
    # For each encoder: its clips
    reads = [timed(lambda reader=reader: [reader.read(clip) for clip in clips]) for reader in four_reads]
    indices = [[set(*reader.read(clip).indices.values()) for clip in clips] for reader in four_reads]
    union = [set().union(*sets) for sets in zip(*indices, strict=True)]

    def decode_all(sets: Sequence[set[int]]) -> None:
        for clip, wanted in zip(clips, sets, strict=True):
            decode(clip, wanted)

    encodings = []
    for one, reader in zip(apart, four_reads, strict=True):
        loaded = [reader(clip) for clip in clips]
        encodings.append(timed(lambda one=one, loaded=loaded: [one.features(video) for video in loaded]))
    return Times(
        together_s,
        apart_s,
        read,
        reads,
        timed(lambda: decode_all(union)),
        [timed(lambda sets=sets: decode_all(sets)) for sets in indices],
        encodings,
    )


def compare(
    title: str, encoders: Mapping[str, str | Encoder], clips: Sequence[Path], repeats: int
) -> list[str]:
    """Measure a set of encoders; return lines of text."""
    together = MultiEncoder(encoders, weights=None)
    apart = [MultiEncoder({name: together.encoder(name)}) for name in together.encoders]
    apart[-1].features(clips[0])  # warm-up
    runs = []
    for repeat in range(repeats):
        runs.append(measure(together, apart, clips, reverse=bool(repeat % 2)))
        print(f"{title} {repeat}: {runs[-1]}", file=sys.stderr)
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in encoder.parameters()) / 1e6:.0f}M × {encoder.spec.num_frames} frames"
        for name, encoder in together.named()
    )
    lines = [f"{title}, random weights, {len(clips)} clips, {repeats} repetitions", sizes, ""]
    lines.append(f"{'seconds a clip':34}{'clock':>9}{'CPU':>9}")

    def median_of(value: Callable[[Times, int], float]) -> list[float]:
        return [statistics.median(value(run, unit) for run in runs) for unit in (0, 1)]

    rows: dict[str, Callable[[Times, int], float]] = {
        "four extractors": lambda run, unit: run.apart[unit],
        "one decode": lambda run, unit: run.together[unit],
        "reading, four extractors": lambda run, unit: sum(one[unit] for one in run.reads),
        "reading, one decode": lambda run, unit: run.read[unit],
        "decoding alone, four extractors": lambda run, unit: sum(one[unit] for one in run.decodings),
        "decoding alone, one decode": lambda run, unit: run.decoding[unit],
        "encoding alone": lambda run, unit: sum(one[unit] for one in run.encodings),
    }
    for name, value in rows.items():
        wall, cpu = (seconds / len(clips) for seconds in median_of(value))
        lines.append(f"{name:34}{wall:9.3f}{cpu:9.3f}")
    ratios: dict[str, Callable[[Times, int], float]] = {
        "ratio": lambda run, unit: run.apart[unit] / run.together[unit],
        "ratio predicted from the parts": Times.predicted,
        "ratio of reading": lambda run, unit: sum(one[unit] for one in run.reads) / run.read[unit],
    }
    for name, value in ratios.items():
        wall, cpu = median_of(value)
        lines.append(f"{name:34}{wall:9.3f}{cpu:9.3f}")
    shares: dict[str, Callable[[Times, int], float]] = {
        "share of reading, four extractors": lambda run, u: sum(one[u] for one in run.reads) / run.apart[u],
        "share of reading, one decode": lambda run, unit: run.read[unit] / run.together[unit],
    }
    for name, value in shares.items():
        wall, cpu = median_of(value)
        lines.append(f"{name:34}{wall:9.1%}{cpu:9.1%}")
    return lines


def small_encoders() -> dict[str, str | Encoder]:
    """Four encoders of the size of ViT-S, with the preprocessing of those of MERV."""
    return {name: "dinov2/small" if name == "dinov2" else ViTSmall(name, weights=None) for name in NAMES}


def main() -> None:
    """Measure, print, and write the results if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also the encoders of MERV; takes half an hour")
    parser.add_argument("--clips", type=Path, help="a folder of videos (default: six are made)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="repetitions (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of the encoders (default: one per core)")
    parser.add_argument(
        "--quick", action="store_true", help="try the script with one clip and one repetition"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/one_decode.txt")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    text = [f"python {' '.join(sys.argv)}    # {machine()}; threads: {torch.get_num_threads()}"]
    number, repeats = (1, 1) if args.quick else (6, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        if args.clips is None:
            clips = [Path(folder, f"{seed}.mp4") for seed in range(number)]
            for seed, clip in enumerate(clips):
                make_clip(clip, seed)
        else:
            clips = sorted(path for path in args.clips.iterdir() if path.suffix.lower() in VIDEOS)[:number]
        parts = [("Four encoders of the size of ViT-S", small_encoders, clips)]
        if args.full:
            parts.append(
                ("The four encoders of MERV", lambda: dict(zip(NAMES, FULL, strict=True)), clips[:1])
            )
        for title, make_encoders, some in parts:
            lines = compare(title, make_encoders(), some, repeats)
            print("\n".join(["", *lines]), flush=True)
            text += ["", *lines]
    if args.write:
        (Path(__file__).parents[1] / "results" / "one_decode.txt").write_text("\n".join([*text, ""]))


if __name__ == "__main__":
    main()

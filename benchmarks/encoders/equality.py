"""Compare merv's encoders with the libraries that their weights come from, from raw frames to tokens.

    python benchmarks/encoders/equality.py [NAME ...] [--python NAME=PATH ...] [--write] [--compile]
        [--depth 4] [--threads 1]

NAME is a file of benchmarks/encoders/references; the default is all of them. Each reference runs in its own
process, with its own Python if --python names one (LanguageBind's library needs an older transformers than
merv). The reference writes random weights in the layout of the hub, and the features of a synthetic 320×240
video. merv's encoder gets the same folder and the same raw frames. --write puts the rows into the table of
docs/encoders.md; rows that are not measured again keep their date.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from einops import rearrange
from references import Size, moving_picture
from safetensors import safe_open
from torch import Tensor

from merv import Encoder, Frames, create_encoder
from merv.video.transforms import preprocess

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "encoders.md"
BEGIN, END = "<!-- equality: begin -->", "<!-- equality: end -->"
COLUMNS = (
    *("encoder", "weights", "preset", "reference", "blocks", "pixels"),
    *("fp32", "fp32 / std", "bf16 / std", "library in bf16 / std", "measured with"),
)
BOUND = 1e-4  # for the maximum difference in fp32


def main() -> None:
    """Print one row for each reference and preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--depth", type=int, default=4, help="blocks of each network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="Python with the library of a reference",
    )
    parser.add_argument("--write", action="store_true", help="put the rows into docs/encoders.md")
    parser.add_argument(
        "--compile", action="store_true", help="also run with torch.compile, and print the difference"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pythons = dict(pair.split("=", 1) for pair in args.python)
    names = args.names or sorted(path.stem for path in (HERE / "references").glob("[!_]*.py"))
    rows: dict[tuple[str, ...], str] = {}
    print(line(COLUMNS))
    for name in names:
        if name not in pythons and not installed(name):
            print(f"{name}: its library is not installed. Pass --python {name}=PATH of a Python that has it.")
            continue
        with tempfile.TemporaryDirectory() as folder:
            run_reference(name, Path(folder), args.depth, pythons.get(name, sys.executable), args.threads)
            rows.update(compare(name, Path(folder), args.depth))
            if args.compile:
                print(compiled(name, Path(folder), args.depth), flush=True)
            if args.write:
                write(rows)


def installed(name: str) -> bool:
    """Return whether this Python has the library of a reference."""
    try:
        return bool(version(importlib.import_module(f"references.{name}").LIBRARY))
    except ImportError:
        return False


def run_reference(name: str, folder: Path, depth: int, python: str, threads: int) -> None:
    """Run a reference with `python`; it writes weights and features into the folder."""
    command = [python, "-m", "references", name, str(folder), f"--depth={depth}", f"--threads={threads}"]
    subprocess.run(command, check=True, cwd=HERE, stdout=subprocess.DEVNULL)


def prepare(name: str, folder: Path, depth: int) -> tuple[Encoder, dict[str, Frames]]:
    """merv's encoder with the weights in the folder, and the preprocessed frames by preset."""
    reference = importlib.import_module(f"references.{name}")
    with reference.shrunk(Size(depth, reference.WIDTH)):
        encoder = create_encoder(reference.ENCODER, weights=str(folder / "hub"))
    frames = Frames.of(rearrange(torch.from_numpy(moving_picture(reference.FRAMES)), "t h w c -> 1 t c h w"))
    return encoder, {p: preprocess(frames, encoder.spec.presets[p]) for p in reference.PRESETS}


@torch.inference_mode()
def compare(name: str, folder: Path, depth: int) -> dict[tuple[str, ...], str]:
    """Compute and print one row of the table for each preset of the reference."""
    library = importlib.import_module(f"references.{name}").LIBRARY
    with safe_open(folder / "reference.safetensors", "pt") as file:
        reference, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    encoder, frames = prepare(name, folder, depth)
    exact = {preset: encoder(prepared).values[0] for preset, prepared in frames.items()}
    encoder.bfloat16()
    rows = {}
    for preset, prepared in frames.items():
        expected = reference[f"{preset}.tokens"]
        fp32 = Difference.of(exact[preset], expected)
        key = (encoder.spec.name, encoder.spec.source, preset, f"{library} {metadata['version']}")
        figures = (
            str(depth),
            f"{Difference.of(prepared.pixels[0], reference[f'{preset}.pixels']).maximum:.1g}",
            fp32.absolute(),
            fp32.relative(),
            Difference.of(encoder(prepared.to(torch.bfloat16)).values[0], expected).relative(),
            Difference.of(reference[f"{preset}.tokens_bf16"], expected).relative(),
            f"torch {torch.__version__.split('+')[0]}, {date.today()}",
        )
        rows[key] = line((*key, *figures))
        print(rows[key], flush=True)
        if fp32.maximum > BOUND:
            print(f"  NOT EQUAL: the maximum difference in fp32 is above {BOUND}")
    return rows


@torch.no_grad()
def compiled(name: str, folder: Path, depth: int) -> str:
    """Compare torch.compile's `encode` with the plain one, on one window of frames."""
    encoder, frames = prepare(name, folder, depth)
    pixels = frames["merv"].pixels[:, : max(encoder.spec.window_size, 2)]
    compiled_encode = torch.compile(encoder.encode, fullgraph=True)
    _, first_s = timed(lambda: compiled_encode(pixels))
    values, compiled_s = timed(lambda: compiled_encode(pixels))
    plain, plain_s = timed(lambda: encoder.encode(pixels))
    difference = Difference.of(values, plain).absolute()
    seconds = f"{plain_s:.2f} s plain, {compiled_s:.2f} s compiled, {first_s:.0f} s to compile"
    return f"{name} compiled: {difference} from plain; {pixels.shape[1]} frames {seconds}"


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    return run(), time.perf_counter() - started


@dataclass(frozen=True)
class Difference:
    """Maximum and mean difference between two tensors, and the standard deviation of the second."""

    maximum: float
    mean: float
    std: float

    @classmethod
    def of(cls, actual: Tensor, expected: Tensor) -> Difference:
        if actual.shape != expected.shape:
            raise SystemExit(
                f"Expected the library's shape {list(expected.shape)}; merv returned {list(actual.shape)}."
            )
        difference = (actual.double() - expected.double()).abs()
        return cls(difference.max().item(), difference.mean().item(), expected.double().std().item())

    def absolute(self) -> str:
        return f"{self.maximum:.1e}, {self.mean:.1e}"

    def relative(self) -> str:
        return f"{self.maximum / self.std:.1e}, {self.mean / self.std:.1e}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(rows: dict[tuple[str, ...], str]) -> None:
    """Put rows into the table of the page. Rows that were not measured again stay."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    old, after = rest.split(END)
    old_rows = [row.strip("| ").split(" | ") for row in old.splitlines()[3:]]
    table = {tuple(row[:4]): line(row) for row in old_rows} | rows
    lines = [line(COLUMNS), "|---" * len(COLUMNS) + "|", *(table[key] for key in sorted(table))]
    PAGE.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()

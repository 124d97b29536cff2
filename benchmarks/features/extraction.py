"""Measure `extract`: what a store costs, whether rate and memory are flat, and what a kill costs.

    python benchmarks/features/extraction.py [--parts overhead rate kill] [--quick] [--write]

Overhead: clips of one second, 64×64, with trained `efficientnet_lite` at the grid 16×8×8. Each block of 64
clips is extracted into an empty store on the disk, and encoded by the same reader and encoder without a
store; the order alternates. Some blocks are also extracted with `--store-dtype bfloat16`. The overhead is the
median of the ratios of the blocks, by the clock and in CPU time. CPU time depends less on other work on the
machine, but does not contain the waiting for the disk. Then the calls of the store are timed in a pass of
their own. With fewer threads, the encoder takes longer, and the share of the store is smaller.

Rate: `fake` at the grid 4×2×2, for growing numbers of clips that are made when they are read, each in a
process of its own. Memory is the peak of the resident set above its size before `extract`, after a warm-up.

Kill: `merv extract` of small clips is killed with SIGKILL and run again. The signal comes when a video has
just been encoded and, most of the time, is not stored yet.

Predictions, made before the first run; those for one thread after a smoke test:

    overhead   A record has 16·8·8·1280 float32 values, 5.24 MB: 1700 times the 3 kB of the clip. In
               store.txt, `put` takes 2.85 ms per MB on this machine, as `write` and `fsync` do: 15 ms a clip.
               Hashing, keys, two lookups and the header are 1 ms. A clip takes 244 ms without a store (16
               frames on two quiet cores). So 6.5 % in float32, above the 3 % that are the target; in bfloat16
               half of the bytes and 1 ms for the conversion, 3.7 %. With one thread a clip takes 420 ms:
               3.8 % and 2.1 %.
    rate       Flat from 100 clips on. With 10 clips it is higher: the header, which is written again for each
               clip, is short.
    memory     A store keeps a record and a key per clip in memory, and the result its keys: 3 kB a clip, so
               30 MB at 10 000 clips.
    kill       One clip at most: the one in progress. 64, a shard, are the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import torch

import merv.features.reader
import merv.features.shard
import merv.features.store
import merv.utils.files
from merv import FeatureStore, MultiEncoder
from merv.demo.run import machine
from merv.extraction.extract import extract
from merv.extraction.videos import Item
from merv.features.store import StoreDtype
from merv.utils.plot import COLORS

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("overhead", "rate", "kill")
REPEATS = 3
ENCODER = "efficientnet_lite"
FPS, SIZE = 25, 64
PER_BLOCK = 64  # as many as in a shard
BFLOAT16_BLOCKS = 5  # blocks that are also extracted in bfloat16
COUNTS = (10, 100, 1000, 10_000)
KILLS = (0.2, 0.5, 0.8)  # share of the clips that are encoded before the kill


def make_clip(path: Path, seed: int) -> None:
    """Write one second of random colored squares, which move to the right."""
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = np.kron(squares, np.ones((SIZE // 8, SIZE // 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for index in range(FPS):
            pixels = np.ascontiguousarray(np.roll(picture, index, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def make_clips(folder: Path, number: int) -> list[Item]:
    """Write clips, each with another content."""
    folder.mkdir()
    paths = [folder / f"{seed:05}.mp4" for seed in range(number)]
    for seed, path in enumerate(paths):
        make_clip(path, seed)
    return [Item(str(path), path) for path in paths]


# Overhead -------------------------------------------------------------------------------------


def encode_without(encoders: MultiEncoder, items: Sequence[Item]) -> None:
    """Do what `extract` does, without a store."""
    reader = encoders.reader()
    for item in items:
        loaded = reader(item.source, name=item.name)
        with torch.inference_mode():
            encoders.features([loaded])


def encode_into(
    folder: Path, encoders: MultiEncoder, items: Sequence[Item], dtype: StoreDtype | None
) -> None:
    """Extract into a new store."""
    merv.utils.files._digest.cache_clear()  # a file that was hashed is not read again
    with FeatureStore(folder, dtype=dtype) as store:
        result = extract(encoders, items, store)
    assert result.encoded == len(items), result


Times = dict[str, list[tuple[float, float]]]  # name → seconds by the clock and of the CPU, of each block


def block_times(folder: Path, encoders: MultiEncoder, blocks: Sequence[Sequence[Item]]) -> Times:
    """Time each block without a store, with one, and (some blocks) with one in bfloat16."""
    times: Times = {"no store": [], "float32": [], "bfloat16": []}
    for number, block in enumerate(blocks):
        names = list(times)[: 3 if number < BFLOAT16_BLOCKS else 2]
        for name in names if number % 2 else reversed(names):
            store = folder / f"{name}{number}"
            start, cpu = time.perf_counter(), time.process_time()
            if name == "no store":
                encode_without(encoders, block)
            else:
                encode_into(store, encoders, block, "bfloat16" if name == "bfloat16" else None)
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
            shutil.rmtree(store, ignore_errors=True)
        print(f"block {number}: " + ", ".join(f"{n} {times[n][-1]}" for n in names), file=sys.stderr)
    return times


def describe_overhead(times: Times, per_block: int) -> list[str]:
    """A table of the overhead by the clock and in CPU time."""
    lines = []
    for unit, measure in enumerate(("clock", "CPU")):
        base = [block[unit] for block in times["no store"]]
        lines.append(
            f"{measure:6}{'no store':10}{sum(base):8.1f} s  "
            f"{1e3 * statistics.median(base) / per_block:.0f} ms a clip"
        )
        for name in ("float32", "bfloat16"):
            seconds = [block[unit] for block in times[name]]
            ratios = [a / b - 1 for a, b in zip(seconds, base, strict=False)]
            more_s = statistics.median(a - b for a, b in zip(seconds, base, strict=False))
            lines.append(
                f"{measure:6}{name:10}{sum(seconds):8.1f} s  overhead {statistics.median(ratios):+.1%} "
                f"({min(ratios):+.1%} to {max(ratios):+.1%} in {len(ratios)} blocks), "
                f"{1e3 * more_s / per_block:+.1f} ms a clip"
            )
    return lines


class Timers:
    """Time spent in some functions, without that of the others that they call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = [0.0]  # for each call in progress: time of the calls within

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and adds its time to `name`."""

        def timed(*args: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                duration = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + duration - self._inner.pop()
                self._inner[-1] += duration

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the calls of a store and the steps within them."""
        calls: list[tuple[str, Any, str]] = [
            ("hash of the video", merv.features.reader, "content_digest"),
            ("look-up (get)", FeatureStore, "get"),
            ("copy to the CPU (put_all)", FeatureStore, "put_all"),
            ("conversion and digest (pack)", merv.features.store, "pack"),
            ("header", merv.features.shard, "_header"),
            ("lists of the shard (append)", merv.features.shard.ShardWriter, "append"),
            ("os.pwrite", os, "pwrite"),
            ("os.fsync", os, "fsync"),
            ("publishing (flush)", FeatureStore, "flush"),
        ]
        with ExitStack() as stack:
            for name, owner, attribute in calls:
                timed = self.timing(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            yield


def time_calls(
    folder: Path, encoders: MultiEncoder, items: Sequence[Item], dtype: StoreDtype | None
) -> list[str]:
    """Print the time of each kind of call, of one extraction."""
    timers, start = Timers(), time.perf_counter()
    with timers.watching():
        encode_into(folder, encoders, items, dtype)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    total = sum(timers.seconds.values())
    lines = [f"{'store calls, ' + (dtype or 'float32'):32}{'ms a clip':>10}{'share':>8}"]
    for name, spent in {"all": total, **timers.seconds}.items():
        lines.append(f"{name:32}{1e3 * spent / len(items):10.2f}{spent / seconds:8.2%}")
    return lines


def time_writes(folder: Path, records: int, size: int, pause_s: float) -> str:
    """Time `pwrite` and `fsync` of bytes of the same number, without a store."""
    data, spent = np.random.default_rng(0).bytes(size), 0.0
    with (folder / "raw").open("xb", buffering=0) as file:
        for record in range(records):
            time.sleep(pause_s)  # as long as a clip takes, so that the system can write meanwhile
            start = time.perf_counter()
            os.pwrite(file.fileno(), data, record * size)
            spent += time.perf_counter() - start
        start = time.perf_counter()
        os.fsync(file.fileno())
        spent += time.perf_counter() - start
    (folder / "raw").unlink()
    return f"pwrite and fsync of {size / 1e6:.2f} MB, without merv: {1e3 * spent / records:.1f} ms a clip"


def overhead(folder: Path, clips: int, per_block: int) -> list[str]:
    """Compare extractions with and without a store."""
    items = make_clips(folder / "clips", clips)
    blocks = [items[i : i + per_block] for i in range(0, clips, per_block)]
    encoders = MultiEncoder([ENCODER])
    encode_into(folder / "warm-up", encoders, items[:4], None)
    encode_without(encoders, items[:4])
    times = block_times(folder, encoders, blocks)
    threads = torch.get_num_threads()
    lines = [f"Overhead of the store: {clips} clips, {ENCODER}, threads: {threads}, blocks of {per_block}"]
    lines += describe_overhead(times, per_block)
    base_s = statistics.median(seconds for seconds, _ in times["no store"]) / per_block
    for dtype in (None, "bfloat16"):
        lines += ["", *time_calls(folder / "timed", encoders, items[:per_block], dtype)]
        size = 16 * 8 * 8 * 1280 * (2 if dtype else 4)
        lines.append(time_writes(folder, min(64, per_block), size, base_s))
    return lines


# Rate and memory ------------------------------------------------------------------------------


class MadeWhenRead(Sequence[Item]):
    """Clips of random pixels that exist only while they are read."""

    def __init__(self, number: int, prefix: str = "") -> None:
        self.number, self.prefix = number, prefix

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if index >= len(self):
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index + len(self.prefix) * 10**6)
        pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Item(f"{self.prefix}clip {index}", pixels)


def resident_mb(line: str) -> float:
    """`VmRSS` or `VmHWM`, its peak, of this process."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def measure_rate(number: int) -> None:
    """Extract in this process, and print what it took as JSON."""
    torch.set_num_threads(1)
    encoders = MultiEncoder(["fake"], grid=(4, 2, 2))
    with tempfile.TemporaryDirectory() as folder:
        with FeatureStore(Path(folder, "warm-up")) as store:
            extract(encoders, MadeWhenRead(70, "warm-up "), store)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before_mb = resident_mb("VmRSS")
        cpu = time.process_time()
        with FeatureStore(Path(folder, "store")) as store:
            seconds = extract(encoders, MadeWhenRead(number), store).seconds
            assert len(store) == number
        cpu_ms = 1e3 * (time.process_time() - cpu) / number
        print(json.dumps([number / seconds, resident_mb("VmHWM") - before_mb, before_mb, cpu_ms]))


def rates(counts: Sequence[int], repeats: int) -> dict[int, tuple[float, float, float, float]]:
    """Number of clips → clips per second, MB above the start and at the start, ms of CPU a clip; medians."""
    found: dict[int, list[list[float]]] = {number: [] for number in counts}
    for _ in range(repeats):
        for number in counts:
            command = [sys.executable, __file__, "--one-rate", str(number)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[number].append(json.loads(out.splitlines()[-1]))
            print(f"rate {number}: {found[number][-1]}", file=sys.stderr)
    columns = {number: zip(*runs, strict=True) for number, runs in found.items()}
    return {number: tuple(map(statistics.median, values)) for number, values in columns.items()}  # type: ignore[misc]


def describe_rates(measured: dict[int, tuple[float, float, float, float]], repeats: int) -> list[str]:
    """A table of rate and memory."""
    lines = [f"Rate and memory: fake, grid 4×2×2, one thread, medians of {repeats}"]
    for number, (rate, more_mb, before_mb, cpu_ms) in measured.items():
        lines.append(
            f"{number:6} clips  {rate:6.1f} clips/s  {cpu_ms:.2f} ms CPU a clip  "
            f"{more_mb:6.1f} MB above {before_mb:.0f} MB at the start"
        )
    return lines


def draw(measured: dict[int, tuple[float, float, float, float]], path: Path) -> None:
    """Draw rate and memory against the number of clips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    labels = ("clips per second", "peak memory (MB)")
    series = [
        [(COLORS[0], "extract", [rate for rate, *_ in measured.values()])],
        [
            (COLORS[1], "during extract", [before + more for _, more, before, _ in measured.values()]),
            (COLORS[5], "before it", [before for _, _, before, _ in measured.values()]),
        ],
    ]
    for axes, label, lines in zip(figure.subplots(1, 2), labels, series, strict=True):
        for color, name, values in lines:
            axes.plot(list(measured), values, "o-", color=color, label=name)
        for number, value in zip(measured, lines[0][2], strict=True):
            axes.annotate(
                f"{value:.0f}", (number, value), (0, 8), textcoords="offset points", ha="center", fontsize=9
            )
        axes.set_xscale("log")
        axes.set(xlabel="number of clips", ylim=(0, 1.25 * max(lines[0][2])), title=label)
        axes.set_xticks(list(measured), [f"{number:,}".replace(",", " ") for number in measured])
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(loc="lower right", fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)


# Kill -----------------------------------------------------------------------------------------


def run_noting(notes: Path, arguments: Sequence[str]) -> None:
    """Run `python -m merv …` in this process, and note the path of each video that was encoded."""
    features, encode, current = MultiEncoder.features, MultiEncoder.encode, [""]

    def noting_features(self: MultiEncoder, videos: Any, *args: Any, **options: Any) -> Any:
        current[0] = next(iter(videos[0].keys.values())).source
        return features(self, videos, *args, **options)

    def noting_encode(self: MultiEncoder, clips: Any) -> Any:
        encoded = encode(self, clips)
        with notes.open("a") as file:
            file.write(f"{current[0]}\n")
        return encoded

    sys.argv = ["merv", *arguments]
    replaced = {"features": noting_features, "encode": noting_encode}
    with mock.patch.multiple(MultiEncoder, **replaced):
        runpy.run_module("merv", run_name="__main__")


def read_notes(notes: Path) -> list[str]:
    """The videos that were encoded."""
    return notes.read_text().splitlines() if notes.exists() else []


def kill_once(folder: Path, clips: Path, after: int) -> str:
    """Kill an extraction when some videos were encoded, run it again, and say what was encoded twice."""
    options = ["--encoders", ENCODER, "--num-frames", f"{ENCODER}=2", "--grid", "2", "4", "4"]
    options += ["--num-workers", "1", "--out", str(folder / "store")]
    encoded, reported = [], ""
    for run in ("first", "second"):
        notes = folder / f"{run}.txt"
        command = [sys.executable, __file__, "--noting", str(notes), "extract", str(clips), *options]
        with (folder / f"{run}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            while run == "first" and process.poll() is None:
                if len(read_notes(notes)) >= after:
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.001)
            status = process.wait()
        log_text = (folder / f"{run}.log").read_text()
        assert status == (-signal.SIGKILL if run == "first" else 0), log_text
        encoded.append(read_notes(notes))
        reported = log_text
    total = len(list(clips.iterdir()))
    assert set(encoded[0]) | set(encoded[1]) == {str(path) for path in clips.iterdir()}
    with FeatureStore(folder / "store", read_only=True) as store:
        assert len(store) == total
    summary = next(line for line in reported.splitlines() if " encoded, " in line)
    again = len(set(encoded[0]) & set(encoded[1]))
    first, rest = len(encoded[0]), summary.split(": ")[1]
    return f"killed after {first} of {total}; run again: {rest} Encoded twice: {again}"


def kills(folder: Path, number: int) -> list[str]:
    """Kill extractions early, in the middle and late."""
    make_clips(folder / "clips", number)
    lines = ["Kill of merv extract by SIGKILL; at most 64 clips, one shard, may be encoded twice"]
    for share in KILLS:
        (one := folder / f"killed {share}").mkdir(parents=True)
        lines.append(kill_once(one, folder / "clips", round(share * number)))
        shutil.rmtree(one)
    return lines


def write_sections(measured: dict[str, str], path: Path) -> None:
    """Write what was measured; the sections of other parts stay as they are."""
    old = path.read_text().rstrip().split("\n\n\n") if path.exists() else []
    sections = {section.partition(" ")[0].lower(): section for section in old} | measured
    path.write_text("\n\n\n".join(sections[part] for part in PARTS if part in sections) + "\n")


def main() -> None:
    """Measure, print, and write the results if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--clips", type=int, default=2000, help="clips for the overhead (default: 2000)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="repetitions of the rate (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of the encoder (default: one per core)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="try the script with few clips")
    parser.add_argument("--write", action="store_true", help="write results/extraction.txt and .png")
    parser.add_argument("--one-rate", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_rate:
        measure_rate(args.one_rate)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    out = Path(tempfile.mkdtemp(dir=args.folder))
    command, sections = f"python {' '.join(sys.argv)}    # {machine()}", {}
    try:
        for part in args.parts:
            (folder := out / part).mkdir()
            if part == "overhead":
                lines = overhead(folder, *((16, 8) if args.quick else (args.clips, PER_BLOCK)))
            elif part == "rate":
                measured = rates(COUNTS[:2] if args.quick else COUNTS, args.repeats)
                lines = describe_rates(measured, args.repeats)
                draw(measured, RESULTS / "extraction.png" if args.write else out / "extraction.png")
            else:
                lines = kills(folder, 20 if args.quick else 200)
            print("\n".join(["", *lines]), flush=True)
            sections[part] = "\n".join([lines[0], command, "", *lines[1:]])
    finally:
        shutil.rmtree(out)
    if args.write:
        write_sections(sections, RESULTS / "extraction.txt")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--noting"]:
        run_noting(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()

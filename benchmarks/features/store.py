"""Measure a feature store: reading against the file system, the overhead of writing, and a flat rate.

    python benchmarks/features/store.py [--folder FOLDER] [--write]

Reads: records of 7.34 MB (what four encoders give at 16×8×8 in bf16) by `get`, with and
without digests, against `os.pread` of the same bytes into a new buffer; warm, and cold after the pages of the
file were dropped with `posix_fadvise`. CPU is that of the process. Writes: time of `put` and `flush` against
`os.write` and `fsync` of the same bytes. Rate: clips per second and memory of an extraction with `fake`, for
growing numbers of clips. Reads take turns, in another order each time; their ratios are medians of the ratios
within a turn. Writes are medians of five repetitions.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from merv import FeatureStore, MultiEncoder
from merv.extraction.extract import extract
from merv.extraction.videos import Item
from merv.features.shard import FeatureKey
from merv.types import Grid

REPEATS = 5
TURNS = 20
RECORDS = 24
DIM = 3584  # 16 × 8 × 8 × 3584 bf16 values: 7.34 MB
COUNTS = (10, 100, 1000)


def some_record(number: int) -> tuple[FeatureKey, Grid]:
    """A record of 7.34 MB of random values."""
    generator = torch.Generator().manual_seed(number)
    values = torch.randint(-(2**15), 2**15, (1, 16, 8, 8, DIM), generator=generator, dtype=torch.int16)
    grid = Grid(
        values.view(torch.bfloat16).nan_to_num(),
        torch.arange(16.0, dtype=torch.float64)[None],
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
        torch.ones(1, 16, 8, 8, dtype=torch.bool),
    )
    return FeatureKey("{}", str(number), "four encoders", f"{number}.mp4"), grid


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def drop_pages(folder: Path) -> None:
    """Let the system forget the pages of all files in a folder."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def reads(folder: Path) -> list[str]:
    """Compare `get` with `os.pread`."""
    with FeatureStore(folder) as store:
        for number in range(RECORDS):
            store.put(*some_record(number))
    stores = {verify: FeatureStore(folder, verify=verify) for verify in (True, False)}
    keys = [some_record(number)[0] for number in range(RECORDS)]
    records = list(stores[True].records())
    for store in stores.values():
        len(store)
    files = {record.shard: os.open(folder / record.shard, os.O_RDONLY) for record in records}

    def pread() -> None:
        for record in records:
            os.preadv(files[record.shard], [bytearray(record.size)], record.offset)

    def get(verify: bool) -> None:
        for key in keys:
            stores[verify].get(key)

    work = {
        "pread": pread,
        "get, digests": lambda: get(True),
        "get, no digests": lambda: get(False),
    }
    lines = [f"{RECORDS} records of {records[0].size / 1e6:.2f} MB"]
    for pages in ("warm", "cold"):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
        for turn in range(TURNS + 1):  # the first one is not counted
            order = list(work) if turn % 2 else list(reversed(work))
            for name in order:
                if pages == "cold":
                    drop_pages(folder)
                times[name].append(timed(work[name]))
        for name, measured in times.items():
            pairs = zip(times["pread"][1:], measured[1:], strict=True)
            ratio = statistics.median(base / wall for (base, _), (wall, _) in pairs)
            wall = statistics.median(wall for wall, _ in measured[1:])
            cpu = statistics.median(cpu for _, cpu in measured[1:]) / RECORDS
            rate = RECORDS * records[0].size / wall / 1e9
            lines.append(
                f"{pages}  {name:16} {rate:6.2f} GB/s  {ratio:5.0%} of pread  {cpu * 1e3:5.2f} ms CPU"
            )
    return lines


def writes(folder: Path) -> list[str]:
    """Compare `put` and `flush` with `os.write` and `fsync`."""
    records = [some_record(number) for number in range(8)]
    times: dict[str, list[float]] = {"write": [], "put": []}
    for repeat in range(REPEATS):

        def write(path: Path = folder / f"raw{repeat}") -> None:
            file = os.open(path, os.O_WRONLY | os.O_CREAT)
            for _, grid in records:
                os.write(file, grid.values.view(torch.uint8).numpy().data)
            os.fsync(file)
            os.close(file)

        def put(path: Path = folder / f"store{repeat}") -> None:
            with FeatureStore(path) as store:
                for key, grid in records:
                    store.put(key, grid)

        times["write"].append(timed(write)[0])
        times["put"].append(timed(put)[0])
    write_s, put_s = (statistics.median(times[name]) / len(records) for name in ("write", "put"))
    return [f"write {write_s * 1e3:.1f} ms a record; put {put_s * 1e3:.1f} ms ({put_s / write_s:.2f}×)"]


def rates(folder: Path) -> list[str]:
    """Extract growing numbers of clips with `fake`."""
    encoders, lines = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2)), []
    for count in COUNTS:
        clips = [torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8) for _ in range(count)]
        items = [Item(str(i), clip) for i, clip in enumerate(clips)]
        without = timed(lambda clips=clips: [encoders.features(clip) for clip in clips])[0]
        with FeatureStore(folder / f"rate{count}") as store:
            seconds = timed(lambda items=items, store=store: extract(encoders, items, store))[0]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        lines.append(
            f"{count:6} clips  {count / seconds:6.1f} clips/s  {seconds / without - 1:+.1%} over no store  "
            f"{memory:.0f} MB"
        )
    return lines


def main() -> None:
    """Measure, print, and write the results if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/store.txt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        lines = ["Reads", *reads(folder / "reads"), "", "Writes", *writes(folder), "", "Rate", *rates(folder)]
    finally:
        shutil.rmtree(folder)
    text = "\n".join([f"python {' '.join(sys.argv[:1])}", "", *lines, ""])
    print(text)
    if args.write:
        (Path(__file__).parents[1] / "results" / "store.txt").write_text(text)


if __name__ == "__main__":
    main()

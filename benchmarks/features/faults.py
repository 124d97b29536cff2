"""Kill extractions in every phase, fill the disk at every write, and compare what is stored in the end.

    python benchmarks/features/faults.py [--each 5] [--write]

Kills: an extraction of clips is a process that gets SIGKILL in one phase: while a clip is read, while it is
encoded, in the middle of writing its data or the header, before or after the shard is published. Another
extraction completes the store. Full disk: a system call that writes fails in the middle of its data, once for
each call; the extraction stops, and another one completes the store. Two writers: two extractions of the same
clips run at the same time. In the end every record must be there once, valid, and equal to that of an
undisturbed extraction, bit for bit. The last column counts the clips that were encoded twice, among them the
one in progress.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import merv.features.reader
import merv.features.store
from merv import FeatureStore, MultiEncoder
from merv.extraction.extract import extract
from merv.extraction.videos import Item
from merv.features import places
from merv.features.direct import BLOCK
from merv.features.maintenance import verify

CLIPS = 14
PER_SHARD = 4
torch.set_num_threads(1)
merv.features.store.VIDEOS_PER_SHARD = PER_SHARD
ENCODERS = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2))
generator = torch.Generator().manual_seed(0)
ITEMS = [
    Item(str(i), torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator))
    for i in range(CLIPS)
]


def run(folder: Path, encoded: Path | None = None) -> None:
    """Extract all clips; note each one that was encoded in a file."""
    encode = MultiEncoder.encode

    def noting(self, clips):  # type: ignore[no-untyped-def]
        if encoded is not None and "fake" in clips[0].frames:  # called for each encoder
            with encoded.open("a") as file:
                file.write("x")
        return encode(self, clips)

    MultiEncoder.encode = noting  # type: ignore[method-assign]
    with FeatureStore(folder) as store:
        extract(ENCODERS, ITEMS, store)


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a process of its own, and return the number of the process."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            logging.exception("failed")
            os._exit(1)
    return process


def wait(process: int) -> int:
    """Wait for a process, and return its status."""
    return os.waitpid(process, 0)[1]


def after(owner: object, name: str, count: int, act: Callable[..., object]) -> None:
    """Call `act` in place of the call number `count` of a function."""
    original, calls = getattr(owner, name), [0]

    def watched(*args: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == count:
            HAPPENED.touch()
            return act(*args, **options)
        return original(*args, **options)

    setattr(owner, name, watched)


def kill(*_args: object, **_options: object) -> None:
    """End this process as the system does when the memory is full."""
    os.kill(os.getpid(), signal.SIGKILL)


REAL_PWRITE = os.pwrite
HAPPENED = Path(tempfile.mkdtemp(), "happened")  # a file that a fault makes


def write_half(then: Callable[[], object]) -> Callable[..., object]:
    """A replacement of `os.pwrite` that writes half of the data, in whole blocks for direct writes."""

    def half(file: int, data: object, offset: int) -> object:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        REAL_PWRITE(file, view[: len(view) // 2 // BLOCK * BLOCK], offset)
        return then()

    return half


def no_space() -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def phases(each: int) -> list[tuple[str, Callable[[], None]]]:
    """Name and fault of each kill."""
    result: list[tuple[str, Callable[[], None]]] = []
    for i in range(each):
        clip, publish = 1 + i * (CLIPS - 1) // max(each - 1, 1), 1 + i % 2
        result += [
            ("reading", lambda n=clip: after(merv.features.reader, "prepare", n, kill)),
            ("encoding", lambda n=clip: after(ENCODERS.encoder("fake"), "encode", n, kill)),
            (
                "writing",
                lambda n=2 * clip - i % 2: after(os, "pwrite", n, write_half(kill)),
            ),  # header or data
            ("before publishing", lambda n=publish: after(places.LocalFolder, "publish", n, kill)),
            ("syncing", lambda n=publish: after(os, "fsync", n, kill)),
            (
                "after publishing",
                lambda n=publish: after(FeatureStore, "_open_writer", PER_SHARD * n + 1, kill),
            ),
        ]
    return result


def check(folder: Path, reference: FeatureStore) -> str:
    """What is wrong with a store; empty if nothing is."""
    _, damaged = verify(FeatureStore(folder))
    store = FeatureStore(folder)
    if damaged or len(store) != len(reference):
        return f"{len(damaged)} damaged, {len(store)} of {len(reference)} records"
    for key in reference:
        expected, grid = reference.get(key), store.get(key)
        if grid is None or any(not torch.equal(t, vars(grid)[n]) for n, t in vars(expected).items()):
            return f"{key.source} differs"
    leftovers = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return f"left over: {leftovers}" if leftovers else ""


def main() -> None:
    """Run all faults and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--each", type=int, default=5, help="kills in each phase (default: 5)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/store_faults.txt")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    out = Path(tempfile.mkdtemp())
    wait(forked(lambda: run(out / "reference")))
    reference = FeatureStore(out / "reference")
    rows: dict[str, list[int]] = {}  # phase → faults, completed, right, clips encoded twice
    problems = []

    def disturbed(name: str, number: int, fault: Callable[[], None], killed: bool) -> None:
        folder, encoded = out / f"store{number}", out / f"encoded{number}"
        encoded.touch()

        def faulty() -> None:
            fault()
            run(folder, encoded)

        HAPPENED.unlink(missing_ok=True)
        status = wait(forked(faulty))
        happened = HAPPENED.exists() and (os.WIFSIGNALED(status) if killed else os.WIFEXITED(status))
        completed = wait(forked(lambda: run(folder, encoded))) == 0
        problem = check(folder, reference)
        if problem or not happened:
            problems.append(f"{name} {number}: {problem or 'the fault did not happen'}")
        row = rows.setdefault(name, [0, 0, 0, 0])
        again = encoded.stat().st_size - CLIPS if killed else 0
        for i, value in enumerate((happened, completed, not problem, max(0, again))):
            row[i] += int(value)
        shutil.rmtree(folder, ignore_errors=True)

    for number, (name, fault) in enumerate(phases(args.each)):
        disturbed(f"killed {name}", number, fault, killed=True)
    for number in range(1, 31):
        name = "disk full at a write"
        disturbed(name, 1000 + number, lambda n=number: after(os, "pwrite", n, write_half(no_space)), False)
    for number in range(args.each):
        folder = out / f"two{number}"
        statuses = [wait(p) for p in [forked(lambda f=folder: run(f)) for _ in range(2)]]
        problem = check(folder, reference)
        problems += [f"two writers {number}: {problem}"] if problem else []
        row = rows.setdefault("two writers", [0, 0, 0, 0])
        for i, value in enumerate((1, statuses == [0, 0], not problem, 0)):
            row[i] += int(value)
    shutil.rmtree(out)
    lines = [f"python {' '.join(sys.argv[:1])}  # {CLIPS} clips, 2 encoders, {PER_SHARD} clips a shard", ""]
    lines += [f"{'':26}{'faults':>8}{'completed':>11}{'right':>7}{'clips encoded twice':>21}"]
    lines += [f"{name:26}{a:8}{b:11}{c:7}{d:21}" for name, (a, b, c, d) in rows.items()]
    text = "\n".join([*lines, "", *problems, ""])
    print(text)
    if args.write:
        (Path(__file__).parents[1] / "results" / "store_faults.txt").write_text(text.rstrip() + "\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()

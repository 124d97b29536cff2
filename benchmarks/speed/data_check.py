"""Measure how many conversations per second `merv data check` reads.

    python benchmarks/speed/data_check.py [--videos 600] [--rows 3000] [--workers 2]

The data set is generated: H.264 clips of 10 s and 320×240, and conversations of random words about them, by
default five about each. There are three modes: "none" reads only the rows; "probe", the default, scans each
clip and decodes its first frame; "decode" also decodes 8 frames of each clip. Times are wall-clock seconds
of one run, including the start of the workers. The script writes them to benchmarks/results/data_check.txt,
with the name of the machine.

Before the first run, we expected 2000 conversations per second for "none", 300 for "probe" and 100 for
"decode". On a busy machine, we measured 1578, 511 and 220. For "none", starting the workers takes most of the
time.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

from merv.data.check import check_data
from merv.demo.run import machine
from merv.testing import make_video

RESULT = Path(__file__).parent.parent / "results" / "data_check.txt"
WORDS = ("what", "who", "where", "when", "the", "a", "cat", "dog", "hand", "ball", "left", "right", "two")
ROW = "{:8} {:>14} {:>6} {:>9} {:>16}"


def main() -> None:
    """Generate the data set, check it in three modes, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=int, default=600)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--machine", default=machine(), help="name of the machine in the table")
    args = parser.parse_args()
    lines = [
        f"python benchmarks/speed/data_check.py --videos {args.videos} --rows {args.rows} "
        f"--workers {args.workers}    # {args.machine}",
        "",
        ROW.format("media", "conversations", "clips", "seconds", "conversations/s"),
    ]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        file = make_set(Path(folder), args.videos, args.rows)
        for media in "none", "probe", "decode":
            begun = time.perf_counter()
            report = check_data(file, media=media, num_workers=args.workers)  # type: ignore[arg-type]
            took_s = time.perf_counter() - begun
            assert len(report.valid) == args.rows, report.invalid[:3]
            rate = f"{args.rows / took_s:.0f}"
            lines.append(ROW.format(media, args.rows, args.videos, f"{took_s:.2f}", rate))
            print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


def make_set(folder: Path, videos: int, rows: int) -> Path:
    """Write a JSONL file of conversations in LLaVA's format, and one file per clip."""
    drawn = random.Random(0)
    first = make_video(folder / "0.mp4", frames=250, fps=25, size=(320, 240), codec="libx264")
    # All clips have the same frames, but their files differ in size, so that contents are not compared.
    for number in range(1, videos):
        shutil.copyfile(first, clip := folder / f"{number}.mp4")
        with clip.open("ab") as file:
            file.write(b"\0\0\0" + bytes([8 + number % 200]) + b"free" + bytes(number % 200))
            file.write(b"".join([b"\0\0\0\x08free"] * (number // 200)))
    lines = []
    for number in range(rows):
        said = [" ".join(drawn.choices(WORDS, k=drawn.randint(5, 40))) for _ in range(4)]
        turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
        turns[0]["value"] = "<video>\n" + turns[0]["value"]
        lines.append(json.dumps({"id": number, "video": f"{number % videos}.mp4", "conversations": turns}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    return folder / "set.jsonl"


if __name__ == "__main__":
    main()

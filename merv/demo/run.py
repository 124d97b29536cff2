"""The demo: make clips, ask a trained model about those that training never saw, draw one."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merv.demo.clips import Split

COUNTS: dict[Split, int] = {"train": 128, "held_out": 48, "unseen": 24}
QUESTIONS = 6  # of each clip


def make_data(out: Path, counts: Mapping[Split, int], seed: int) -> None:
    """Render the clips of each split that are not there yet, and write their questions."""
    from tqdm import tqdm

    from merv.demo.clips import make_clips
    from merv.demo.material import things
    from merv.demo.questions import rows, write_rows

    shown = things()
    out.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        with tqdm(total=count, desc=f"{split} clips", unit="clip", mininterval=1.0) as bar:
            clips = make_clips(
                out / "clips",
                split,
                count,
                things=shown,
                seed=seed,
                progress=lambda ready, total, bar=bar: bar.update(ready - bar.n),  # type: ignore[misc]
            )
            bar.update(count - bar.n)
        local = [replace(clip, path=clip.path.relative_to(out)) for clip in clips]
        write_rows(out / f"{split}.jsonl", rows(local, shown, per_clip=QUESTIONS, seed=seed))


def evaluate(out: Path) -> tuple[Any, dict[str, Any]]:
    """The trained model, and its accuracy by kind of question and split."""
    from tqdm import tqdm

    from merv.data.sources import read_samples
    from merv.demo.questions import majority_accuracy, read_rows
    from merv.features.store import FeatureStore
    from merv.models.video_llm import VideoLLM

    model = VideoLLM.from_pretrained(out / "model", feature_store=FeatureStore(out / "features"))
    results: dict[str, Any] = {}
    for split in ("held_out", "unseen"):
        samples = read_samples(out / f"{split}.jsonl")
        right: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
        batches = [samples[i : i + 8] for i in range(0, len(samples), 8)]
        for batch in tqdm(batches, f"Asking about {split} clips", unit="8 clips"):
            seen = model.exact_match([sample.conversations for sample in batch])
            blind = model.exact_match([without_video(sample.conversations) for sample in batch])
            for sample, *hits in zip(batch, seen, blind, strict=True):
                for kind, with_video, without in zip(sample.kinds, *hits, strict=True):
                    right[kind].append((with_video, without))
        prior = majority_accuracy(read_rows(out / "train.jsonl"), read_rows(out / f"{split}.jsonl"))
        results[split] = {
            kind: {
                "video": _percent(hit for hit, _ in hits),
                "no_video": _percent(hit for _, hit in hits),
                "commonest": round(100 * prior[kind], 1),
                "questions": len(hits),
            }
            for kind, hits in sorted(right.items())
        }
    return model, results


def without_video(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The same conversations as text only."""
    return [
        [
            {**turn}
            if isinstance(turn["content"], str)
            else {**turn, "content": [part for part in turn["content"] if part["type"] == "text"]}
            for turn in talk
        ]
        for talk in conversations
    ]


def show(model: Any, out: Path) -> Path:
    """Ask three questions of a held-out clip of several shots, print the answers, draw the clip."""
    from merv.demo.questions import NUMBERS, read_rows
    from merv.models.chat import user_message
    from merv.utils.plot import draw_clip
    from merv.video.load import load_video

    rows = read_rows(out / "held_out.jsonl")
    row = next(row for row in rows if len(row.shots) == 3)
    video = out / row.video
    names = [name for name, _, _ in row.shots]
    asked = [
        ("What is shown first?", names[0]),
        ("What is shown last?", names[-1]),
        ("How many shots are there?", NUMBERS[len(names) - 1]),
    ]
    said = model.generate([user_message(question, video) for question, _ in asked], max_new_tokens=8)
    for (question, wanted), answer in zip(asked, said, strict=True):
        print(f"  {question}  {answer}   (right: {wanted})")
    encoded = model.encode(user_message(asked[0][0], video))
    frames = load_video(video, num_frames=8)
    assert frames is not None  # only on_error="skip" gives None
    shots = ", ".join(f"{name} {start:.1f}–{end:.1f} s" for name, start, end in row.shots)
    draw_clip(
        [frame.permute(1, 2, 0).numpy() for frame in frames.pixels[0]],
        frames.times_s[0].tolist(),
        None if encoded.mix_weights is None else encoded.mix_weights[0].mean(dim=(2, 3)),
        next(iter(encoded.features.values())).times_s[0].tolist(),
        list(model.vision.encoders),
        [(question, answer, wanted) for (question, wanted), answer in zip(asked, said, strict=True)],
        out / "clip.png",
        f"A held-out clip: {shots}",
    )
    return out / "clip.png"


def print_table(results: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    titles = {
        "held_out": "Held-out clips: the same things in orders, crops and lengths that training never had",
        "unseen": "Clips with photographs that training never showed or named",
    }
    for split, title in titles.items():
        table = Table(title=title, title_justify="left", box=box.ASCII2)
        for column in ("question", "with video %", "without %", "commonest answer %", "asked"):
            table.add_column(column, justify="left" if column == "question" else "right")
        for kind, row in results[split].items():
            cells = (row["video"], row["no_video"], row["commonest"], row["questions"])
            table.add_row(kind, *map(str, cells))
        Console(width=100).print(table)


def _percent(hits: Any) -> float:
    values = list(hits)
    return round(100 * sum(values) / len(values), 1)


def machine() -> str:
    """Processor and cores, for whoever reads the numbers later."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"

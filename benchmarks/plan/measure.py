"""Compare `merv plan` with real runs: predicted and measured FLOPs and memory of a training step.

    python benchmarks/plan/measure.py --out benchmarks/results/plan.md
    python benchmarks/plan/measure.py --only projector full

Each setting runs in a process of its own. It trains a transformer with random weights for a few steps with
Lightning, as `merv fit` does. Measured FLOPs come from torch's FlopCounterMode. Measured memory comes from
the profiler events of torch's allocator, not from the counter of `merv plan`: all bytes allocated since the
model was loaded, at the peak of a step after the first. Unlike GPU allocators, CPU allocators have no peak
statistics.
The resident memory of the process is printed too; it includes Python, libraries and freed pages.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

LLAMA = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
QWEN = {**LLAMA, "num_key_value_heads": 2}
BIG = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 10}
FAKES = {"encoders": ["fake", "fake/video"], "feature_store": "memory"}


@dataclass(frozen=True)
class Setting:
    """Kind and config of the LLM, options of a recipe, and the questions that `write` writes."""

    llm: tuple[str, dict[str, Any]]
    model: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 4
    questions: int = 1
    characters: int = 400


SETTINGS = {
    "projector": Setting(("llama", LLAMA), {**FAKES, "grid": [8, 4, 4]}),
    "projector, checkpointed": Setting(
        ("llama", LLAMA), {**FAKES, "grid": [8, 8, 8], "gradient_checkpointing": True}
    ),
    "lora, bf16, questions share rows": Setting(
        ("qwen2", QWEN),
        {**FAKES, "grid": [16, 4, 4], "dtype": "bf16", "trainable": ["projector", "mixer", "lora"]},
        questions=4,
        characters=120,
    ),
    "full": Setting(
        ("llama", BIG), {**FAKES, "grid": [4, 4, 4], "trainable": ["projector", "mixer", "llm"]}, batch_size=2
    ),
    "full, bf16-mixed": Setting(
        ("llama", BIG),
        {**FAKES, "grid": [8, 4, 4], "trainable": ["projector", "mixer", "llm"]},
        {"precision": "bf16-mixed"},
        batch_size=2,
    ),
    "full, two micro-batches, checkpointed": Setting(
        ("qwen2", QWEN),
        {
            **FAKES,
            "grid": [8, 4, 4],
            "trainable": ["projector", "mixer", "llm"],
            "gradient_checkpointing": True,
        },
        {"accumulate_grad_batches": 2},
    ),
    "projector, bf16, EfficientNet in each step": Setting(
        ("llama", LLAMA),
        {"encoders": ["efficientnet_lite"], "grid": [16, 3, 3], "dtype": "bf16", "mixer": "gate"},
        batch_size=2,
    ),
    "lora, SigLIP of 3 blocks in each step": Setting(
        ("llama", LLAMA),
        {
            "encoders": ["shallow:ShallowSigLIP", "fake"],
            "weights": {"ShallowSigLIP": None},
            "num_frames": {"ShallowSigLIP": 8},
            "grid": [8, 7, 7],
            "mixer": "concat",
            "trainable": ["projector", "mixer", "lora"],
        },
        batch_size=2,
    ),
}


def write(setting: Setting, folder: Path) -> None:
    """Write an LLM with random weights, its tokenizer, clips, and questions of equal length about them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from merv.testing import make_video, tiny_llm

    tiny_llm(folder / "llm")  # for its tokenizer
    kind, options = setting.llm
    config, network = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[
        kind
    ]
    torch.manual_seed(0)
    network(config(**options, vocab_size=8000, pad_token_id=0)).save_pretrained(folder / "llm")
    rows = []
    for i in range(8):
        make_video(folder / f"{i}.mp4", frames=16 + i)
        asked = [
            {"question": "w" * setting.characters + str(q), "answer": "a" * 60}
            for q in range(setting.questions)
        ]
        rows.append(json.dumps({"video": f"{i}.mp4", "questions": asked}))
    (folder / "train.jsonl").write_text("\n".join(rows))


def compare(name: str) -> dict[str, Any]:
    """Predict and measure one setting."""
    import torch
    from lightning import Trainer

    from merv.data.module import ChatData
    from merv.training.module import Training
    from merv.training.plan import Setup, make_plan

    torch.set_num_threads(1)
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(setting, folder)

        def build() -> tuple[Any, Any]:
            data = ChatData(str(folder / "train.jsonl"), batch_size=setting.batch_size, num_workers=0)
            return Training(str(folder / "llm"), **setting.model), data

        precision = setting.trainer.get("precision", "32-true")
        accumulate = setting.trainer.get("accumulate_grad_batches", 1)
        plan = make_plan(*build(), Setup(accumulate=accumulate, precision=precision), gpu=False)
        training, data = build()
        watch = Watch(accumulate)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            **quiet,
            **setting.trainer,
            accelerator="cpu",
            max_steps=3,
            max_epochs=9,
            callbacks=[watch.callback()],
            enable_model_summary=False,
            default_root_dir=folder,
        )
        with watch.profiler:
            trainer.fit(training, data)
        memory, flops = watch.peak(), watch.flops
    return {
        "name": name,
        "flops": [sum(plan.flops.values()), flops],
        "memory": [plan.peak, memory],
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class Watch:
    """Measures memory in the second step of the optimizer, FLOPs in the third."""

    def __init__(self, accumulate: int) -> None:
        from torch.profiler import ProfilerActivity, profile
        from torch.utils.flop_counter import FlopCounterMode

        self.accumulate = accumulate
        self.counter = FlopCounterMode(display=False)
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.flops = 0

    def callback(self) -> Any:
        """The callback for Lightning's Trainer."""
        from lightning.pytorch.callbacks import Callback
        from torch.profiler import record_function

        watch, marker = self, record_function("the step")

        class Calls(Callback):
            def on_fit_start(self, trainer: Any, module: Any) -> None:
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.data = tensor.data.clone()  # copy them from mapped files, as to a GPU

            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
                if trainer.fit_loop.epoch_loop.total_batch_idx == watch.accumulate:
                    marker.__enter__()
                if trainer.fit_loop.epoch_loop.total_batch_idx == 2 * watch.accumulate:
                    watch.counter.__enter__()

            def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, index: int) -> None:
                if trainer.fit_loop.epoch_loop.total_batch_idx == 2 * watch.accumulate - 1:
                    marker.__exit__(None, None, None)
                if trainer.fit_loop.epoch_loop.total_batch_idx == 3 * watch.accumulate - 1:
                    watch.counter.__exit__(None, None, None)
                    watch.flops = watch.counter.get_total_flops()

        return Calls()

    def peak(self) -> int:
        """Peak of the allocated bytes between the markers."""
        events = self.profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        (step,) = [event for event in events if event.name() == "the step"]
        start, end = step.start_ns(), step.start_ns() + step.duration_ns()
        now = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            if start <= event.start_ns() <= end:
                peak = max(peak, now)
        return peak


def report(results: list[dict[str, Any]], machine: str) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "# `merv plan` compared with real runs",
        "",
        f"`python benchmarks/plan/measure.py`, {machine}. One step of the optimizer. Memory is the peak of",
        "torch's allocator. Resident memory is that of the whole process, with Python and libraries.",
        "",
        "| setting | GFLOP predicted | measured | ratio | MB predicted | measured | ratio | resident |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results:
        (f, g), (m, n) = row["flops"], row["memory"]
        lines.append(
            f"| {row['name']} | {f / 1e9:,.1f} | {g / 1e9:,.1f} | {f / g:.3f} | {m / 1e6:,.0f} "
            f"| {n / 1e6:,.0f} | {m / n:.3f} | {row['resident'] / 1e6:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the settings and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(SETTINGS),
        metavar="NAME",
        help=f"run only these settings: {'; '.join(SETTINGS)}",
    )
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument(
        "--machine",
        help="description of the machine in the table",
        default="AMD EPYC (Zen 4), 2 shared virtual cores, one used",
    )
    args = parser.parse_args()
    import lightning  # noqa: F401 - imported once, before the processes are forked
    import transformers  # noqa: F401

    results = []
    for name in args.only:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
            try:
                results.append(process.submit(compare, name).result())
            except Exception as error:
                print(f"{name}: failed: {error!r}", file=sys.stderr)
                continue
        print(results[-1], flush=True)
    text = report(results, args.machine)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

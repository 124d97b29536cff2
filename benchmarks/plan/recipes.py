"""What `merv plan` says of the recipes for GPUs: memory of each and hours, written into their headers.

    merv download
    python benchmarks/plan/recipes.py [NAME ...] [--write]

Nothing is measured. The language model is Llama-2-7B's published shape without its weights, with SmolLM2's
tokenizer; the rows are those that `merv plan` guesses without a file (one video, 60 words asked, 20
answered); the samples are as many as arXiv 2501.01426 trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import re
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig

from merv.cli.main import main
from merv.training.plan import GPUS
from merv.training.recipes import recipes
from merv.utils.assets import smollm2_folder

CAPTIONS, INSTRUCTIONS = 1_260_000, 765_000
GPU_OF = {"48": "l40", "24": "4090"}  # by the memory that a header names
SAMPLES = {"merv/pretrain_projector": CAPTIONS, "merv/full_stage1": CAPTIONS}
FOLDER = Path(__file__).parents[2] / "recipes"
PLUG_IN = Path(__file__).parents[2] / "examples/third_party_encoder"


def llama(folder: Path) -> Path:
    """Llama-2-7B without its weights."""
    width = {"hidden_size": 4096, "intermediate_size": 11_008}
    config = LlamaConfig(vocab_size=32_000, num_hidden_layers=32, num_attention_heads=32, **width)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_folder()).save_pretrained(folder)
    return folder


def planned(name: str, llm: Path) -> tuple[str, bool]:
    """What a header says, and whether it fits."""
    path = FOLDER / f"{name}.yaml"
    head = path.read_text().partition("trainer:")[0]
    gpu = GPU_OF[re.search(r"Hardware: .*?(\d+) GB", head)[1]]  # type: ignore[index]
    samples = SAMPLES.get(name, INSTRUCTIONS)
    options = [f"--config={path}", f"--model.llm={llm}", "--data.train=none.json", f"--gpu={gpu}", "--json"]
    if name == "merv/third_party":
        sys.path.insert(0, str(PLUG_IN))
        options.append("--model.encoders=[siglip,color_histogram:ColorHistogram]")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["plan", *options])
    plan = json.loads(printed.getvalue())
    steps = math.ceil(samples / plan["global_batch"])
    tflops = GPUS[gpu].tflops * 0.4
    once = plan["encode_flops"] * samples / plan["setup"]["devices"] if plan["stores_features"] else 0
    hours = (steps * sum(plan["flops"].values()) + once) / (tflops * 1e12 * 3600)
    of = f"{plan['setup']['devices']} × {gpu.upper()} at 40 % of their peak"
    said = (
        f"{plan['peak_bytes'] / 1e9:.1f} GB a GPU; {hours:,.0f} h for {samples / 1000:,.0f} k samples on {of}"
    )
    return said, plan["fits"]


def write(name: str, text: str) -> None:
    """Put it into the header, behind the line of the hardware."""
    path = FOLDER / f"{name}.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# Planned: ")]
    at = next(i for i, line in enumerate(lines) if line.startswith("# Hardware:"))
    lines.insert(at + 1, f"# Planned: {text}.")
    path.write_text("\n".join(lines) + "\n")


def run() -> None:
    """Every recipe whose header names GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true", help="into the recipes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        llm = llama(Path(folder))
        for name, path in recipes().items():
            if (args.names and name not in args.names) or not re.search("GPUs? of", path.read_text()):
                continue
            text, fits = planned(name, llm)
            print(f"{name}: {text}{'' if fits else ' DOES NOT FIT'}", flush=True)
            if args.write:
                write(name, text)


if __name__ == "__main__":
    run()

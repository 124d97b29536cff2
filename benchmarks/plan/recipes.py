"""Write the memory and hours that `merv plan` predicts into the headers of the recipes for GPUs.

    merv download
    python benchmarks/plan/recipes.py [NAME ...] [--write]

Nothing is measured. The language model has the published shape of Llama-2-7B, without weights, and SmolLM2's
tokenizer. Without a data file, `merv plan` assumes that each sample has one video, a question of 60 words and
an answer of 20. The number of samples is that of arXiv 2501.01426.
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
from merv.cli.plan import DEVICES
from merv.training.recipes import recipes
from merv.utils.assets import smollm2_folder

CAPTIONS, INSTRUCTIONS = 1_260_000, 765_000
GPU_OF = {"48": "l40", "24": "4090"}  # by the memory in the header's Hardware line
SAMPLES = {"merv/pretrain_projector": CAPTIONS, "merv/full_stage1": CAPTIONS}
FOLDER = Path(__file__).parents[2] / "recipes"
PLUG_IN = Path(__file__).parents[2] / "examples/third_party_encoder"


def llama(folder: Path) -> Path:
    """Write the config of Llama-2-7B and a tokenizer, without weights."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11_008}
    config = LlamaConfig(vocab_size=32_000, num_hidden_layers=32, num_attention_heads=32, **sizes)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_folder()).save_pretrained(folder)
    return folder


def planned(name: str, llm: Path) -> tuple[str, bool]:
    """Return the text for a header, and whether the run fits."""
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
    tflops = DEVICES[gpu][0] * 0.4
    encode_flops = plan["encode_flops"] * samples / plan["setup"]["devices"] if plan["stores_features"] else 0
    hours = (steps * sum(plan["flops"].values()) + encode_flops) / (tflops * 1e12 * 3600)
    devices = plan["setup"]["devices"]
    text = (
        f"{plan['peak_bytes'] / 1e9:.1f} GB per GPU, {hours:,.0f} h for {samples / 1000:,.0f}k samples on "
        f"{devices} × {gpu.upper()} at 40% of {'its' if devices == 1 else 'their'} peak"
    )
    return text, plan["fits"]


def write(name: str, text: str) -> None:
    """Replace the Planned line of a header."""
    path = FOLDER / f"{name}.yaml"
    path.write_text(re.sub(r"(?m)^# Planned: .*$", f"# Planned: {text}.", path.read_text()))


def run() -> None:
    """Plan every recipe whose header names GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of recipes (default: all for GPUs)")
    parser.add_argument("--write", action="store_true", help="replace the Planned lines of the recipes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        llm = llama(Path(folder))
        for name, path in recipes().items():
            if (args.names and name not in args.names) or not re.search("GPUs? with", path.read_text()):
                continue
            text, fits = planned(name, llm)
            print(f"{name}: {text}{'' if fits else ' DOES NOT FIT'}", flush=True)
            if args.write:
                write(name, text)


if __name__ == "__main__":
    run()

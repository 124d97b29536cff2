"""Measure memory and time of converting a released checkpoint, for files of several sizes.

    python benchmarks/convert/memory.py [GIGABYTES ...]

The checkpoints have the format of the release and are written by tests/original.py: two tiny encoders, the
released mixer with 3072 hidden dimensions, and a random Llama in fp32 with enough layers for the size. Each
is converted in a separate process. Peak memory is the kernel's VmHWM minus the memory of the process after
all imports. It includes the pages of the mapped file that are in use, which the kernel can reclaim.
The "anonymous part" is the peak without these pages, sampled every 5 ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent.parent / "tests"))
from original import OriginalMERV, config_of, write

MB = 2**20
LAYER = 4 * 1024**2 + 3 * 1024 * 4096  # parameters per layer


def make(folder: Path, size: float) -> Path:
    """Write a checkpoint of about `size` GB, and its language model's config and tokenizer to `base`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from merv.testing import tiny_llm

    _, tokenizer = tiny_llm(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=max(1, round(size * 1e9 / 4 / LAYER)),
        num_attention_heads=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.save_pretrained(folder / "base")
    original = OriginalMERV(LlamaForCausalLM(config), [8, 12], hidden=3072)
    return write(folder, original.state(), config_of(["fake", "fake-video"], [16, 32], 16))


def status(key: str) -> float:
    """Return a value of /proc/self/status in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def child(folder: Path) -> None:
    """Convert and print memory and time as JSON."""
    from merv.models.convert_released_merv import convert

    tiny = make(folder / "tiny", 0.001)  # imports everything that is needed
    convert(tiny, folder / "tiny" / "config.json", folder / "tiny_out", llm=folder / "tiny" / "base")
    before, anonymous, peak, done = status("VmRSS"), status("RssAnon"), [0.0], threading.Event()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    convert(folder / "latest-checkpoint.pt", folder / "config.json", folder / "out", llm=folder / "base")
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(
        json.dumps({"peak": status("VmHWM") - before, "anonymous": peak[0] - anonymous, "seconds": seconds})
    )


def main(sizes: list[float]) -> None:
    """Convert one checkpoint of each size in a child process, and print a row for each."""
    torch.manual_seed(0)
    print("file, MB   written, MB   peak memory beyond imports, MB   anonymous part, MB   seconds")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            file = make(folder, size)
            done = subprocess.run(
                [sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True
            )
            result = json.loads(done.stdout.splitlines()[-1])
            written = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
            print(
                f"{file.stat().st_size / MB:8.0f}   {written / MB:11.0f}   {result['peak']:30.0f}   "
                f"{result['anonymous']:18.0f}   {result['seconds']:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument(
            "sizes",
            type=float,
            nargs="*",
            default=[0.6, 1.2, 2.4],
            metavar="GIGABYTES",
            help="(default: 0.6 1.2 2.4)",
        )
        main(parser.parse_args().sizes)

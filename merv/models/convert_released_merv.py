"""Convert a checkpoint of the released MERV to a folder that `VideoLLM.from_pretrained` loads.

The checkpoint holds projectors, mixer and language model. The encoders, and the config and tokenizer of the
language model, are loaded from where the release loads them. The checkpoint is memory-mapped and copied shard
by shard, so it can be larger than memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merv.checkpoints.folder import check_free, fill_exactly, replacing, write_model
from merv.encoding.base import Encoder
from merv.encoding.registry import create_encoder
from merv.encoding.weights import PRETRAINED
from merv.errors import CheckpointError, WeightsError
from merv.models.llm import load_tokenizer
from merv.models.multi_encoder import MultiEncoder
from merv.models.released_merv import (
    LLMS,
    PAD,
    VOCABULARY_MULTIPLE,
    ReleasedConfig,
    TranslatedFusion,
    few,
    list_faults,
    read_config,
    translate_fusion,
    translate_projectors,
)
from merv.models.video_llm import VideoLLM
from merv.video.sampling import Sampling

FUSION_KEYS, PROJECTOR_KEYS, LLM_KEY = (
    ("feature_fusion", "adapter"),
    ("projectors", "projector"),
    "llm_backbone",
)
TRAINING_KEYS = ("optimizer", "lr_scheduler", "step")
COMPUTED = "rotary_emb.inv_freq"  # saved by the transformers version of the release; newer ones compute it
SHARD_BYTES = 512 * 2**20


def convert(
    checkpoint: str | Path,
    config: str | Path,
    out: str | Path,
    *,
    llm: str | Path | None = None,
    encoders: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Convert a checkpoint of the released MERV. If an error occurs, nothing is written.

    Args:
        checkpoint: The `latest-checkpoint.pt` of a released model.
        config: Its config.json.
        out: Folder to write, for `VideoLLM.from_pretrained` and `merv ask`.
        llm: Folder or hub id of the config and tokenizer of the language model; its weights are not read.
            Defaults to the hub id in the release.
        encoders: Encoder name → folder or hub id of its weights. Others are loaded from their usual source.
        shard_bytes: Maximum size of each file of the language model, in bytes.
        log: Called with a line for each tensor that is left out, with the reason.

    Raises:
        CheckpointError: The checkpoint or config has an unknown part or lacks one, or `out` has other files.
        WeightsError: An encoder, or the config or tokenizer of the language model, could not be loaded.
    """
    check_free(out)
    released = read_config(_read_json(config))
    base = load_base(llm or LLMS[released.llm].source, released.llm)
    with replacing(out) as folder:
        model = _build(released, base, checkpoint, encoders or {}, log)
        shapes = {name: parameter.detach().to("meta") for name, parameter in model.llm.named_parameters()}
        model.llm.config.save_pretrained(folder / "llm")
        saved, state = model.config(), model.trainable_state_dict()
        del model  # frees the encoders and the pages of the mapped file that were read
        write_llm(folder / "llm", base, shapes, checkpoint, shard_bytes)
        write_model(folder, VideoLLM.kind, saved, state)


def _build(
    released: ReleasedConfig,
    base: BaseLLM,
    checkpoint: str | Path,
    weights: Mapping[str, str],
    log: Callable[[str], None],
) -> VideoLLM:
    """Build the whole model; the tensors of its language model are mapped from the file."""
    parts = read_parts(checkpoint)
    projectors = translate_projectors(parts.projectors, list(released.encoders), released.projector)
    fusion = translate_fusion(released.fusion, parts.fusion)
    network = base.load(parts.llm)
    vision = _build_vision(released, fusion, network.config.hidden_size, weights)
    assert vision.fusion is not None
    fill_exactly(vision.fusion.state_dict(), {**projectors, **fusion.state}, checkpoint)
    for line in [*parts.left_out, *fusion.left_out]:
        log(f"left out {line}")
    return VideoLLM(network, base.tokenizer, vision)


# The checkpoint -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Tensors of a released checkpoint by part, mapped from the file, and which are left out and why."""

    projectors: dict[str, Tensor]
    fusion: dict[str, Tensor]
    llm: dict[str, Tensor]
    left_out: list[str]


def read_parts(checkpoint: str | Path) -> Parts:
    """Read the parts of the model; CheckpointError names those that are missing or unknown."""
    content = _load(checkpoint)
    if not isinstance(content.get("model"), dict):
        raise CheckpointError(
            f"{checkpoint} holds {few(content)}. Expected a checkpoint of the released MERV, with a 'model'."
        )
    model = content.pop("model")
    unknown = [key for key in content if key not in TRAINING_KEYS]
    unknown += [f"model.{key}" for key in model if key not in (*FUSION_KEYS, *PROJECTOR_KEYS, LLM_KEY)]
    if unknown:
        raise CheckpointError(f"{checkpoint} has unknown parts: {few(unknown)}.")
    projectors = _find_part(model, PROJECTOR_KEYS, checkpoint)
    fusion = _find_part(model, FUSION_KEYS, checkpoint)
    if not projectors or not model.get(LLM_KEY):
        raise CheckpointError(
            f"{checkpoint} lacks {PROJECTOR_KEYS[0] if not projectors else LLM_KEY}. Pass a checkpoint of "
            "the last stage; those of the first stage, which trains only the projectors, are incomplete."
        )
    if "projector" in model:
        projectors = {f"0.{name}": tensor for name, tensor in projectors.items()}
    llm, left_out = {}, [f"{key}: it is only needed for training" for key in content]
    for name, tensor in model[LLM_KEY].items():
        if name.endswith(COMPUTED):
            left_out.append(f"{LLM_KEY}.{name}: the language model computes it")
        elif not name.startswith("llm."):
            raise CheckpointError(
                f"{checkpoint} has {LLM_KEY}.{name}. Expected names of {LLM_KEY} that start with 'llm.'."
            )
        else:
            llm[name.removeprefix("llm.")] = tensor
    return Parts(projectors, fusion, llm, left_out)


def _load(checkpoint: str | Path) -> dict[str, Any]:
    """Load the file with mapped tensors and without executing pickled code."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files raise many types of errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{checkpoint} could not be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{checkpoint} holds a {type(content).__name__}. Expected a dictionary.")
    return content


def _find_part(model: Mapping[str, Any], keys: tuple[str, str], checkpoint: str | Path) -> dict[str, Tensor]:
    """Return the part that has one of two keys; empty if there is none."""
    present = [key for key in keys if model.get(key)]
    if len(present) > 1:
        raise CheckpointError(f"{checkpoint} has both {' and '.join(present)}. Expected one of them.")
    return dict(model[present[0]]) if present else {}


def _read_json(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} could not be read as the config.json of a released model: {error}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}. Expected a JSON object.")
    return content


# The language model -------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseLLM:
    """The parts of the language model that are not in the checkpoint.

    Attributes:
        source: Folder or hub id that they were loaded from.
        config: Config of transformers.
        tokenizer: Tokenizer of transformers.
        generation: GenerationConfig with the tokens that end an answer.
    """

    source: str
    config: Any
    tokenizer: Any
    generation: Any

    def load(self, state: Mapping[str, Tensor]) -> Any:
        """Create the language model with the mapped tensors, without copying them.

        Raises:
            CheckpointError: The names or shapes of the tensors do not fit the config.
        """
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        expected = network.state_dict()
        required = {name for name, _ in network.named_parameters()}  # of tied parameters, only the first
        faults = list_faults(
            {
                "missing": [name for name in expected if name in required and name not in state],
                "unknown": [name for name in state if name not in expected],
                "wrong shape": [
                    f"{name} (got {list(state[name].shape)}, expected {list(expected[name].shape)})"
                    for name in expected
                    if name in state and state[name].shape != expected[name].shape
                ],
            }
        )
        if faults:
            raise CheckpointError(
                f"The tensors of {LLM_KEY} do not fit the language model {self.source}: {faults}. Pass the "
                "folder or hub id of the language model that llm_backbone_id in config.json names as --llm."
            )
        mapped = {name: state[name] for name in expected if name in state}
        network.load_state_dict(mapped, strict=False, assign=True)
        network.tie_weights()
        tied = [name for name in state if name not in required]
        if any(not torch.equal(state[name], network.state_dict()[name]) for name in tied):
            raise CheckpointError(
                f"{LLM_KEY} has a separate {few(tied)}, but {self.source} ties it to the embeddings."
            )
        network.config.dtype = network.dtype
        network.config.name_or_path = "llm"  # relative to the config.json of the folder
        return network


def load_base(source: str | Path, name: str) -> BaseLLM:
    """Load config and tokenizer of a language model and change them as the release does.

    Raises:
        WeightsError: They could not be loaded.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"Config and tokenizer of {name} could not be loaded from {str(source)!r}: {reason} If you have "
            "them, pass their folder: --llm FOLDER (config.json and the files of the tokenizer, no weights)."
        ) from error
    try:
        end_ids = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # the model has no generation config
        end_ids = None
    if LLMS[name].adds_pad_token:
        tokenizer.add_special_tokens({"pad_token": PAD})
        config.vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.chat_template = LLMS[name].chat_template
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if end_ids is None else end_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BaseLLM(str(source), config, tokenizer, generation)


def write_llm(
    folder: Path, base: BaseLLM, shapes: Mapping[str, Tensor], checkpoint: str | Path, shard_bytes: int
) -> None:
    """Write weights, tokenizer and generation config in the format of transformers.

    Args:
        folder: Folder to write.
        base: Tokenizer and generation config.
        shapes: Meta tensors with the names, shapes and dtypes of the weights.
        checkpoint: File that the weights are copied from.
        shard_bytes: Maximum size of a weights file, in bytes.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm import tqdm

    base.generation.save_pretrained(folder)
    save_tokenizer(base.tokenizer, folder)
    plan = split_torch_state_dict_into_shards(
        dict(shapes), filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    total = sum(tensor.nbytes for tensor in shapes.values())
    with tqdm(total=total, desc="language model", unit="B", unit_scale=True) as bar:
        for file, names in plan.filename_to_tensors.items():
            mapped = read_parts(checkpoint).llm  # mapping it again frees the memory of the last shard
            save_file(
                {name: mapped[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"}
            )
            # save_file creates files that only their owner can read.
            shutil.copymode(folder / "tokenizer_config.json", folder / file)
            bar.update(sum(shapes[name].nbytes for name in names))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer so that `AutoTokenizer`, too, loads it exactly as its tokenizer.json describes it.

    For the classes of some models, such as LlamaTokenizer, transformers 5 replaces the file's normalizer; see
    `load_tokenizer`.
    """
    tokenizer.save_pretrained(folder)
    if hasattr(tokenizer, "backend_tokenizer"):
        path = folder / "tokenizer_config.json"
        config = {**_read_json(path), "tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# The encoders -------------------------------------------------------------------------------


def _build_vision(
    released: ReleasedConfig, fusion: TranslatedFusion, output_dim: int, weights: Mapping[str, str]
) -> MultiEncoder:
    """Build the MultiEncoder with the weights of its encoders and a random fusion."""
    unknown = [name for name in weights if name not in released.encoders]
    if unknown:
        raise WeightsError(
            f"Unknown encoder in --encoder: {few(unknown)}. This model has {few(released.encoders)}."
        )
    return MultiEncoder(
        {name: _create_encoder(name, plugin, weights) for name, plugin in released.encoders.items()},
        grid=released.grid,
        output_dim=output_dim,
        mixer=fusion.mixer,
        projector=released.projector,
        norm=False,
        mixer_options=fusion.options,
        num_frames=released.num_frames,
        sampling=Sampling("released", total=released.total_frames),
        align="released",
    )


def _create_encoder(name: str, plugin: str, weights: Mapping[str, str]) -> Encoder:
    try:
        return create_encoder(plugin, weights=weights.get(name, PRETRAINED), preset="merv")
    except WeightsError as error:
        raise WeightsError(
            f"The checkpoint does not hold the weights of the encoder {name}, and they could not be loaded. "
            f"{error} On the command line: --encoder {name}=FOLDER."
        ) from error

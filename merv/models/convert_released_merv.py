"""Convert a checkpoint of the released MERV to a folder that `VideoLLM.from_pretrained` loads.

The checkpoint holds projectors, mixer and language model. The encoders, and the config and tokenizer of the
language model, are loaded from where the release loads them. The checkpoint is memory-mapped and copied shard
by shard, so it can be larger than memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
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
    MIXERS,
    PAD,
    PROJECTORS,
    VOCABULARY_MULTIPLE,
    ReleasedConfig,
    read_config,
    translate,
)
from merv.models.video_llm import VideoLLM
from merv.utils.torch_modules import first_few, state_dict_mismatch
from merv.video.sampling import Sampling

TRAINING_KEYS = ("optimizer", "lr_scheduler", "step")
LLM = "llm."  # prefix of the language model's tensors
SHARD_BYTES = 512 * 2**20


def convert(
    checkpoint: str | Path,
    config: str | Path,
    out: str | Path,
    *,
    llm: str | Path | None = None,
    encoders: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Convert a checkpoint of the released MERV. If an error occurs, nothing is written.

    Args:
        checkpoint: The `latest-checkpoint.pt` of a released model.
        config: Its config.json.
        out: Folder to write, for `VideoLLM.from_pretrained` and `merv ask`.
        llm: Folder or hub id of the config and tokenizer of the language model; its weights are not read.
            Defaults to the hub id in the release.
        encoders: Encoder name → folder or hub id of its weights. Others are loaded from their usual source.
        shard_bytes: Maximum size of each file of the language model, in bytes.

    Returns:
        What is left out: name → reason.

    Raises:
        CheckpointError: The checkpoint or config has an unknown part or lacks one, or `out` has other files.
        WeightsError: An encoder, or the config or tokenizer of the language model, could not be loaded.
    """
    check_free(out)  # before minutes of reading
    released = read_config(_read_json(config))
    network, tokenizer = load_base(llm or LLMS[released.llm].source, released.llm)
    tensors, for_training = read_tensors(checkpoint)
    state, unused = translate(tensors, released)
    with replacing(out) as folder:
        of_llm = {name.removeprefix(LLM): state.pop(name) for name in list(state) if name.startswith(LLM)}
        assign(network, of_llm, checkpoint)
        vision = _build_vision(released, state, network.config.hidden_size, encoders or {})
        assert vision.fusion is not None
        fill_exactly(vision.fusion.state_dict(), state, checkpoint)
        model = VideoLLM(network, tokenizer, vision)
        saved, trained = model.config(), model.trainable_state_dict()
        del model, vision  # frees the encoders
        network.save_pretrained(folder / "llm", max_shard_size=shard_bytes)
        save_tokenizer(tokenizer, folder / "llm")
        for file in (folder / "llm").glob("*.safetensors"):  # safetensors lets only the owner read them
            shutil.copymode(folder / "llm" / "config.json", file)
        write_model(folder, VideoLLM.kind, saved, trained)
    return {**for_training, **unused}


# The checkpoint -----------------------------------------------------------------------------


def read_tensors(checkpoint: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of the model from the file, without executing pickled code.

    Returns:
        The tensors, and name → reason for the other parts, which are left out.

    Raises:
        CheckpointError: The file is damaged, is no checkpoint of the released MERV, or has an unknown part.
    """
    try:
        content: Any = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files raise many types of errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{checkpoint} could not be read as a checkpoint: {reason}") from error
    model = content.pop("model", None) if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(part, dict) for part in model.values()):
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint of the released MERV, a dictionary with a 'model' of several "
            "parts."
        )
    if unknown := [key for key in content if key not in TRAINING_KEYS]:
        raise CheckpointError(f"{checkpoint} has unknown parts: {first_few(unknown)}.")
    tensors = {f"{part}.{name}": tensor for part, state in model.items() for name, tensor in state.items()}
    for needed in (("projectors", "projector"), ("llm_backbone",)):
        if not any(model.get(part) for part in needed):
            raise CheckpointError(
                f"{checkpoint} lacks {needed[0]}. Pass a checkpoint of the last stage; those of the first "
                "stage, which trains only the projectors, are incomplete."
            )
    return tensors, dict.fromkeys(content, "it is only needed for training")


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


def load_base(source: str | Path, name: str) -> tuple[Any, Any]:
    """Load config and tokenizer of a language model and change them as the release does.

    Args:
        source: Folder or hub id.
        name: Key of LLMS.

    Returns:
        The language model on the meta device, and its tokenizer.

    Raises:
        WeightsError: They could not be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

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
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if end_ids is None else end_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    return network, tokenizer


def assign(network: Any, state: Mapping[str, Tensor], checkpoint: str | Path) -> None:
    """Make mapped tensors the parameters of a language model, without copying them.

    Raises:
        CheckpointError: The names or shapes of the tensors do not fit the language model.
    """
    required = {name for name, _ in network.named_parameters()}  # of tied parameters, only the first
    known = network.state_dict()
    expected = {name: tensor for name, tensor in known.items() if name in required or name in state}
    if mismatch := state_dict_mismatch(expected, state):
        raise CheckpointError(
            f"The language model in {checkpoint} does not fit its config: {mismatch}. Pass the folder or hub "
            "id of the language model that llm_backbone_id in config.json names as --llm."
        )
    network.load_state_dict(state, strict=False, assign=True)
    network.tie_weights()
    for name in state.keys() - required:
        if not torch.equal(state[name], network.state_dict()[name]):
            raise CheckpointError(f"{checkpoint} has a separate {name}, but the config of --llm ties it.")
    network.config.dtype = network.dtype
    network.config.name_or_path = "llm"  # relative to the config.json of the folder


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
    released: ReleasedConfig, state: Mapping[str, Tensor], output_dim: int, weights: Mapping[str, str]
) -> MultiEncoder:
    """Build the MultiEncoder with the weights of its encoders and a random fusion of the sizes of `state`."""
    if unknown := [name for name in weights if name not in released.encoders]:
        raise WeightsError(
            f"Unknown encoder in --encoder: {', '.join(unknown)}. This model has "
            f"{', '.join(released.encoders)}."
        )
    mixer, options, _ = MIXERS[released.fusion]
    if "mixer.query" in state:
        options = {"hidden": state["mixer.query"].shape[1]}
    return MultiEncoder(
        {name: _create_encoder(name, plugin, weights) for name, plugin in released.encoders.items()},
        grid=released.grid,
        output_dim=output_dim,
        mixer=mixer,
        projector=PROJECTORS[released.projector][0],
        norm=False,
        mixer_options=options,
        num_frames=released.num_frames,
        sampling=Sampling("released", total=max(released.num_frames.values())),
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

"""Convert: a checkpoint of the released MERV to a folder that VideoLLM.from_pretrained loads.

The file holds projectors, mixer and language model; encoders, and the configuration and tokenizer
of the language model, come from where the release takes them too. Tensors are read out of the
mapped file shard by shard, so that a file larger than memory can be converted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merv.checkpoints.folder import check_free, fill_exactly, replacing
from merv.encoding.registry import create_encoder
from merv.encoding.weights import PRETRAINED
from merv.errors import CheckpointError, WeightsError
from merv.models.multi_encoder import MultiEncoder
from merv.models.released_merv import (
    LLMS,
    MULTIPLE,
    PAD,
    Released,
    Translated,
    few,
    read_config,
    translate_fusion,
    translate_projectors,
)
from merv.models.video_llm import VideoLLM
from merv.video.sampling import Sampling

FUSIONS, PROJECTORS, LLM = ("feature_fusion", "adapter"), ("projectors", "projector"), "llm_backbone"
BESIDE = ("optimizer", "lr_scheduler", "step")  # beside the model, in files that training goes on from
COMPUTED = "rotary_emb.inv_freq"  # the release's transformers of old saved it; every other computes it
SHARD_BYTES = 512 * 2**20


def convert(
    checkpoint: str | Path,
    config: str | Path,
    out: str | Path,
    *,
    llm: str | Path | None = None,
    encoders: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the folder `out` for VideoLLM.from_pretrained and `merv ask`; whole or not at all.

    checkpoint, config: `latest-checkpoint.pt` of a released model, and its config.json.
    llm: a folder or hub id with configuration and tokenizer of the language model that it was trained
        from (its weights are not read); None: the release's hub id.
    encoders: by name, a folder or hub id of their weights; the others come from where they always do.
    shard_bytes: of each file of the language model.
    say: called with each line on what is left out, and why.

    Raises CheckpointError for whatever is not known in the file or config, WeightsError where encoders
    or the language model's folder cannot be loaded.
    """
    check_free(out)
    released = read_config(_json(config))
    base = load_base(llm or LLMS[released.llm].source, released.llm)
    with replacing(out) as folder:
        model = _build(released, base, checkpoint, encoders or {}, say)
        model.save_pretrained(folder)
        sizes = {name: parameter.detach().to("meta") for name, parameter in model.llm.named_parameters()}
        model.llm.config.save_pretrained(folder / "llm")
        del model  # and with it the encoders, and what was read of the mapped file
        write_llm(folder / "llm", base, sizes, checkpoint, shard_bytes)


def _build(
    released: Released,
    base: Base,
    checkpoint: str | Path,
    weights: Mapping[str, str],
    say: Callable[[str], None],
) -> VideoLLM:
    """The whole model, its language model on the mapped file."""
    parts = read_parts(checkpoint)
    projectors = translate_projectors(parts.projectors, list(released.encoders), released.projector)
    fusion = translate_fusion(released.fusion, parts.fusion, len(released.encoders))
    network = base.fill(parts.llm)
    vision = build_vision(released, fusion, network.config.hidden_size, weights)
    assert vision.fusion is not None
    fill_exactly(vision.fusion.state_dict(), {**projectors, **fusion.state}, checkpoint)
    for line in [*parts.left_out, *fusion.left_out]:
        say(f"left out {line}")
    return VideoLLM(network, base.tokenizer, vision)


# The file -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Tensors of a released checkpoint by part, still in the mapped file; what is not taken, and why."""

    projectors: dict[str, Tensor]
    fusion: dict[str, Tensor]
    llm: dict[str, Tensor]
    left_out: list[str]


def read_parts(checkpoint: str | Path) -> Parts:
    """The parts of the model; CheckpointError names what is missing or not known."""
    held = _load(checkpoint)
    if not isinstance(held.get("model"), dict):
        raise CheckpointError(f"{checkpoint} holds {few(held)}; wanted a checkpoint of the release: 'model'.")
    model = held.pop("model")
    unknown = [key for key in held if key not in BESIDE]
    unknown += [f"model.{key}" for key in model if key not in (*FUSIONS, *PROJECTORS, LLM)]
    if unknown:
        raise CheckpointError(f"{checkpoint} has parts that are not known: {few(unknown)}.")
    projectors, fusion = (_one_of(model, names, str(checkpoint)) for names in (PROJECTORS, FUSIONS))
    if not projectors or not model.get(LLM):
        raise CheckpointError(
            f"{checkpoint} lacks {PROJECTORS[0] if not projectors else LLM}. A file of the stage that trains "
            "projectors alone is no whole model; take that of the last stage."
        )
    if "projector" in model:
        projectors = {f"0.{name}": tensor for name, tensor in projectors.items()}
    llm, left_out = {}, [f"{key}: it is for training on" for key in held]
    for name, tensor in model[LLM].items():
        if name.endswith(COMPUTED):
            left_out.append(f"{LLM}.{name}: the language model computes it")
        elif not name.startswith("llm."):
            raise CheckpointError(f"{checkpoint} has {LLM}.{name}; wanted names that begin with 'llm.'.")
        else:
            llm[name.removeprefix("llm.")] = tensor
    return Parts(projectors, fusion, llm, left_out)


def _load(checkpoint: str | Path) -> dict[str, Any]:
    """The file as it is, tensors mapped, nothing of it run."""
    try:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{checkpoint} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{checkpoint} holds a {type(held).__name__}; wanted a dictionary.")
    return held


def _one_of(model: Mapping[str, Any], names: tuple[str, str], checkpoint: str) -> dict[str, Tensor]:
    """The part that goes by one of two names, or nothing."""
    there = [name for name in names if model.get(name)]
    if len(there) > 1:
        raise CheckpointError(f"{checkpoint} has both {' and '.join(there)}; wanted one of them.")
    return dict(model[there[0]]) if there else {}


def _json(path: str | Path) -> dict[str, Any]:
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the config.json of a released model: {error}"
        ) from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} holds a {type(held).__name__}; wanted a JSON object.")
    return held


# The language model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What the file lacks of its language model: configuration, tokenizer, when answers end."""

    source: str
    config: Any
    tokenizer: Any
    generation: Any

    def fill(self, state: Mapping[str, Tensor]) -> Any:
        """The language model on tensors of the mapped file; none is copied.

        Raises CheckpointError where names or shapes are not those that the configuration makes.
        """
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(self.config)
        wanted = network.state_dict()
        own = {name for name, _ in network.named_parameters()}  # of tied ones the first
        faults = {
            "missing": [name for name in wanted if name in own and name not in state],
            "not known": [name for name in state if name not in wanted],
            "of another shape": [
                f"{name} {list(state[name].shape)}, wanted {list(wanted[name].shape)}"
                for name in wanted
                if name in state and state[name].shape != wanted[name].shape
            ],
        }
        if any(faults.values()):
            said = "; ".join(f"{few(names)} {fault}" for fault, names in faults.items() if names)
            raise CheckpointError(
                f"{LLM} is not the language model that {self.source} describes: {said}. Is it the one that "
                "llm_backbone_id in the config names? Pass its folder or hub id as --llm."
            )
        network.load_state_dict({name: state[name] for name in wanted if name in state}, False, assign=True)
        network.tie_weights()
        tied = [name for name in state if name not in own]
        if any(not torch.equal(state[name], network.state_dict()[name]) for name in tied):
            raise CheckpointError(f"{LLM} has its own {few(tied)}; {self.source} ties it to the embeddings.")
        network.config.dtype = network.dtype
        network.config._name_or_path = "llm"  # beside the config.json of the folder
        return network


def load_base(source: str | Path, name: str) -> Base:
    """Configuration and tokenizer of the language model `name` as the release changes them.

    Raises WeightsError where they cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"Configuration and tokenizer of {name} could not be loaded from {str(source)!r}: {reason} "
            "Where you have them, pass the folder: --llm FOLDER (config.json and the tokenizer's files, no "
            "weights)."
        ) from error
    try:
        ends = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # it has none
        ends = None
    if LLMS[name].grows:
        tokenizer.add_special_tokens({"pad_token": PAD})
        config.vocab_size = -(-len(tokenizer) // MULTIPLE) * MULTIPLE
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.chat_template = LLMS[name].template
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Base(str(source), config, tokenizer, generation)


def write_llm(
    folder: Path, base: Base, sizes: Mapping[str, Tensor], checkpoint: str | Path, shard_bytes: int
) -> None:
    """Tensors, tokenizer and when to end, in the layout of transformers, in files of about `shard_bytes`.

    sizes: tensors without data, of the names, shapes and dtypes to be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm import tqdm

    base.generation.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    plan = split_torch_state_dict_into_shards(
        dict(sizes), filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    total = sum(tensor.nbytes for tensor in sizes.values())
    with tqdm(total=total, desc="language model", unit="B", unit_scale=True) as bar:
        for file, names in plan.filename_to_tensors.items():
            mapped = read_parts(checkpoint).llm  # anew: what was read of the file before is let go
            save_file(
                {name: mapped[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"}
            )
            shutil.copymode(folder / "tokenizer_config.json", folder / file)  # else its owner's alone
            bar.update(sum(sizes[name].nbytes for name in names))


# The encoders -------------------------------------------------------------------------------


def build_vision(
    released: Released, fusion: Translated, width: int, weights: Mapping[str, str]
) -> MultiEncoder:
    """The encoders with their weights; projectors and mixer are still random."""
    unknown = [name for name in weights if name not in released.encoders]
    if unknown:
        raise WeightsError(f"--encoder names {few(unknown)}; this model has {few(released.encoders)}.")
    return MultiEncoder(
        dict(_create(released.encoders, weights)),
        grid=released.grid,
        output_dim=width,
        mixer=fusion.mixer,
        projector=released.projector,
        norm=False,
        mixer_options=fusion.options,
        num_frames=released.frames,
        sampling=Sampling("official", total=released.total),
        align="official",
    )


def _create(encoders: Mapping[str, str], weights: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for name, typed in encoders.items():
        try:
            yield name, create_encoder(typed, weights=weights.get(name, PRETRAINED), preset="merv")
        except WeightsError as error:
            raise WeightsError(
                f"The encoder {name} is not in the checkpoint and needs its own weights. {error} "
                f"On the command line: --encoder {name}=FOLDER."
            ) from error

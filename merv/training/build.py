"""Build: the VideoLLM that a recipe describes, from the options of `merv.training.module.Training`."""

from __future__ import annotations

from typing import Any

from merv.checkpoints.folder import read_config
from merv.checkpoints.pretrained import find_model
from merv.encoding.registry import create_encoder, find_encoder, name_and_variant
from merv.errors import TrainingError
from merv.features.store import FeatureStore
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.models.llm import load_llm
from merv.models.multi_encoder import MultiEncoder
from merv.models.named_encoders import by_name
from merv.models.video_llm import VideoLLM
from merv.utils.suggest import nearest

SAME = ("grid", "norm", "align", "backend", "resample")  # in `init_from` and here


def check_named(h: Any) -> None:
    """Raise TrainingError for a part that options name and there is not, UnknownPlugin for a plug-in."""
    named = by_name(h.encoders)
    for typed in named.values():  # by the user, so that the folder of `init_from` may name it too
        find_encoder(name_and_variant(str(typed))[0])
    MIXERS.load(h.mixer)
    PROJECTORS.load(h.projector)
    names = list(named)
    parts = ["projector", "mixer", "lora", "llm", *names]
    parts += [f"{part}.{name}" for part in ("projector", "mixer") for name in names]
    for option, given, known in (
        ("trainable", h.trainable, parts),
        ("lr_overrides", h.lr_overrides or (), h.trainable),
        ("num_frames", h.num_frames or (), names),
        ("presets", h.presets or (), names),
        ("weights", h.weights or (), names),
    ):
        for name in given:
            if name not in known:
                raise TrainingError(
                    f"model.{option}: unknown name {name!r}.{nearest(name, known)} "
                    f"There are: {', '.join(known)}."
                )


def from_scratch(h: Any, store: FeatureStore | None = None) -> VideoLLM:
    """A model whose fusion is untrained, tokens at the scale of the LLM's embeddings."""
    llm, tokenizer = load_llm(h.llm, h.dtype, h.quantize)
    vision = MultiEncoder(
        h.encoders,
        grid=tuple(h.grid),
        output_dim=llm.get_input_embeddings().embedding_dim,
        mixer=h.mixer,
        projector=h.projector,
        norm=h.norm,
        mixer_options=h.mixer_options,
        projector_options=h.projector_options,
        weights=h.weights or {},
        presets=h.presets,
        num_frames=h.num_frames,
        sampling=h.sampling,
        align=h.align,
        backend=h.backend,
        resample=h.resample,
    )
    assert vision.fusion is not None
    table = llm.get_input_embeddings().weight
    vision.fusion.scale_to(h.embed_scale or table.float().pow(2).mean().sqrt().item())
    return VideoLLM(llm, tokenizer, vision, store)


def from_checkpoint(h: Any, store: FeatureStore | None = None) -> VideoLLM:
    """The model in `init_from`, as it was but for encoders that join it.

    Raises TrainingError where the recipe wants it otherwise, CheckpointError where nothing was saved there.
    """
    own: dict[str, Any] = by_name(h.encoders)
    given = h.weights or {}
    start = find_model(h.init_from)
    kind, config = read_config(start)
    if kind != VideoLLM.kind:
        raise TrainingError(f"model.init_from, {h.init_from}, holds a {kind!r}; wanted a {VideoLLM.kind!r}.")
    saved = config["vision"]["encoders"]
    model = VideoLLM.from_pretrained(
        start,
        llm=h.llm,
        dtype=None if h.dtype == "auto" else h.dtype,
        quantize=h.quantize,
        weights={name: path for name, path in given.items() if name in saved},
        feature_store=store,
    )
    differ = _differences(model, h, own)
    if differ:
        there = {name: was for name, (was, _) in differ.items()}
        here = {name: now for name, (_, now) in differ.items()}
        raise TrainingError(
            f"model.init_from, {h.init_from}, has {there}; this recipe has {here}. Set them equal."
        )
    for name, typed in own.items():
        if name not in model.vision.encoders:
            weights, preset = given.get(name, "pretrained"), (h.presets or {}).get(name)
            encoder = create_encoder(typed, weights=weights, preset=preset)
            model.add_encoder(name, encoder, (h.num_frames or {}).get(name))
    return model


def _differences(model: VideoLLM, h: Any, own: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What of a model to start from is not as the recipe has it: name → both values."""
    vision, there = model.vision, list(model.vision.encoders)
    config = vision.config()
    pairs = {name: (config[name], _plain(h[name])) for name in SAME}
    pairs["mixer"] = (config["mixer"], MIXERS.path(h.mixer))
    pairs["projector"] = (config["projector"], PROJECTORS.path(h.projector))
    pairs["mixer_options"] = (config["mixer_options"], h.mixer_options or {})
    pairs["projector_options"] = (config["projector_options"], h.projector_options or {})
    pairs["sampling"] = (vision.sampling.mode, h.sampling)
    pairs["encoders"] = (there, [name for name in own if name in there])
    pairs["num_frames"] = (
        dict(vision.num_frames),
        {n: f for n, f in (h.num_frames or {}).items() if n in there},
    )
    for name, encoder in vision.named():
        pairs[f"presets.{name}"] = (encoder.preset_name, (h.presets or {}).get(name, encoder.preset_name))
    rms = model.fusion.token_rms
    if h.embed_scale is not None and rms is not None:
        pairs["embed_scale"] = (round(float(rms), 4), round(h.embed_scale, 4))
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

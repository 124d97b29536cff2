"""Build the VideoLLM that the options of a run describe."""

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
from merv.training.options import TrainingOptions
from merv.utils.suggest import nearest

# Options that have the same name and values in a model's config.json
SAME_IN_CONFIG = ("norm", "align", "backend", "resample")


def check_names(options: TrainingOptions) -> None:
    """Check the names of parts, encoders, mixer and projector before anything is loaded.

    Raises TrainingError for an unknown part and for options of a part that is not trained, UnknownPlugin for
    an unknown encoder, mixer or projector.
    """
    encoders = by_name(options.encoders)
    for encoder in encoders.values():  # imports the class, so a model in `init_from` may use it too
        find_encoder(name_and_variant(str(encoder))[0])
    MIXERS.load(options.mixer)
    PROJECTORS.load(options.projector)
    parts = ["projector", "mixer", "lora", "llm", *encoders]
    parts += [f"{part}.{name}" for part in ("projector", "mixer") for name in encoders]
    for option, names, known in (
        ("trainable", options.trainable, parts),
        ("lr_overrides", options.lr_overrides or (), options.trainable),
        ("num_frames", options.num_frames or (), encoders),
        ("presets", options.presets or (), encoders),
        ("weights", options.weights or (), encoders),
    ):
        for name in names:
            if name not in known:
                way_out = "" if option == "trainable" else f" To remove the mapping: --model.{option}=null."
                whose = " (model.trainable)" if option == "lr_overrides" else ""
                raise TrainingError(
                    f"model.{option}: unknown name {name!r}.{nearest(name, known)} "
                    f"Available{whose}: {', '.join(known)}.{way_out}"
                )
    if options.lora is not None and "lora" not in options.trainable and options.init_from is None:
        raise TrainingError(
            "model.lora is set, but model.trainable does not train lora. Add it, or set --model.lora=null."
        )


def from_scratch(options: TrainingOptions, store: FeatureStore | None = None) -> VideoLLM:
    """A model with an untrained fusion, whose tokens have the scale of the LLM's embeddings."""
    llm, tokenizer = load_llm(options.llm, options.dtype, options.quantize)
    embeddings = llm.get_input_embeddings()
    vision = MultiEncoder(
        options.encoders,
        output_dim=embeddings.embedding_dim,
        weights=options.weights or {},
        **options.multi_encoder(),
    )
    assert vision.fusion is not None
    vision.fusion.init_scale(options.embed_scale or embeddings.weight.float().pow(2).mean().sqrt().item())
    return VideoLLM(llm, tokenizer, vision, store, chat_template_kwargs=options.chat_template_kwargs)


def from_checkpoint(options: TrainingOptions, store: FeatureStore | None = None) -> VideoLLM:
    """The model in `init_from`, with the encoders that it lacks added.

    Raises TrainingError if the options describe another model, CheckpointError if `init_from` is not a model.
    """
    encoders: dict[str, Any] = by_name(options.encoders)
    weights, presets = options.weights or {}, options.presets or {}
    folder = find_model(str(options.init_from))
    kind, config = read_config(folder)
    if kind != VideoLLM.kind:
        raise TrainingError(
            f"model.init_from, {options.init_from}, contains a {kind!r}; expected a {VideoLLM.kind!r}."
        )
    saved = config["vision"]["encoders"]
    model = VideoLLM.from_pretrained(
        folder,
        llm=options.llm,
        dtype=None if options.dtype == "auto" else options.dtype,
        quantize=options.quantize,
        weights={name: path for name, path in weights.items() if name in saved},
        feature_store=store,
        verify=True,
    )
    differences = _differences(model, options, encoders)
    if differences:
        in_model = {name: value for name, (value, _) in differences.items()}
        in_recipe = {name: value for name, (_, value) in differences.items()}
        raise TrainingError(
            f"The model in model.init_from, {options.init_from}, has {in_model}; this recipe has "
            f"{in_recipe}. Change the recipe to the values of the model."
        )
    for name, encoder in encoders.items():
        if name not in model.vision.encoders:
            created = create_encoder(
                encoder, weights=weights.get(name, "pretrained"), preset=presets.get(name)
            )
            model.add_encoder(name, created, (options.num_frames or {}).get(name))
    return model


def _differences(
    model: VideoLLM, options: TrainingOptions, encoders: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Option → its values in the model and in the recipe, where they differ."""
    vision, existing = model.vision, list(model.vision.encoders)
    config = vision.config()
    values = {name: (config[name], getattr(options, name)) for name in SAME_IN_CONFIG}
    if options.chat_template_kwargs is not None:
        values["chat_template_kwargs"] = (model.chat.options, options.chat_template_kwargs)
    values["grid"] = (config["grid"], list(options.grid))
    values["mixer"] = (config["mixer"], MIXERS.path(options.mixer))
    values["projector"] = (config["projector"], PROJECTORS.path(options.projector))
    values["mixer_options"] = (config["mixer_options"], options.mixer_options or {})
    values["projector_options"] = (config["projector_options"], options.projector_options or {})
    values["sampling"] = (vision.sampling.mode, options.sampling)
    values["encoders"] = (existing, [name for name in encoders if name in existing])
    num_frames = {name: count for name, count in (options.num_frames or {}).items() if name in existing}
    values["num_frames"] = (dict(vision.num_frames), num_frames)
    for name, encoder in vision.named():
        preset = (options.presets or {}).get(name, encoder.preset_name)
        values[f"presets.{name}"] = (encoder.preset_name, preset)
    rms = model.fusion.token_rms
    if options.embed_scale is not None and rms is not None:
        values["embed_scale"] = (round(float(rms), 4), round(options.embed_scale, 4))
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}

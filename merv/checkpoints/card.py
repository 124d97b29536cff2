"""The model card (README.md) of a shared model. What merv does not know is marked to be filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN = "**to be filled in**"
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

CARD = """\
---
{metadata}
---

# {title}

{summary}

## Load it

```python
{load}
```

## Parts

{parts}

| encoder | class | variant | preset | weights | SHA-256 | license of the weights |
|---|---|---|---|---|---|---|
{encoders}

The encoders' licenses are as known to merv. For the language model's license, see its own page.

## What was trained

{trained}

## Data, results, license

- Training data: {unknown}
- Results, with the commands that measured them: {unknown}
- Limitations and risks: {unknown}
- License of the trained weights: {unknown}; the licenses of the parts above still apply.
"""

LOAD = {
    "VideoLLM": """\
from merv import VideoLLM, user_message

model = VideoLLM.from_pretrained("{repo}")
print(*model.generate([user_message("What happens?", "clip.mp4")]))""",
    "MultiEncoder": """\
from merv import MultiEncoder

encoders = MultiEncoder.from_pretrained("{repo}").eval()
tokens = encoders("clip.mp4").tokens  # [1, N, L]""",
}


def model_card(model: Any, repo_id: str, config: Mapping[str, Any]) -> str:
    """The card of a VideoLLM or MultiEncoder. `config` is its config with portable sources."""
    vision = getattr(model, "vision", model)
    vision_config, llm = config.get("vision", config), config.get("llm")
    encoders = [
        _table_row(name, encoder, vision_config["encoders"][name]) for name, encoder in vision.named()
    ]
    return CARD.format(
        metadata=_metadata(vision_config, llm, trains_llm="llm" in config.get("trained", ())),
        title=repo_id.rpartition("/")[2],
        summary="A video language model with several visual encoders, made with merv."
        if llm
        else "Several visual encoders fused into one video encoder, made with merv.",
        load=LOAD[model.kind].format(repo=repo_id),
        parts=_bullets(_parts(vision_config, llm)),
        encoders="\n".join(encoders),
        trained=_bullets(_trained(model, config)),
        unknown=UNKNOWN,
    )


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _metadata(vision: Mapping[str, Any], llm: Mapping[str, Any] | None, trains_llm: bool) -> str:
    """The YAML header for the hub. It has no license: the person who trained the model chooses that."""
    from huggingface_hub import ModelCardData

    sources = [llm["source"]] if llm else []
    sources += [encoder["identity"]["source"] for encoder in vision["encoders"].values()]
    base_models = [source for source in dict.fromkeys(sources) if REPO_ID.fullmatch(source)]
    return ModelCardData(
        library_name="merv",
        pipeline_tag="video-text-to-text" if llm else "feature-extraction",
        tags=["merv", "video"],
        base_model=base_models or None,
        base_model_relation=("finetune" if trains_llm else "adapter") if base_models else None,
    ).to_yaml()


def _parts(vision: Mapping[str, Any], llm: Mapping[str, Any] | None) -> list[str]:
    """Lines about the language model, the grid and the fusion."""
    lines = [] if llm is None else [f"Language model: `{llm['source']}`, {llm['dtype']}."]
    grid = "×".join(map(str, vision["grid"]))
    lines.append(f"Common grid (time, rows, columns): {grid}.")
    if vision["output_dim"] is None:
        return [*lines, "No fusion: the features of the encoders are kept apart."]
    mixer, projector = (_class_name(vision[part]) for part in ("mixer", "projector"))
    return [*lines, f"Fusion: mixer `{mixer}`, projectors `{projector}`, output_dim {vision['output_dim']}."]


def _class_name(path: str) -> str:
    """`Gate` for a class of merv, the whole path for others."""
    return path.rpartition(":")[2] if path.startswith("merv.") else path


def _table_row(name: str, encoder: Any, saved: Mapping[str, Any]) -> str:
    identity = saved["identity"]
    revision = f"@{identity['revision']}" if identity["revision"] else ""
    cells = [
        f"`{name}`",
        f"`{saved['class']}`",
        saved["variant"],
        saved["preset"],
        f"`{identity['source']}{revision}`",
        f"`{identity['sha256'][:16]}…`",
        encoder.spec.weights_license or UNKNOWN,
    ]
    return f"| {' | '.join(cells)} |"


def _trained(model: Any, config: Mapping[str, Any]) -> list[str]:
    """Lines about the trained parts."""
    num_values = sum(tensor.numel() for tensor in model.trainable_state_dict().values())
    parts = config.get("trained", ["projectors", "mixer"] if num_values else [])
    lines = [f"Trained parts: {', '.join(parts) or 'none'}. {num_values:,} values are saved."]
    if lora := config.get("lora"):
        modules = ", ".join(lora["target_modules"])
        lines.append(f"LoRA: r {lora['r']}, lora_alpha {lora['lora_alpha']}, target_modules {modules}.")
    return lines

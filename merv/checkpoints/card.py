"""The model card (README.md) of a shared model. What merv does not know is marked to be filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

UNKNOWN = "**to be filled in**"
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

CARD = """\
---
{metadata}
---

# {repo_id}

Made with merv. To load it:

```python
from merv import {kind}

model = {kind}.from_pretrained("{repo_id}")
```

## Parts

{parts}

The licenses of the encoders are those that merv knows. For the language model's license, see its own page.

## Training

- Trained parts: {trained}. {num_values:,} values are saved.
- Training data: {unknown}
- Results, with the commands that measured them: {unknown}
- Limitations and risks: {unknown}
- License of the trained weights: {unknown}; the licenses of the parts above still apply.
"""


def model_card(model: Any, repo_id: str, config: Mapping[str, Any]) -> str:
    """The card of a VideoLLM or MultiEncoder. `config` is its config with portable sources."""
    num_values = sum(tensor.numel() for tensor in model.trainable_state_dict().values())
    trained = config.get("trained", ["projectors", "mixer"] if num_values else [])
    return CARD.format(
        metadata=_metadata(config),
        kind=model.kind,
        repo_id=repo_id,
        parts="\n".join(f"- {part}" for part in _parts(model, config)),
        trained=", ".join(trained) or "none",
        num_values=num_values,
        unknown=UNKNOWN,
    )


def _metadata(config: Mapping[str, Any]) -> str:
    """The YAML header for the hub. It has no license: the person who trained the model chooses that."""
    from huggingface_hub import ModelCardData

    sources = [config["llm"]["source"]] if "llm" in config else []
    encoders = config.get("vision", config)["encoders"]
    sources += [encoder["identity"]["source"] for encoder in encoders.values()]
    base_models = [source for source in dict.fromkeys(sources) if REPO_ID.fullmatch(source)]
    relation = "finetune" if "llm" in config.get("trained", ()) else "adapter"
    return ModelCardData(
        library_name="merv",
        pipeline_tag="video-text-to-text" if "llm" in config else "feature-extraction",
        tags=["merv", "video"],
        base_model=base_models or None,
        base_model_relation=relation if base_models else None,
    ).to_yaml()


def _parts(model: Any, config: Mapping[str, Any]) -> list[str]:
    """Lines about the language model, the fusion and each encoder."""
    vision, lines = config.get("vision", config), []
    if "llm" in config:
        lines.append(f"Language model: `{config['llm']['source']}`, {config['llm']['dtype']}.")
    fusion = ", ".join(f"{name} {vision.get(name)}" for name in ("grid", "mixer", "projector", "output_dim"))
    lines.append(f"Fusion: {fusion}.")
    for name, encoder in getattr(model, "vision", model).named():
        saved, identity = vision["encoders"][name], vision["encoders"][name]["identity"]
        revision = f"@{identity['revision']}" if identity["revision"] else ""
        license = encoder.spec.weights_license
        lines.append(
            f"Encoder `{name}`: `{saved['class']}`, variant {saved['variant']}, preset {saved['preset']}, "
            f"weights `{identity['source']}{revision}` with SHA-256 `{identity['sha256'][:16]}…`, "
            f"license {UNKNOWN if license == 'unknown' else license}."
        )
    return lines

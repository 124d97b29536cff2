"""Card: the README.md of a shared model. It says what is known, and marks what is not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

UNKNOWN = "**to be filled in**"
BASE = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # what the hub takes as the id of a model

CARD = """\
---
{metadata}
---

# {title}

{what}

## Load it

```python
{load}
```

## What it is made of

{parts}

| encoder | class | variant | preset | weights | SHA-256 | their license |
|---|---|---|---|---|---|---|
{encoders}

The license of an encoder's weights is what merv knows of it; that of the language model is on its own page.

## What was trained

{trained}

## Data, results, license

- Trained on: {unknown}
- Results, with the command that measured them: {unknown}
- Limits and risks: {unknown}
- License of what was trained: {unknown}; the licenses of the parts above go on.
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
    """The card of a VideoLLM or MultiEncoder; `config` says where its parts are."""
    vision = getattr(model, "vision", model)
    saved = config.get("vision", config)
    llm = config.get("llm")
    return CARD.format(
        metadata=metadata(config),
        title=repo_id.rpartition("/")[2],
        what="A language model that sees video through several encoders, made with merv."
        if llm
        else "Several visual encoders of video as one, made with merv.",
        load=LOAD[model.kind].format(repo=repo_id),
        parts="\n".join(f"- {line}" for line in parts(llm, saved)),
        encoders="\n".join(row(encoder, saved["encoders"][name], name) for name, encoder in vision.named()),
        trained="\n".join(f"- {line}" for line in trained(model, config)),
        unknown=UNKNOWN,
    )


def metadata(config: Mapping[str, Any]) -> str:
    """What the hub reads: YAML. No license, which is for whoever trained it to choose."""
    from huggingface_hub import ModelCardData

    llm, saved = config.get("llm"), config.get("vision", config)
    sources = [
        *([llm["source"]] if llm else []),
        *(e["identity"]["source"] for e in saved["encoders"].values()),
    ]
    bases = [source for source in dict.fromkeys(sources) if BASE.fullmatch(source)]
    kind = "finetune" if "llm" in config.get("trained", ()) else "adapter"
    return ModelCardData(
        library_name="merv",
        pipeline_tag="video-text-to-text" if llm else "feature-extraction",
        tags=["merv", "video"],
        base_model=bases or None,
        base_model_relation=kind if bases else None,
    ).to_yaml()


def parts(llm: Mapping[str, Any] | None, saved: Mapping[str, Any]) -> list[str]:
    """Lines on the language model and on what lies before it."""
    lines = [] if llm is None else [f"Language model: `{llm['source']}`, {llm['dtype']}."]
    grid = "×".join(map(str, saved["grid"]))
    if saved["output_dim"] is None:
        return [*lines, f"Common grid {grid} (time, rows, columns); nothing is fused."]
    mixer, projector = (_class_name(saved[part]) for part in ("mixer", "projector"))
    fusion = f"mixer `{mixer}`, projectors `{projector}`, tokens {saved['output_dim']} wide"
    return [*lines, f"Common grid {grid} (time, rows, columns), {fusion}."]


def _class_name(path: str) -> str:
    """`Gate` of merv's own, the whole path of anybody else's."""
    return path.rpartition(":")[2] if path.startswith("merv.") else path


def row(encoder: Any, saved: Mapping[str, Any], name: str) -> str:
    """One encoder in the table."""
    identity, spec = saved["identity"], encoder.spec
    revision = f"@{identity['revision']}" if identity["revision"] else ""
    cells = [
        f"`{name}`",
        f"`{saved['class']}`",
        saved["variant"],
        saved["preset"],
        f"`{identity['source']}{revision}`",
        f"`{identity['sha256'][:16]}…`",
        spec.weights_license or UNKNOWN,
    ]
    return f"| {' | '.join(cells)} |"


def trained(model: Any, config: Mapping[str, Any]) -> list[str]:
    """Lines on what the folder holds, with numbers of parameters."""
    tensors = model.trainable_state_dict()
    total = f"{sum(tensor.numel() for tensor in tensors.values()):,} values are saved."
    if "trained" not in config:
        return [f"Projectors and mixer. {total}" if tensors else "Nothing."]
    lines = [f"{', '.join(config['trained']) or 'Nothing'}. {total}"]
    lora = config["lora"]
    if lora is not None:
        targets = ", ".join(lora["target_modules"])
        lines.append(f"LoRA of rank {lora['r']}, alpha {lora['lora_alpha']}, on {targets}.")
    return lines

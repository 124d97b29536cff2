"""Trainable parts: which parameters a VideoLLM has, by part, and which of them are trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merv.encoding.base import Encoder
from merv.errors import TrainingError
from merv.models.llm import LoraOptions, add_lora
from merv.models.multi_encoder import MultiEncoder
from merv.utils.suggest import nearest

if TYPE_CHECKING:
    from merv.fusion.fusion import Fusion


class TrainablePartsMixin(nn.Module):
    """`parts`, `train_only` and what follows from them, of a VideoLLM.

    trained: the parts that are. lora: the LoRA on the LLM, or None.
    """

    llm: Any
    vision: MultiEncoder
    fusion: Fusion
    trained: tuple[str, ...]
    lora: LoraOptions | None

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.lora = (), None
        self._llm_changed = False  # whether the LLM is no longer as its source has it
        self._gradient_hooks: list[Any] = []

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters by part: projector, mixer, lora (if there is one), llm, and each encoder by its name.

        `projector.NAME` and `mixer.NAME` are those of one encoder alone.
        """
        fusion = {f"vision.fusion.{name}": p for name, p in self.fusion.named_parameters()}
        llm = {f"llm.{name}": p for name, p in self.llm.named_parameters()}
        parts = {
            "projector": {name: p for name, p in fusion.items() if ".projectors." in name},
            "mixer": {name: p for name, p in fusion.items() if ".mixer." in name},
            "lora": {name: p for name, p in llm.items() if "lora_" in name},
            "llm": {name: p for name, p in llm.items() if "lora_" not in name},
        }
        shared = [f"vision.fusion.mixer.{name}" for name in self.fusion.mixer.per_encoder_parameters or ()]
        for name, encoder in self.vision.named():
            before = f"vision.encoders.{name}."
            parts[name] = {before + own: p for own, p in encoder.named_parameters()}
            before = f"vision.fusion.projectors.{name}."
            parts[f"projector.{name}"] = {n: p for n, p in fusion.items() if n.startswith(before)}
            parts[f"mixer.{name}"] = {name: fusion[name] for name in shared}
        return {name: own for name, own in parts.items() if own or name in ("projector", "mixer")}

    def train_only(self, trained: Sequence[str]) -> None:
        """Make exactly these of the parts trainable.

        Raises TrainingError for a part that is not there.
        """
        parts = self.parts()
        for name in trained:
            if name not in parts:
                raise TrainingError(
                    f"Unknown part {name!r}.{nearest(name, parts)} There are: {', '.join(parts)}."
                )
            if "." in name and name.partition(".")[0] in trained:
                raise TrainingError(f"{name} is a part of {name.partition('.')[0]}, which is trained whole.")
        self.trained = tuple(trained)
        self._llm_changed |= "llm" in trained
        for hook in self._gradient_hooks:
            hook.remove()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for name in trained:
            for parameter in parts[name].values():
                parameter.requires_grad_(True)
        self._gradient_hooks = [] if "mixer" in trained else self._keep_others(trained)

    def _keep_others(self, trained: Sequence[str]) -> list[Any]:
        """Where parts of the mixer are trained: hooks that leave the rest of their parameters as it is."""
        own: dict[str, Tensor] = {}
        for number, name in enumerate(self.vision.encoders):
            if f"mixer.{name}" in trained:
                for parameter, mask in self.fusion.mixer.encoder_mask(number).items():
                    own[parameter] = mask | own.get(parameter, mask)
        of_mixer = self.fusion.mixer.get_parameter
        return [of_mixer(name).register_hook(partial(torch.mul, mask)) for name, mask in own.items()]

    def add_lora(self, options: LoraOptions) -> None:
        """Put a LoRA on the LLM; it is trained when `lora` is among the parts."""
        add_lora(self.llm, options)
        self.lora = options
        self.train_only(self.trained)

    def add_encoder(self, name: str, encoder: Encoder, num_frames: int | None = None) -> None:
        """Take in another encoder: a fresh projector, and a share in the mixer that is small at first.

        num_frames: how many it gets, if not what its spec says.
        Train it by `train_only([f"projector.{name}", f"mixer.{name}"])`.
        """
        self.vision.add_encoder(name, encoder, num_frames)
        self.train_only(self.trained)

    def modified_parts(self) -> set[str]:
        """Frozen parts, `llm` or encoders, that are no longer as their source has them."""
        return self.vision.modified_parts() | ({"llm"} if self._llm_changed else set())

    def trainable_state_dict(self, modified: Collection[str] | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds: all of the fusion, the LoRA, and whatever else was ever trained.

        modified: which frozen parts those are, if not what `modified_parts` says.
        """
        parts = self.parts()
        fusion = {f"vision.fusion.{name}": t for name, t in self.fusion.state_dict().items()}
        others = {"lora", *(self.modified_parts() if modified is None else modified)}
        own = {name: p for part, named in parts.items() if part in others for name, p in named.items()}
        return {**fusion, **own}

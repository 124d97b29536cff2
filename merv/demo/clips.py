"""Clips: real H.264 files whose every shot, cut and fade is planned, so ground truth is exact.

A clip is planned first (which things, from when to when, how the camera moves, how one
shot gives way to the next) and rendered afterwards. All truth is read off the plan,
nothing off the file.

How the splits differ:

    train      ordered tuples of things ("cat, rocket, moon") for which `split_of` says so:
               three quarters of all tuples, chosen by a hash of the names.
    held_out   the same things, but only the other quarter of the tuples: no clip shows the
               things of a training clip in that clip's order, single-shot clips included.
               Crops, moves, durations, transitions and excerpts are drawn afresh as well.
    unseen     clips in which at least one held-out photograph appears, next to things of
               training. Train and held_out clips never show nor name such a photograph.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from merv.demo.material import Thing, load_pictures
from merv.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "held_out", "unseen"]
Move = Literal["still", "pan left", "pan right", "zoom in", "zoom out"]

FPS = 24
SIZE = (224, 160)  # (width, height) in pixels
MAX_SHOTS = 4
MIN_SHOT = 16  # frames: more than the longest fade, so that fades never touch
FRAMES = (3 * FPS, 5 * FPS)  # shortest and longest clip
FADES = (8, 10, 12)  # frames
FADE_SHARE = 1 / 3  # of the boundaries; the others are cuts
LOOK = 1  # part of a plan's key: raise it when `render` changes what a plan looks like


@dataclass(frozen=True)
class View:
    """Which part of a picture is on screen.

    zoom: side of the view relative to the largest one of the clip's aspect that fits.
    x, y: where it lies in the room that is left, 0 (left, top) to 1 (right, bottom).
    """

    x: float
    y: float
    zoom: float

    def towards(self, other: View, progress: float) -> View:
        """The view on the straight way to `other`; progress runs from 0 to 1."""
        mix = [a + (b - a) * progress for a, b in zip(self._parts(), other._parts(), strict=True)]
        return View(*mix)

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of a picture of `size` (width, height).

        >>> View(0.5, 0.5, 1.0).box((448, 448))
        (0.0, 64.0, 448.0, 384.0)
        """
        width = self.zoom * min(size[0], size[1] * SIZE[0] / SIZE[1])
        height = width * SIZE[1] / SIZE[0]
        left, top = self.x * (size[0] - width), self.y * (size[1] - height)
        return left, top, min(left + width, size[0]), min(top + height, size[1])

    def _parts(self) -> tuple[float, float, float]:
        return self.x, self.y, self.zoom


@dataclass(frozen=True)
class Shot:
    """One thing on screen, from start_s until the next shot starts at end_s.

    fade_s: length of the cross-fade into this shot, half before and half after start_s; 0
        for a cut. brightness: factor. mirrored: left and right exchanged. excerpt: where
        footage starts, 0 (as early as possible) to 1 (as late as possible).
    """

    name: str
    start_s: float
    end_s: float
    move: Move
    begin: View
    end: View
    fade_s: float
    brightness: float
    mirrored: bool
    excerpt: float


@dataclass(frozen=True)
class ClipPlan:
    """The shots of a clip, in order and without gaps, each of another thing."""

    shots: tuple[Shot, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What is shown, in order."""
        return tuple(shot.name for shot in self.shots)

    @property
    def frames(self) -> int:
        """How many frames the clip has, at FPS."""
        return frame_at(self.shots[-1].end_s)

    @property
    def key(self) -> str:
        """A hash of all that is planned: equal plans, equal keys."""
        content = json.dumps([LOOK, SIZE, FPS, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Clip:
    """A file and the plan that it was rendered from."""

    path: Path
    plan: ClipPlan


def frame_at(time_s: float) -> int:
    """The index of the frame that starts at a planned time.

    >>> frame_at(1.5)
    36
    """
    return round(time_s * FPS)


# Plan --------------------------------------------------------------------------------------


def split_of(order: Sequence[Thing]) -> Split:
    """The split that clips of these things, in this order, belong to."""
    if any(thing.held_out for thing in order):
        return "unseen"
    names = ", ".join(thing.name for thing in order)
    return "train" if hashlib.sha256(names.encode()).digest()[0] % 4 else "held_out"


def plan_clips(split: Split, count: int, seed: int, things: Sequence[Thing]) -> list[ClipPlan]:
    """`count` plans of a split with one, two, three, four, one, … shots.

    The plan of an index depends on seed and split alone: a longer list starts with the shorter.
    """
    plans = []
    for index in range(count):
        rng = random.Random(f"{seed} {split} {index}")
        order = _draw_order(rng, split, 1 + index % min(MAX_SHOTS, len(things)), things)
        plans.append(plan_clip(rng, [thing.name for thing in order]))
    return plans


def plan_clip(rng: random.Random, names: Sequence[str]) -> ClipPlan:
    """A clip that shows these things in this order; everything else is drawn from `rng`.

    >>> plan_clip(random.Random(0), ["cat", "rocket"]).names
    ('cat', 'rocket')
    """
    spare = rng.randint(*FRAMES) - MIN_SHOT * len(names)
    cuts = sorted(rng.randint(0, spare) for _ in names[1:])
    starts = [0, *(cut + MIN_SHOT * (i + 1) for i, cut in enumerate(cuts))]
    ends = [*starts[1:], spare + MIN_SHOT * len(names)]
    shots = zip(names, starts, ends, strict=True)
    return ClipPlan(tuple(_plan_shot(rng, name, start / FPS, end / FPS) for name, start, end in shots))


def _draw_order(rng: random.Random, split: Split, shots: int, things: Sequence[Thing]) -> list[Thing]:
    for _ in range(1000):
        order = rng.sample(list(things), shots)
        if split_of(order) == split:
            return order
    raise DataError(
        f"Found no order of {shots} out of {len(things)} things for the split {split!r}. "
        "Give more things; 'unseen' wants at least one that is held out."
    )


def _plan_shot(rng: random.Random, name: str, start_s: float, end_s: float) -> Shot:
    fades = start_s > 0 and rng.random() < FADE_SHARE
    move, begin, end = _plan_move(rng)
    return Shot(
        name,
        start_s,
        end_s,
        move=move,
        begin=begin,
        end=end,
        fade_s=rng.choice(FADES) / FPS if fades else 0.0,
        brightness=round(rng.uniform(0.8, 1.2), 3),
        mirrored=rng.random() < 0.5,
        excerpt=round(rng.random(), 3),
    )


def _plan_move(rng: random.Random) -> tuple[Move, View, View]:
    move: Move = rng.choice(("still", "pan left", "pan right", "zoom in", "zoom out"))
    x, y = round(rng.uniform(0.2, 0.8), 3), round(rng.uniform(0.1, 0.6), 3)  # heads are near the top
    zoom = round(rng.uniform(0.7, 0.85), 3)
    near, far = View(x, y, zoom), View(x, y, 1.0)
    left, right = View(0.1, y, zoom), View(0.9, y, zoom)
    ways: dict[Move, tuple[View, View]] = {
        "still": (near, near),
        "pan left": (right, left),
        "pan right": (left, right),
        "zoom in": (far, near),
        "zoom out": (near, far),
    }
    return move, *ways[move]


# Render ------------------------------------------------------------------------------------


def make_clips(
    folder: str | Path,
    split: Split,
    count: int,
    *,
    things: Sequence[Thing],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Clip]:
    """The clips of a split as files in `folder`; those that are there already are kept.

    Files are named by the content of their plans and appear whole or not at all, so an
    interrupted call can be repeated. progress: called with (clips ready, count).
    Raises DataError where material is missing or does not suffice for the split.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    plans = plan_clips(split, count, seed, things)
    clips = [Clip(folder / f"{plan.key}.mp4", plan) for plan in plans]
    missing = [clip for clip in clips if not clip.path.exists()]
    shown = {name for clip in missing for name in clip.plan.names}
    pictures = load_pictures([thing for thing in things if thing.name in shown])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL and FFmpeg work outside the GIL
        done = pool.map(lambda clip: render(clip.plan, clip.path, pictures), missing)
        for ready, _ in enumerate(done, start=count - len(missing) + 1):
            if progress:
                progress(ready, count)
    return clips


def render(plan: ClipPlan, path: str | Path, pictures: Mapping[str, Sequence[Image]]) -> None:
    """Encode a plan to an mp4 file at `path`; pictures: name → one still, or a frame of footage each."""
    import av

    path = Path(path)
    unfinished = path.with_suffix(f".{os.getpid()}.part")  # another process may make it too
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"preset": "veryfast", "crf": "20", "threads": "1"} if codec == "libx264" else {"q:v": "3"}
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for picture in draw_frames(plan, pictures):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    unfinished.replace(path)


def draw_frames(plan: ClipPlan, pictures: Mapping[str, Sequence[Image]]) -> Iterator[Image]:
    """The clip's frames, RGB pictures of SIZE, one after the other."""
    from PIL import Image as image

    for frame in range(plan.frames):
        picture = None
        for shot, first, last, fade in _spans(plan):
            if first <= frame < last:
                drawn = _draw(shot, frame - first, last - first, pictures[shot.name])
                share = (frame - first + 0.5) / fade if fade else 1.0
                picture = drawn if picture is None or share >= 1 else image.blend(picture, drawn, share)
        assert picture is not None, f"no shot at frame {frame}"
        yield picture


def _spans(plan: ClipPlan) -> list[tuple[Shot, int, int, int]]:
    """Each shot with its first and last + 1 visible frame, fades included, and its fade's frames."""
    fades = [frame_at(shot.fade_s) for shot in plan.shots]
    return [
        (shot, frame_at(shot.start_s) - fade // 2, frame_at(shot.end_s) + after // 2, fade)
        for shot, fade, after in zip(plan.shots, fades, [*fades[1:], 0], strict=True)
    ]


def _draw(shot: Shot, frame: int, frames: int, pictures: Sequence[Image]) -> Image:
    """The shot's own picture at its frame 0 … frames − 1; views are those of the mirrored picture."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    picture = pictures[_footage_index(frame, frames, len(pictures), shot.excerpt)]
    view = shot.begin.towards(shot.end, frame / max(1, frames - 1))
    if shot.mirrored:
        view = replace(view, x=1 - view.x)
    picture = picture.resize(SIZE, Resampling.BILINEAR, box=view.box(picture.size))
    if shot.mirrored:
        picture = ImageOps.mirror(picture)
    return picture.point(_brightened(shot.brightness))


@lru_cache(maxsize=64)
def _brightened(factor: float) -> list[int]:
    """The table that PIL maps the values of red, green and blue by."""
    return [min(255, round(value * factor)) for value in range(256)] * 3


def _footage_index(frame: int, frames: int, there: int, excerpt: float) -> int:
    """Which frame of footage to show; footage that is too short runs to and fro."""
    start = int(excerpt * max(0, there - frames))
    period = max(1, 2 * (there - 1))
    at = (start + frame) % period
    return min(at, period - at) if there > 1 else 0

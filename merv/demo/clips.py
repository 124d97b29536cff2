"""Plan and render the demo's clips: H.264 files with exact ground truth.

A clip is planned first: the things it shows, their times, the camera moves and the transitions. Then it is
rendered. The ground truth comes from the plan.

The splits:

    train      Sequences of things, such as "cat, rocket, moon". A hash of the names selects three quarters of
               all sequences.
    held_out   The same things in the remaining sequences: no training clip shows the same things in the same
               order. Crops, moves, durations, transitions and excerpts are also new.
    unseen     Clips with at least one unseen photograph. The other splits never show or name one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from merv.demo.material import Thing, load_pictures
from merv.errors import DataError
from merv.utils.files import temporary_beside

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "held_out", "unseen"]
Move = Literal["still", "pan left", "pan right", "zoom in", "zoom out"]

FPS = 24
SIZE = (224, 160)  # (width, height) in pixels
MAX_SHOTS = 4
MIN_SHOT = 16  # frames; longer than the longest fade, so that fades do not overlap
FRAMES = (3 * FPS, 5 * FPS)  # minimum and maximum length of a clip
FADES = (8, 10, 12)  # frames
FADE_SHARE = 1 / 3  # share of boundaries with a fade; the others are cuts
RENDER_VERSION = 1  # increase it when `render` draws the same plan differently


@dataclass(frozen=True)
class View:
    """The part of a picture that is on screen.

    Attributes:
        x: Horizontal position of the view, 0 (left) to 1 (right).
        y: Vertical position of the view, 0 (top) to 1 (bottom).
        zoom: Size of the view, relative to the largest one that fits.
    """

    x: float
    y: float
    zoom: float

    def towards(self, other: View, progress: float) -> View:
        """Interpolate linearly: this view at progress 0, `other` at 1."""
        return View(
            self.x + (other.x - self.x) * progress,
            self.y + (other.y - self.y) * progress,
            self.zoom + (other.zoom - self.zoom) * progress,
        )

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The view as (left, top, right, bottom), in pixels of a picture of `size` (width, height).

        >>> View(0.5, 0.5, 1.0).box((448, 448))
        (0.0, 64.0, 448.0, 384.0)
        """
        width = self.zoom * min(size[0], size[1] * SIZE[0] / SIZE[1])
        height = width * SIZE[1] / SIZE[0]
        left, top = self.x * (size[0] - width), self.y * (size[1] - height)
        return left, top, min(left + width, size[0]), min(top + height, size[1])


@dataclass(frozen=True)
class Shot:
    """One thing on screen.

    Attributes:
        name: Name of the thing.
        start_s: Start in seconds.
        end_s: End in seconds, which is the start of the next shot.
        move: Camera move.
        begin: View at the start.
        end: View at the end.
        fade_s: Length of the cross-fade into this shot, centered at start_s; 0 for a cut.
        brightness: Factor on the pixel values.
        mirrored: Whether left and right are swapped.
        excerpt: Start of the excerpt of footage, 0 (as early as possible) to 1 (as late as possible).
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
    """The shots of a clip, in order and without gaps. Each shows a different thing."""

    shots: tuple[Shot, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the things, in order."""
        return tuple(shot.name for shot in self.shots)

    @property
    def frames(self) -> int:
        """Number of frames of the clip."""
        return frame_at(self.shots[-1].end_s)

    @property
    def key(self) -> str:
        """A hash of the whole plan."""
        content = json.dumps([RENDER_VERSION, SIZE, FPS, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def frame_at(time_s: float) -> int:
    """The index of the frame at a planned time.

    >>> frame_at(1.5)
    36
    """
    return round(time_s * FPS)


# Plan -------------------------------------------------------------------------------------


def split_of(order: Sequence[Thing]) -> Split:
    """The split of clips that show these things in this order."""
    if any(thing.unseen for thing in order):
        return "unseen"
    names = ", ".join(thing.name for thing in order)
    return "train" if hashlib.sha256(names.encode()).digest()[0] % 4 else "held_out"


def plan_clips(split: Split, count: int, seed: int, things: Sequence[Thing]) -> list[ClipPlan]:
    """Plan `count` clips of a split, with one, two, three, four, one, … shots.

    A plan depends only on seed, split and index, so a larger count only adds plans.
    """
    plans = []
    for index in range(count):
        rng = random.Random(f"{seed} {split} {index}")
        order = _sample_order(rng, split, 1 + index % min(MAX_SHOTS, len(things)), things)
        plans.append(plan_clip(rng, [thing.name for thing in order]))
    return plans


def plan_clip(rng: random.Random, names: Sequence[str]) -> ClipPlan:
    """Plan a clip that shows these things in this order; everything else is random.

    >>> plan_clip(random.Random(0), ["cat", "rocket"]).names
    ('cat', 'rocket')
    """
    spare = rng.randint(*FRAMES) - MIN_SHOT * len(names)
    cuts = sorted(rng.randint(0, spare) for _ in names[1:])
    starts = [0, *(cut + MIN_SHOT * (i + 1) for i, cut in enumerate(cuts))]
    ends = [*starts[1:], spare + MIN_SHOT * len(names)]
    shots = zip(names, starts, ends, strict=True)
    return ClipPlan(tuple(_plan_shot(rng, name, start / FPS, end / FPS) for name, start, end in shots))


def _sample_order(rng: random.Random, split: Split, shots: int, things: Sequence[Thing]) -> list[Thing]:
    for _ in range(1000):
        order = rng.sample(list(things), shots)
        if split_of(order) == split:
            return order
    raise DataError(
        f"Found no sequence of {shots} out of {len(things)} things for the split {split!r}. "
        "Pass more things. 'unseen' needs at least one that is unseen."
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
    x, y = (
        round(rng.uniform(0.2, 0.8), 3),
        round(rng.uniform(0.1, 0.6), 3),
    )  # faces are near the top of photographs
    zoom = round(rng.uniform(0.7, 0.85), 3)
    near, far = View(x, y, zoom), View(x, y, 1.0)
    left, right = View(0.1, y, zoom), View(0.9, y, zoom)
    views: dict[Move, tuple[View, View]] = {
        "still": (near, near),
        "pan left": (right, left),
        "pan right": (left, right),
        "zoom in": (far, near),
        "zoom out": (near, far),
    }
    return move, *views[move]


# Render ------------------------------------------------------------------------------------


def make_clips(folder: Path, plans: Sequence[ClipPlan], things: Sequence[Thing]) -> None:
    """Render clips into `folder` with a progress bar; existing files are kept.

    Files are named by the key of their plan and written atomically, so an interrupted call can be repeated.
    Raises DataError if a picture is missing.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    missing = {path: plan for plan in plans if not (path := folder / f"{plan.key}.mp4").exists()}
    names = {name for plan in missing.values() for name in plan.names}
    pictures = load_pictures([thing for thing in things if thing.name in names])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL and FFmpeg release the GIL
        rendered = pool.map(lambda path: render(missing[path], path, pictures), missing)
        for _ in tqdm(rendered, "Rendering", len(missing), unit="clip", mininterval=1.0, disable=not missing):
            pass


def render(plan: ClipPlan, path: str | Path, pictures: Mapping[str, Sequence[Image]]) -> None:
    """Render a plan to an MP4 file; pictures: name → one photograph, or the frames of footage."""
    import av

    path = Path(path)
    options = {"preset": "veryfast", "crf": "20", "threads": "1"}
    with temporary_beside(path) as unfinished:
        with av.open(str(unfinished), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=FPS, options=options)
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            for picture in draw_frames(plan, pictures):
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
        unfinished.replace(path)


def draw_frames(plan: ClipPlan, pictures: Mapping[str, Sequence[Image]]) -> Iterator[Image]:
    """Yield the frames of a clip, RGB pictures of SIZE."""
    from PIL import Image as image

    for frame in range(plan.frames):
        picture = None
        for shot, first, stop, fade in _spans(plan):
            if first <= frame < stop:
                shot_picture = _draw(shot, frame - first, stop - first, pictures[shot.name])
                opacity = (frame - first + 0.5) / fade if fade else 1.0
                if picture is None or opacity >= 1:
                    picture = shot_picture
                else:
                    picture = image.blend(picture, shot_picture, opacity)
        assert picture is not None, f"no shot at frame {frame}"
        yield picture


def _spans(plan: ClipPlan) -> list[tuple[Shot, int, int, int]]:
    """For each shot: the shot, its first visible frame, the frame after its last one, its fade in frames."""
    fades = [frame_at(shot.fade_s) for shot in plan.shots]
    return [
        (shot, frame_at(shot.start_s) - fade // 2, frame_at(shot.end_s) + next_fade // 2, fade)
        for shot, fade, next_fade in zip(plan.shots, fades, [*fades[1:], 0], strict=True)
    ]


def _draw(shot: Shot, frame: int, frames: int, pictures: Sequence[Image]) -> Image:
    """Draw one of the shot's frames; its views refer to the mirrored picture."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    picture = pictures[_footage_index(frame, frames, len(pictures), shot.excerpt)]
    view = shot.begin.towards(shot.end, frame / max(1, frames - 1))
    if shot.mirrored:
        view = replace(view, x=1 - view.x)
    picture = picture.resize(SIZE, Resampling.BILINEAR, box=view.box(picture.size))
    if shot.mirrored:
        picture = ImageOps.mirror(picture)
    return picture.point(lambda value: min(255, round(value * shot.brightness)))


def _footage_index(frame: int, frames: int, length: int, excerpt: float) -> int:
    """The index of the frame of footage to show; too short footage plays forward and backward."""
    if length == 1:
        return 0
    start = int(excerpt * max(0, length - frames))
    period = 2 * (length - 1)
    position = (start + frame) % period
    return min(position, period - position)

"""Read video files with torchcodec: the same frames and times as the PyAV reader.

The PyAV reader scans the packets for the list of frames and their times. torchcodec gets that list, so both
readers number the frames alike. Each frame that torchcodec returns is checked against the list.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO

import torch
from torch import Tensor

from merv.errors import DamagedVideo, MissingDependency, ShapeError, VideoError
from merv.types import VideoInfo
from merv.video.pyav import PyAVReader, check_matrix, rounding_s, video_stream
from merv.video.reader import VideoReader, check_size, display_size

FRAMES_AT_ONCE = 8  # of a decoder whose times are read
DECODE_ERRORS = (RuntimeError, IndexError, ValueError, OSError)  # raised by torchcodec or the file object


class TorchcodecReader(PyAVReader):
    """Reads a seekable binary file; see `open_video`.

    torchcodec gets the open file, never a path or an address, and allows no protocol inside it. The scan
    with PyAV refuses playlists before torchcodec opens them. Damaged files, files without times (AVI, raw
    H.264) and frames whose times differ from the scan raise an error that suggests `pyav`. Damage that
    torchcodec's FFmpeg conceals is not noticed; the PyAV reader may notice it.
    """

    def __init__(self, file: BinaryIO, name: str, max_pixels: int) -> None:
        self._decoder_class = load_decoder()
        super().__init__(file, name, max_pixels)
        if self._scan.by_count:
            raise self._refusal("its frames have no times, which torchcodec needs to find them")
        if self.info.codec == "mjpeg":
            raise self._refusal("each frame may have its own EXIF orientation, which torchcodec ignores")
        if self.damage:
            raise self._refusal(self.damage, DamagedVideo)
        self.info = replace(self.info, backend="torchcodec")

    def _decode(self, indices: list[int]) -> Iterator[tuple[int, Tensor]]:
        try:
            decoder = self._decoder()
            # torchcodec rotates frames but does not mirror them, so undo the rotation and do both here.
            quarter_turns = round((decoder.metadata.rotation or 0.0) / 90)  # counter-clockwise
            for index in indices:
                frame = decoder.get_frame_at(index)
                coded = torch.rot90(frame.data, -quarter_turns, (1, 2))  # [3, H, W]
                self._check_frame(index, frame.pts_seconds, coded)
                yield index, self._orientation(coded)
        except DECODE_ERRORS as error:
            raise self._refusal(first_line(error), DamagedVideo) from error

    def _decoder(self) -> Any:
        with self._open() as container:
            stream_index = video_stream(container).index  # by default torchcodec takes the largest stream
        keyframes = set(self._scan.keyframes)
        # Durations matter only for reading by time, which is not done here.
        frames = [{"pts": pts, "duration": 1, "key_frame": pts in keyframes} for pts in self._pts]
        self._file.seek(0)
        return self._decoder_class(
            self._file,
            stream_index=stream_index,
            num_ffmpeg_threads=1,
            device="cpu",
            custom_frame_mappings=json.dumps({"frames": frames}),
        )

    def _check_frame(self, index: int, pts_s: float, coded: Tensor) -> None:
        error_s = pts_s - self._pts[index] * self._scan.tick_s
        if abs(error_s) > self._scan.tick_s / 2:
            raise self._refusal(f"the time of frame {index} is off by {error_s:+g} s")
        if coded.shape[1:] != (self._scan.first_frame.height, self._scan.first_frame.width):
            raise self._refusal(f"the frame size changes at frame {index}")

    def _refusal(self, reason: str, kind: type[VideoError] = VideoError) -> VideoError:
        return kind(
            f"{self._name}: torchcodec cannot read it: {reason}. Try backend='pyav', which also reads the "
            "intact frames of damaged files with load_video(…, on_error='partial')."
        )


class DecoderReader(VideoReader):
    """Reads a VideoDecoder of torchcodec that a caller created, whose file is unknown.

    It has no list of times, so all frames are decoded once, a few at a time.
    """

    def __init__(self, decoder: Any, name: str, max_pixels: int) -> None:
        super().__init__()
        self._decoder, self._name, self._process, self.max_pixels = decoder, name, os.getpid(), max_pixels
        metadata = decoder.metadata
        check_size(name, metadata.width, metadata.height, max_pixels)
        check_matrix(name, getattr(metadata, "color_space", None))
        times_s, end_s = [], 0.0
        with self._errors():
            for start in range(0, len(decoder), FRAMES_AT_ONCE):
                batch = decoder.get_frames_in_range(start, min(start + FRAMES_AT_ONCE, len(decoder)))
                times_s += batch.pts_seconds.tolist()
                end_s = float(batch.pts_seconds[-1] + batch.duration_seconds[-1])
            height, width = self._pixels(decoder.get_frame_at(0).data).shape[1:]
        aspect = float(getattr(metadata, "pixel_aspect_ratio", None) or 1)  # absent from old versions
        quarter_turns = round((getattr(metadata, "rotation", None) or 0.0) / 90)  # counter-clockwise
        width, height = display_size(width, height, 1 / aspect if quarter_turns % 2 else aspect)
        self.info = VideoInfo(
            name,
            duration_s=end_s - times_s[0],
            times_s=tuple(time_s - times_s[0] for time_s in times_s),
            width=width,
            height=height,
            rotation=-quarter_turns % 4 * 90,
            codec=metadata.codec or "",
            backend="torchcodec",
            time_error_s=rounding_s([round(time_s * 1e6) for time_s in times_s], 1e-6),  # in microseconds
        )

    def _decode(self, indices: list[int]) -> Iterator[tuple[int, Tensor]]:
        if os.getpid() != self._process:
            raise VideoError(
                f"{self._name}: a VideoDecoder cannot be used in a process that was forked after it was "
                "created. Pass the path of the video."
            )
        with self._errors():
            for index in indices:
                yield index, self._pixels(self._decoder.get_frame_at(index).data)

    def _pixels(self, frame: Tensor) -> Tensor:
        """Return a frame as uint8 [3, H, W]; the decoder may give [H, W, 3], on another device."""
        if frame.dtype != torch.uint8:
            raise ShapeError(
                f"{self._name}: expected a VideoDecoder of uint8 frames; got {frame.dtype}. Create it with "
                "output_dtype=torch.uint8."
            )
        return (frame if len(frame) == 3 else frame.movedim(-1, 0)).cpu()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ShapeError:  # a ValueError, too
            raise
        except DECODE_ERRORS as error:
            raise DamagedVideo(
                f"{self._name}: the VideoDecoder cannot read it: {first_line(error)}. Pass the path of the "
                "video."
            ) from error


def load_decoder() -> Any:
    """Import torchcodec's VideoDecoder.

    Raises MissingDependency if torchcodec is not installed or does not find FFmpeg's libraries.
    """
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:  # not installed, or built for another torch
        raise MissingDependency(
            f"backend='torchcodec' needs torchcodec ({first_line(error)}): pip install \".[torchcodec]\" "
            "in the clone, in the version that matches your torch. It also needs FFmpeg's shared libraries. "
            "Or use backend='pyav', which includes its own."
        ) from error
    if torchcodec.ffmpeg_major_version is None:
        raise MissingDependency(
            "torchcodec is installed but does not find shared libraries of FFmpeg 4 to 9. Install them "
            "(apt-get install ffmpeg or conda install ffmpeg), or use backend='pyav', which includes its own."
        )
    return VideoDecoder


def first_line(error: Exception) -> str:
    """Return the first line of a message without the location in torchcodec's source and the final period.

    >>> first_line(RuntimeError("decode, /a/b.cpp:12, Could not push packet to decoder.\\nmore"))
    'Could not push packet to decoder'
    """
    return re.sub(r"^\w+, \S+:\d+, ", "", str(error).strip().partition("\n")[0]).rstrip(". ")

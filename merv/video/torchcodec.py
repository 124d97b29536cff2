"""Read video files with torchcodec: the same frames and times as the PyAV reader.

The PyAV reader scans the packets for the list of frames and their times. torchcodec gets that list, so both
readers number the frames alike. Each frame that torchcodec returns is checked against the list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import torch
from torch import Tensor

from merv.errors import DamagedVideo, MissingDependency, VideoError
from merv.video.pyav import PyAVReader, video_stream

DECODE_ERRORS = (RuntimeError, IndexError, ValueError, OSError)  # raised by torchcodec or the file object


class TorchcodecReader(PyAVReader):
    """Reads a seekable binary file; see `open_video`.

    torchcodec gets the open file, never a path or an address, and allows no protocol inside it. The scan
    with PyAV refuses playlists before torchcodec opens them. Damaged files, files without times (AVI, raw
    H.264) and frames whose times differ from the scan raise an error that suggests `pyav`. Damage that
    torchcodec's FFmpeg conceals is not noticed; the PyAV reader may notice it.
    """

    def __init__(self, file: BinaryIO, name: str, **options: Any) -> None:
        self._decoder_class = load_decoder()
        super().__init__(file, name, **options)
        if self._by_count:
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
        keyframes = set(self._keyframes)
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
        error_s = pts_s - self._pts[index] * self._tick_s
        if abs(error_s) > self._tick_s / 2:
            raise self._refusal(f"the time of frame {index} is off by {error_s:+g} s")
        if coded.shape[1:] != (self._first_frame.height, self._first_frame.width):
            raise self._refusal(f"the frame size changes at frame {index}")

    def _refusal(self, reason: str, kind: type[VideoError] = VideoError) -> VideoError:
        return kind(
            f"{self._name}: torchcodec cannot read it: {reason}. Try backend='pyav', which also reads the "
            "intact frames of damaged files with load_video(…, on_error='partial')."
        )


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

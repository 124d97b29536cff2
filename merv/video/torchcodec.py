"""Reader of video files by torchcodec: the frames and times of the PyAV reader, decoded elsewhere.

PyAV's pass over the packets tells which frames there are and when each is shown. torchcodec gets
that list, so both number the frames alike, and every frame that it gives is held against it.
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
from merv.video.pyav import PyAVReader, _video_stream

BROKEN = (RuntimeError, IndexError, ValueError, OSError)  # what torchcodec or the file object raises


class TorchcodecReader(PyAVReader):
    """Reads a seekable binary file; see `open_video`.

    torchcodec gets the open file, never a path or an address, and allows no protocol inside it;
    playlists are refused before, by PyAV's pass. What is damaged, has no times of its own (AVI, bare
    H.264) or comes with other times than asked for is refused with an error that names `pyav`.
    Damage that torchcodec's FFmpeg conceals is not noticed, where PyAV's reader may notice it.
    """

    def __init__(self, file: BinaryIO, name: str, **options: Any) -> None:
        self._decoder_class = load_decoder()
        super().__init__(file, name, **options)
        if self._by_count:
            raise self._refusal("its frames carry no times of their own, by which torchcodec finds them")
        if self.damage:
            raise self._refusal(self.damage, DamagedVideo)
        self.info = replace(self.info, backend="torchcodec")

    def _decode(self, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        try:
            decoder = self._decoder()
            turned = round(
                (decoder.metadata.rotation or 0.0) / 90
            )  # quarters counter-clockwise, by torchcodec
            for index in wanted:
                frame = decoder.get_frame_at(index)
                coded = torch.rot90(frame.data, -turned, (1, 2))  # [3, H, W]
                self._check_frame(index, frame.pts_seconds, coded)
                yield index, self._turn(coded)  # which knows of mirrored pictures, too
        except BROKEN as error:
            raise self._refusal(first_line(error), DamagedVideo) from error

    def _decoder(self) -> Any:
        with self._open() as container:
            stream = _video_stream(container).index  # torchcodec's own choice is the largest one
        keys = set(self._keys)
        # The last frame's duration matters only for asking by time, which is not done here.
        frames = [{"pts": pts, "duration": 1, "key_frame": pts in keys} for pts in self._pts]
        self._file.seek(0)
        return self._decoder_class(
            self._file,
            stream_index=stream,
            num_ffmpeg_threads=1,
            device="cpu",
            custom_frame_mappings=json.dumps({"frames": frames}),
        )

    def _check_frame(self, index: int, pts_s: float, coded: Tensor) -> None:
        error_s = pts_s - self._pts[index] * self._tick_s
        if abs(error_s) > self._tick_s / 2:
            raise self._refusal(f"frame {index} came with a time that is {error_s:+g} s off")
        if coded.shape[1:] != (self._first.height, self._first.width):
            raise self._refusal(f"its pictures change in size at frame {index}")

    def _refusal(self, why: str, kind: type[VideoError] = VideoError) -> VideoError:
        return kind(
            f"{self._name}: torchcodec cannot read it: {why}. backend='pyav' may, and with "
            "load_video(…, on_error='partial') takes what is readable of damaged files."
        )


def load_decoder() -> Any:
    """torchcodec's VideoDecoder.

    Raises MissingDependency where torchcodec is not installed, or finds no FFmpeg libraries.
    """
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder
    except ImportError as error:
        raise MissingDependency(
            f"backend='torchcodec' needs torchcodec ({error}): pip install \"merv[torchcodec]\", and "
            "FFmpeg's shared libraries; or use backend='pyav', which brings its own."
        ) from error
    except (RuntimeError, OSError) as error:  # built for another torch
        raise MissingDependency(
            f"torchcodec is installed but does not load: {first_line(error)}. "
            "Its version has to fit that of torch; or use backend='pyav'."
        ) from error
    if torchcodec.ffmpeg_major_version is None:
        raise MissingDependency(
            "torchcodec is installed but finds no shared libraries of FFmpeg, versions 4 to 9, that fit. "
            "Install them (apt-get install ffmpeg; conda install ffmpeg); or use backend='pyav', which "
            "brings its own."
        )
    return VideoDecoder


def first_line(error: Exception) -> str:
    """What an error says, without where in torchcodec's source it arose, and without a full stop.

    >>> first_line(RuntimeError("decode, /a/b.cpp:12, Could not push packet to decoder.\\nmore"))
    'Could not push packet to decoder'
    """
    return re.sub(r"^\w+, \S+:\d+, ", "", str(error).strip().partition("\n")[0]).rstrip(". ")

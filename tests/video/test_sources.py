"""Sources of every kind and their clocks: edit lists, rounded times, pipes, forks, rows of datasets."""

import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

import av
import pytest
import torch
from datasets import Dataset, Features, Video
from media import indices_of, make_folder, make_gif, make_video

from merv import MultiEncoder, load_video
from merv.data.samples import sample_of
from merv.data.sources import FilePart, open_samples
from merv.errors import DataError, MervError, MissingDependency, UnreadableVideo, VideoError
from merv.features.keys import content_digest
from merv.features.store import FeatureStore
from merv.utils.files import file_digest
from merv.video.open import open_video, probe
from merv.video.reader import VideoReader
from merv.video.sampling import Sampling, frame_indices_at
from merv.video.torchcodec import load_decoder


@pytest.mark.parametrize(("cut_off", "frames"), [(0, 40), (800, None)])
def test_edit_list_that_delays_and_trims_is_not_damage(
    tmp_path: Path, cut_off: int, frames: int | None
) -> None:
    path = make_video(
        tmp_path / "a.mp4", 60, start_s=0.2, options={"bf": "0"}, container={"movflags": "faststart"}
    )
    data = bytearray(path.read_bytes())
    first, second = (data.index(b"elst") + offset for offset in (12, 24))  # entries; durations are in ms
    assert int.from_bytes(data[first : first + 4], "big") == 200  # nothing is shown
    data[second : second + 4] = (1600).to_bytes(4, "big")
    path.write_bytes(data[: len(data) - cut_off])
    with open_video(path) as video:
        assert bool(video.damage) == bool(cut_off)
        if frames:
            assert (video.info.num_frames, video.info.duration_s) == (40, pytest.approx(1.6))
            assert indices_of(video.read([0, 39])) == [0, 39]


RATES = [Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 50, Fraction(60000, 1001), 60, 120]


def constant_rate(path: Path, rate: Fraction | int, frames: int = 121, first: int = 0) -> Path:
    """Write frames from number `first` on, as a cut of a longer video."""
    codec = "libvpx" if path.suffix == ".webm" else "mpeg4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, width=16, height=16, pix_fmt="yuv420p")
        for index in range(frames):
            frame = av.VideoFrame(16, 16, "yuv420p")
            frame.pts, frame.time_base = first + index, 1 / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".ts", ".mp4"])
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.2f}")
@pytest.mark.parametrize("first", [0, 7])
def test_frame_n_is_on_screen_at_n_over_rate(
    tmp_path: Path, rate: Fraction | int, suffix: str, first: int
) -> None:
    info = probe(constant_rate(tmp_path / f"a{suffix}", rate, first=first))
    assert info.num_frames == 121
    times_s = [float(n / rate) for n in range(121)]
    centers_s = [float((n + Fraction(1, 2)) / rate) for n in range(121)]
    assert frame_indices_at(info.times_s, times_s, info.time_error_s) == list(range(121))
    assert frame_indices_at(info.times_s, centers_s, info.time_error_s) == list(range(121))
    assert info.time_error_s <= 0.001


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_copy_keeps_the_rounding_of_its_original(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"b{suffix}"
    with av.open(str(constant_rate(tmp_path / "a.mkv", 30))) as original, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(original.streams.video[0])
        for packet in original.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    info = probe(path)
    indices = frame_indices_at(info.times_s, [n / 30 for n in range(121)], info.time_error_s)
    assert indices == list(range(121))


def test_range_of_rounded_times_has_the_frames_of_exact_ones(tmp_path: Path) -> None:
    sampling = Sampling("released", start_s=31 / 30, end_s=63 / 30)
    info = probe(constant_rate(tmp_path / "a.mkv", 30))
    assert sampling.times(info, 32) == list(info.times_s[31:63])


def test_rounding_of_uneven_times_is_that_of_the_clock(tmp_path: Path) -> None:
    """Slides of 2 and 3 s have a common divisor of 1 s, which is not a clock."""
    info = probe(make_video(tmp_path / "a.mp4", times_ms=[0, 2000, 5000]))
    assert frame_indices_at(info.times_s, [1.999, 2.0, 4.999], info.time_error_s) == [0, 1, 1]


def test_times_of_a_constant_rate_are_exact(tmp_path: Path) -> None:
    """The clock of an AVI counts frames: half a tick would be half a frame."""
    info = probe(constant_rate(tmp_path / "a.avi", 30))
    assert info.time_error_s == 0


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "read",
    [
        load_video,
        lambda path: content_digest(path),
        file_digest,
        lambda path: open_samples(path),
        lambda path: MultiEncoder(["fake"], grid=(4, 2, 2)).features(path, store=FeatureStore()),
    ],
    ids=["load_video", "content_digest", "file_digest", "open_samples", "store"],
)
@pytest.mark.parametrize("suffix", [".mp4", ".jsonl"])
def test_pipe_is_refused_by_everything_that_opens_a_path(
    tmp_path: Path, read: Callable[[Path], Any], suffix: str
) -> None:
    with pytest.raises((UnreadableVideo, DataError, OSError), match=rf"a\{suffix}"):
        read(fifo(tmp_path / f"a{suffix}"))


def test_pipe_in_folder_of_images_is_a_missing_frame(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "frames", ["0.png", "2.png"])
    fifo(folder / "1.png")
    with open_video(folder) as video:
        assert indices_of(video.read([0, 1, 2], on_error="partial")) == [0, 1]
        assert video.missing == {1}


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_endless_device_is_hashed_up_to_its_size() -> None:
    with open("/dev/zero", "rb") as endless:
        assert content_digest(endless) == content_digest(b"")


# Forks


class Opaque(io.RawIOBase):
    """A file object of which merv knows nothing, with a position that forked processes share."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)

    def close(self) -> None:
        self.file.close()
        super().close()


def read_in_processes(video: VideoReader, indices: list[int]) -> list[list[int] | str]:
    """Read each frame in four forked processes at a time; return what they read, or the name of an error."""
    context = get_context("fork")
    results = context.Queue()

    def work() -> None:
        try:
            results.put([indices_of(video.read([index]))[0] for index in indices])
        except MervError as error:
            results.put(type(error).__name__)

    processes = [context.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return answers


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking a process with threads
@pytest.mark.parametrize("opened", ["path", "open file", "unbuffered", "bytes", "gif", "part"])
def test_open_reader_can_be_used_after_a_fork(tmp_path: Path, opened: str) -> None:
    path = make_video(tmp_path / "a.mp4", 60, options={"g": "10"})
    if opened == "gif":
        path = make_gif(tmp_path / "a.gif", [100] * 60)
    with ExitStack() as stack:
        source = {
            "open file": lambda: stack.enter_context(path.open("rb")),
            "unbuffered": lambda: stack.enter_context(path.open("rb", buffering=0)),
            "bytes": path.read_bytes,
            "part": lambda: FilePart(str(path), 0, path.stat().st_size, "part"),
        }.get(opened, lambda: path)()
        video = stack.enter_context(open_video(source))
        indices = [0, 50, 7, 33, 59, 12] * 3
        assert read_in_processes(video, indices) == [indices] * 4
        assert indices_of(video.read([5])) == [5]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_file_object_of_unknown_kind_is_refused_after_a_fork(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 60, options={"g": "10"})
    with Opaque(path) as file, open_video(file) as video:
        assert read_in_processes(video, [0, 50]) == ["UnreadableVideo"] * 4
        assert indices_of(video.read([50])) == [50]


def test_open_file_of_the_caller_keeps_its_position(tmp_path: Path) -> None:
    with make_video(tmp_path / "a.mp4").open("rb") as file:
        file.seek(7)
        assert indices_of(load_video(file, num_frames=1).pixels[0]) == [10]
        assert file.tell() == 7


def test_what_was_written_to_an_open_file_is_read(tmp_path: Path) -> None:
    with TemporaryFile() as file:
        file.write(make_video(tmp_path / "a.mp4").read_bytes())
        assert indices_of(load_video(file, num_frames=1).pixels[0]) == [10]


# Rows of datasets, decoders of torchcodec


class FakeDecoder:
    """The part of torchcodec's VideoDecoder that merv uses of one that a caller created."""

    def __init__(self, path: str, dimension_order: str = "NCHW") -> None:
        self.channels_last = dimension_order == "NHWC"
        with av.open(path) as container:
            self.frames = list(container.decode(video=0))
            aspect = container.streams.video[0].sample_aspect_ratio
        first = self.frames[0]
        self.metadata = SimpleNamespace(
            width=first.width,
            height=first.height,
            codec="h264",
            pixel_aspect_ratio=aspect,
            rotation=float(first.rotation) or None,
        )

    def __len__(self) -> int:
        return len(self.frames)

    def get_frame_at(self, index: int) -> SimpleNamespace:
        data = torch.from_numpy(self.frames[index].to_ndarray(format="rgb24")).permute(2, 0, 1)
        upright = torch.rot90(data, round((self.metadata.rotation or 0) / 90), (1, 2))
        return SimpleNamespace(data=upright.movedim(0, -1) if self.channels_last else upright)

    def get_frames_in_range(self, start: int, stop: int) -> SimpleNamespace:
        frames = self.frames[start:stop]
        times_s, durations_s = (
            torch.tensor(
                [float(ticks * frame.time_base) for ticks, frame in zip(values, frames, strict=True)]
            )
            for values in ([frame.pts for frame in frames], [frame.duration for frame in frames])
        )
        return SimpleNamespace(pts_seconds=times_s.double(), duration_seconds=durations_s.double())


@pytest.fixture(params=["fake", "torchcodec"])
def decoder_class(request: pytest.FixtureRequest) -> Any:
    """The fake, then torchcodec's own class if it can be loaded."""
    if request.param == "fake":
        return FakeDecoder
    try:
        return load_decoder()
    except MissingDependency as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start_s": 3.0},
        {"rotation": 90},
        {"pixel_aspect": Fraction(4, 3)},
        {"rotation": 90, "pixel_aspect": Fraction(4, 3)},
        {"times_ms": [0, 40, 500, 540, 2000, 2040]},
    ],
    ids=str,
)
def test_decoder_gives_the_frames_of_its_file(
    tmp_path: Path, decoder_class: Any, options: dict[str, Any], order: str
) -> None:
    path = make_video(tmp_path / "a.mp4", 6 if "times_ms" in options else 20, **options)
    with open_video(decoder_class(str(path), dimension_order=order)) as video, open_video(path) as expected:
        shape = [
            (reader.info.width, reader.info.height, reader.info.rotation) for reader in (video, expected)
        ]
        assert shape[0] == shape[1]
        assert video.info.times_s == pytest.approx(expected.info.times_s, abs=1e-5)
        assert video.info.duration_s == pytest.approx(expected.info.duration_s, abs=1e-5)
        assert (video.read([5, 0]).int() - expected.read([5, 0]).int()).abs().max() <= 1


def test_decoder_of_rounded_times_has_frame_n_at_n_over_rate(tmp_path: Path, decoder_class: Any) -> None:
    info = probe(decoder_class(str(make_video(tmp_path / "a.mkv", fps=30))))
    assert frame_indices_at(info.times_s, [n / 30 for n in range(20)], info.time_error_s) == list(range(20))


def test_decoder_has_no_content_to_hash(tmp_path: Path, decoder_class: Any) -> None:
    with pytest.raises(DataError, match=r"path or bytes"):
        content_digest(decoder_class(str(make_video(tmp_path / "a.mp4"))))


@pytest.mark.parametrize("form", ["path", "bytes", "both", "decoder", "decoder of bytes"])
def test_row_of_datasets_is_the_video_in_it(tmp_path: Path, form: str) -> None:
    path = make_video(tmp_path / "a.mp4")
    row: dict[str, Any] = {"bytes": None, "path": str(path)}
    if form in ("bytes", "both", "decoder of bytes"):
        row = {"bytes": path.read_bytes(), "path": None if form == "bytes" else "elsewhere/a.mp4"}
    video: Any = row
    if form.startswith("decoder"):
        video = FakeDecoder(str(path))
        video._hf_encoded = row  # as datasets does
    assert torch.equal(load_video(video).pixels, load_video(path).pixels)
    assert content_digest(video) == content_digest(path)
    vision = MultiEncoder(["fake"], grid=(4, 2, 2))
    assert torch.equal(vision.features(video)["fake"].values, vision.features(path)["fake"].values)
    conversation = {"video": video, "questions": [{"question": "Who?", "answer": "A cat."}]}
    assert sample_of(conversation).videos() == [row["path"] if row["bytes"] is None else row["bytes"]]


def test_row_of_datasets_comes_from_its_video_feature(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    rows = Dataset.from_dict({"video": [str(path), path.read_bytes()]}, Features(video=Video(decode=False)))
    for row in rows:
        assert torch.equal(load_video(row["video"]).pixels, load_video(path).pixels)


def test_row_without_bytes_and_path_is_refused() -> None:
    with pytest.raises(VideoError, match=r"neither bytes nor a path"):
        open_video({"bytes": None, "path": None})
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        sample_of({"video": {"bytes": None, "path": None}, "messages": []}, "a.jsonl:3")


# Colors

COLOR = (199, 60, 120)


def one_color(path: Path, matrix: int, transfer: int = 1, primaries: int = 1) -> Path:
    """Write three frames of COLOR in BT.2020, marked with these numbers of ITU-T H.273."""
    red, green, blue = (value / 255 for value in COLOR)
    luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
    planes = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8814, 128 + 224 * (red - luma) / 1.4746]
    frame = av.VideoFrame(64, 32, "yuv444p")
    for plane, value in zip(frame.planes, planes, strict=True):
        plane.update(bytes([round(value)]) * plane.buffer_size)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, width=64, height=32, pix_fmt="yuv444p")
        stream.options = {"qp": "0"}
        context = stream.codec_context
        context.colorspace, context.color_trc, context.color_primaries = matrix, transfer, primaries
        context.color_range = 1
        for index in range(3):
            frame.pts = index
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize(("matrix", "name"), [(8, "ycgco"), (10, "bt2020c"), (14, "ictcp")])
@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
def test_matrix_that_is_not_converted_is_refused_by_name(
    tmp_path: Path, matrix: int, name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merv.video.torchcodec.load_decoder", lambda: None)
    path = one_color(tmp_path / "a.mkv", matrix)
    with pytest.raises(UnreadableVideo, match=rf"a\.mkv: .*\b{name}\b"):
        open_video(path, backend=backend)
    decoder = FakeDecoder(str(path))
    decoder.metadata.color_space = name
    with pytest.raises(UnreadableVideo, match=name):
        open_video(decoder)


@pytest.mark.parametrize("transfer", [1, 16, 18], ids=["SDR", "PQ", "HLG"])
def test_hdr_gives_the_coded_values(tmp_path: Path, transfer: int) -> None:
    pixels = load_video(one_color(tmp_path / "a.mkv", 9, transfer, 9)).pixels
    assert (pixels[0, 0, :, 16, 32].int() - torch.tensor(COLOR)).abs().max() <= 1

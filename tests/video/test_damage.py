"""Damage: what FFmpeg reports about a file is never returned as sound, and sound files are not damaged."""

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from media import indices_of, make_video, overwrite

from merv.errors import DamagedVideo, UnreadableVideo
from merv.video.open import open_video
from merv.video.pyav import Damage, PyAVReader
from merv.video.reports import errors_of, reports

CODECS = {"a.mkv": "libx264", "a.webm": "libvpx", "a.ogv": "libvpx"}
MANY_KEYFRAMES = {"g": "10"}


def noisy_video(path: Path, codec: str, frames: int = 60, options: dict[str, str] | None = None) -> Path:
    """A video of noise, whose packets are large, with a keyframe every ten frames."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options=MANY_KEYFRAMES | (options or {}))
        stream.width, stream.height, stream.bit_rate = 128, 64, 1_000_000
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for _ in range(frames):
            rgb = noise.integers(0, 256, (64, 128, 3), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        file.mux(stream.encode())
    return path


def packet_bytes(path: Path, number: int) -> slice:
    """Where packet `number` of an MP4 file is."""
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][number]
        return slice(packet.pos, packet.pos + packet.size)


# What FFmpeg reports


@pytest.mark.parametrize("name", CODECS)
def test_lost_bytes_are_damage(tmp_path: Path, name: str) -> None:
    path = noisy_video(tmp_path / name, CODECS[name])
    data = path.read_bytes()
    with open_video(data) as video:
        assert (video.damage, video.info.num_frames) == ("", 60)
    with open_video(data[: len(data) // 2] + data[len(data) // 2 + 3000 :]) as video:
        assert video.damage
        with pytest.raises((DamagedVideo, UnreadableVideo), match="bytes>: "):
            video.read([0])


def test_frames_around_bytes_lost_from_matroska_keep_their_times(tmp_path: Path) -> None:
    path = noisy_video(tmp_path / "a.mkv", "libx264", 200)
    data = path.read_bytes()
    with open_video(path) as video:
        whole = video.read(range(200))
    with open_video(data[: len(data) // 2] + data[len(data) // 2 + 3000 :]) as video:
        frames = video.read(range(video.info.num_frames), on_error="partial")
        times_s = [video.info.times_s[i] for i in range(video.info.num_frames) if i not in video.missing]
    assert 100 < len(frames) < 199
    assert torch.equal(frames, whole[[round(25 * time_s) for time_s in times_s]])


def test_errors_that_ffmpeg_conceals_are_damage(tmp_path: Path) -> None:
    path = noisy_video(tmp_path / "a.mp4", "libx264", options={"x264-params": "slices=4:threads=1"})
    data, where = bytearray(path.read_bytes()), packet_bytes(path, 15)
    data[where.start + 200 : where.start + 300] = bytes(range(100))
    with open_video(bytes(data)) as video:
        frames = video.read(range(60), on_error="partial")
        assert 30 < len(frames) < 60
        assert {15, 16} <= video.missing <= set(range(10, 20))


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"
)
def test_number_of_cpus_makes_no_difference(tmp_path: Path) -> None:
    path = noisy_video(tmp_path / "a.mp4", "libx264", options={"x264-params": "slices=4:threads=1"})
    overwrite(path, 0.4, 0.45)
    cpus, missing = os.sched_getaffinity(0), []
    try:
        for chosen in (cpus, {min(cpus)}):
            os.sched_setaffinity(0, chosen)
            with open_video(path) as video:
                video.read(range(60), on_error="partial")
                missing.append(video.missing)
    finally:
        os.sched_setaffinity(0, cpus)
    assert missing[0] == missing[1] != set()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_lost_start_is_damage(tmp_path: Path, name: str) -> None:
    path = noisy_video(tmp_path / name, "libx264")
    data, where = bytearray(path.read_bytes()), packet_bytes(path, 0)
    data[where.start + 20 : where.stop] = bytes([255]) * (where.stop - where.start - 20)
    with open_video(bytes(data)) as video, pytest.raises(DamagedVideo, match="bytes>: "):
        video.read([video.info.num_frames - 1])


def test_avi_that_lost_packets_is_damaged(tmp_path: Path) -> None:
    data = bytearray(noisy_video(tmp_path / "a.avi", "mjpeg").read_bytes())
    begin = data.index(b"00dc", len(data) // 2)
    end = data.index(b"00dc", begin + 8000)
    del data[begin:end]  # whole packets
    with open_video(bytes(data)) as video:
        assert video.info.num_frames < 60
        with pytest.raises(DamagedVideo, match=r"\b60\b"):
            video.read([0])


@pytest.mark.parametrize(("in_file", "affected"), [(True, False), (False, True)])
def test_damage_ends_at_frames_that_decoder_and_file_call_keyframes(in_file: bool, affected: bool) -> None:
    damage = Damage(permanent=False)
    damage.mark(3)
    if in_file:
        damage.keyframes.add(5)
    assert damage.affects(SimpleNamespace(is_corrupt=False, key_frame=True, pts=5), 5) is affected


# Sound files


def test_still_scene_is_not_damage(tmp_path: Path) -> None:
    times_ms = [0, 40, 80, 90_000, 90_040, 90_080]
    for name in ("a.mkv", "a.mp4"):
        with open_video(make_video(tmp_path / name, 6, times_ms=times_ms)) as video:
            assert indices_of(video.read(range(6))) == list(range(6))
            assert video.damage == ""


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_live_matroska_is_not_damage(tmp_path: Path, name: str) -> None:
    path = make_video(
        tmp_path / name, 60, codec=CODECS[name], options=MANY_KEYFRAMES, container={"live": "1"}
    )
    with open_video(path) as video:
        assert indices_of(video.read(range(60))) == list(range(60))
        assert video.damage == ""


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_open_gop_is_sought_without_damage(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_gop = "keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0:open-gop=1:threads=1"
    path = make_video(tmp_path / name, 120, options={"preset": "medium", "x264-params": open_gop})
    passes, frames_of_pass = [], PyAVReader._frames

    def counted(self: PyAVReader, targets: list[int], fast: bool) -> Any:
        passes.append(fast)
        return frames_of_pass(self, targets, fast)

    monkeypatch.setattr(PyAVReader, "_frames", counted)
    with open_video(path) as video:
        assert [indices_of(video.read([i]))[0] for i in range(80, 120)] == list(range(80, 120))
    assert all(passes)


def test_empty_packet_repeats_the_frame_before(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mkv", 10, codec="libvpx")
    with av.open(str(whole)) as source, av.open(str(tmp_path / "b.nut"), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                copy = av.Packet(b"" if number == 9 else bytes(packet))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                file.mux(copy)
    with open_video(tmp_path / "b.nut") as video:
        assert indices_of(video.read(range(9))) == list(range(9))


# The log


def log_error(name: str = "h264", message: str = "error while decoding MB") -> None:
    av.logging.log(av.logging.ERROR, name, message)


def in_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_reports_are_those_of_this_thread(caplog: pytest.LogCaptureFixture) -> None:
    with reports() as log:
        log_error()
        in_thread(log_error)
        log_error()
    assert errors_of(log) == ["error while decoding MB"] * 2
    assert not caplog.records


def test_settings_of_the_log_are_restored_by_the_last_reader() -> None:
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    with reports() as log:

        def read() -> None:
            with reports() as log:
                log_error()
            assert len(log) == 1

        in_thread(read)
        log_error()
    assert len(log) == 1
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == before


def test_a_reader_that_collects_more_does_not_change_the_level_of_others() -> None:
    with reports() as log:
        with reports(av.logging.INFO) as more:
            av.logging.log(av.logging.INFO, "h264", "sps")
        av.logging.log(av.logging.INFO, "h264", "sps")
        assert av.logging.get_level() == av.logging.ERROR
    assert len(more) == 1
    assert not log


def test_level_that_a_user_set_stays_and_other_threads_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    av.logging.set_level(av.logging.INFO)
    try:
        with reports() as log:
            log_error(message="mine")
            in_thread(lambda: log_error(message="theirs"))
            assert av.logging.get_level() == av.logging.INFO
    finally:
        av.logging.set_level(None)
    assert errors_of(log) == ["mine"]
    assert [record.message for record in caplog.records] == ["theirs"]


def test_damaged_file_in_another_thread_does_not_damage_this_one(tmp_path: Path) -> None:
    sound = make_video(tmp_path / "a.mkv", 60, options=MANY_KEYFRAMES)
    torn = overwrite(noisy_video(tmp_path / "b.mkv", "libx264"), 0.4, 0.5)
    done = threading.Event()

    def read_torn() -> None:
        while not done.is_set():
            with open_video(torn) as video:
                video.read(range(video.info.num_frames), on_error="partial")

    thread = threading.Thread(target=read_torn)
    thread.start()
    try:
        for _ in range(20):
            with open_video(sound) as video:
                assert indices_of(video.read(range(60))) == list(range(60))
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_frames_leave_no_threads(tmp_path: Path) -> None:
    path = noisy_video(tmp_path / "a.mov", "mjpeg", 10)
    threads = []
    for _ in range(2):
        with open_video(path) as video:
            video.read(range(10))
        threads.append(len(list(Path("/proc/self/task").iterdir())))
    assert threads[0] == threads[1]


def test_frames_are_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    path = noisy_video(tmp_path / "a.mov", "mjpeg", 10)
    gc.collect()
    gc.disable()
    try:
        with open_video(path) as video:
            video.read(range(10))
            alive = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert alive <= 1  # the reader keeps the first frame

"""FeatureStore: what is stored, under which key, and what happens to damaged entries."""

import errno
import io
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from merv.errors import DataError, UnreadableVideo
from merv.features.store import FeatureStore, video_key
from merv.models.multi_encoder import MultiEncoder
from merv.training.module import encode_all
from merv.types import WHOLE_PICTURE, Grid


def some_grid() -> Grid:
    return Grid(
        torch.randn(1, 2, 3, 3, 4).bfloat16(),
        torch.tensor([[0.25, 0.75]], dtype=torch.float64),
        torch.tensor([WHOLE_PICTURE]),
        torch.rand(1, 2, 3, 3) > 0.5,
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_get_returns_what_was_put(tmp_path, on_disk):
    store, grid = FeatureStore(tmp_path if on_disk else None), some_grid()
    assert store.get("k" * 64) is None
    store.put("k" * 64, grid)
    stored = store.get("k" * 64)
    for name, tensor in vars(grid).items():
        assert torch.equal(tensor, getattr(stored, name))
        assert tensor.dtype == getattr(stored, name).dtype


def test_folder_can_be_opened_again(tmp_path):
    FeatureStore(tmp_path).put("k" * 64, some_grid())
    assert FeatureStore(tmp_path).get("k" * 64) is not None


def test_key_depends_on_content_not_on_name(tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (video_key(tmp_path / name, "cache key") for name in "abc")
    assert a == b != c
    assert a == video_key(b"one", "cache key") == video_key(io.BytesIO(b"one"), "cache key")
    assert a != video_key(b"one", "other cache key")


def test_modified_file_has_another_key(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    before = video_key(path, "cache key")
    path.write_bytes(b"longer")
    assert video_key(path, "cache key") != before


def test_folders_and_arrays_have_keys(tmp_path):
    (tmp_path / "1.png").write_bytes(b"picture")
    folder = video_key(tmp_path, "cache key")
    (tmp_path / "2.png").write_bytes(b"picture")
    assert video_key(tmp_path, "cache key") != folder
    frames = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert (
        video_key(frames, "cache key")
        == video_key(torch.from_numpy(frames), "cache key")
        != video_key(frames[:1], "cache key")
    )


def test_view_and_copy_of_an_array_have_the_same_key():
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    view = frames[::-1, ..., ::-1]
    assert (
        video_key(view, "cache key") == video_key(view.copy(), "cache key") != video_key(frames, "cache key")
    )
    frames.flags.writeable = False
    assert video_key(frames, "cache key") == video_key(frames.copy(), "cache key")


def test_stream_is_rejected_without_reading_it():
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    pipe = Pipe(b"one")
    with pytest.raises(DataError, match="Pipe"):
        video_key(pipe, "cache key")
    assert pipe.read() == b"one"


@pytest.mark.parametrize("source", [{}, io.StringIO("one")])
def test_object_without_content_is_rejected(source):
    with pytest.raises(DataError, match=type(source).__name__):
        video_key(source, "cache key")


def test_unchanged_file_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = video_key(path, "cache key")
    monkeypatch.setattr("builtins.open", None)  # reading again would fail
    assert video_key(path, "cache key") == first
    assert video_key(path, "other") != first


@pytest.mark.parametrize("name", ["none.mp4", "none\0.mp4", "none\ud800.mp4", "none" * 99])
def test_file_that_cannot_be_read_is_named_in_error(tmp_path, name):
    with pytest.raises(UnreadableVideo, match="none"):
        video_key(tmp_path / name, "cache key")


def test_images_with_different_palettes_have_different_keys():
    red, blue = (Image.new("P", (4, 4)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert video_key(red, "cache key") != video_key(blue, "cache key")


def test_concurrent_writers_of_one_entry_do_not_conflict(tmp_path, monkeypatch):
    barrier, write_bytes = threading.Barrier(2), Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda *args: (write_bytes(*args), barrier.wait(10)))
    errors = []

    def write():
        try:
            FeatureStore(tmp_path).put("k" * 64, some_grid())
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors
    assert [path.suffix for path in tmp_path.rglob("*kkk*")] == [".safetensors"]


def full_disk(path, data):
    """Replaces Path.write_bytes: the disk is full after some bytes."""
    with open(path, "wb") as file:
        file.write(data[:9])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_only_disk(path, *args, **kwargs):
    """Replaces Path.mkdir: nothing can be created."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@pytest.mark.parametrize(
    ("name", "replacement", "reason"),
    [("write_bytes", full_disk, "No space left"), ("mkdir", read_only_disk, "Read-only file system")],
)
def test_folder_that_cannot_be_written_is_read_and_warned_about_once(
    tmp_path, monkeypatch, caplog, name, replacement, reason
):
    grids = {key * 64: some_grid() for key in "kab"}
    FeatureStore(tmp_path).put("k" * 64, grids["k" * 64])
    store = FeatureStore(tmp_path)
    monkeypatch.setattr(Path, name, replacement)
    for key, grid in grids.items():
        stored = store.get(key)
        assert (stored is None) == (key != "k" * 64)
        if stored is None:
            assert torch.equal(store.put(key, grid).values, grid.values)  # nothing computed is lost
    assert store.read_only
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert str(tmp_path) in caplog.text
    assert reason in caplog.text
    assert [path.name for path in tmp_path.rglob("*.*")] == [f"{'k' * 64}.safetensors"]


@pytest.mark.parametrize("path", ["file", "file/store", "\0", "\ud800", "x" * 300])
def test_unusable_folder_is_an_error_at_once(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / path))} .*feature_store"):
        FeatureStore(tmp_path / path)


def test_folder_that_cannot_be_created_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", read_only_disk)
    with pytest.raises(DataError, match="Read-only"):
        FeatureStore(tmp_path / "store")


def test_training_goes_on_with_a_full_disk(tmp_path, monkeypatch, caplog):
    vision, clips = MultiEncoder(["fake"], grid=(4, 2, 2)), torch.randint(256, (3, 8, 3, 32, 32)).byte()
    expected = vision.features(list(clips))["fake"].values
    store, write = FeatureStore(tmp_path), Path.write_bytes
    vision.features([clips[0]], store=store)
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    for _ in range(2):
        assert torch.equal(vision.features(list(clips), store=store)["fake"].values, expected)
    monkeypatch.setattr(Path, "write_bytes", write)
    again = FeatureStore(tmp_path)  # as in a new run, with space
    vision.features(list(clips), store=again)
    assert not again.read_only
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_entry_has_default_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        FeatureStore(tmp_path).put("k" * 64, some_grid())
    finally:
        os.umask(before)
    (entry,) = tmp_path.rglob("*.safetensors")
    assert entry.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: b"no safetensors", lambda whole: whole[:-20]]
)
def test_damaged_entry_is_missing_logged_and_replaced(tmp_path, caplog, damage):
    store, grid = FeatureStore(tmp_path), some_grid()
    store.put("k" * 64, grid)
    (entry,) = tmp_path.rglob("*.safetensors")
    entry.write_bytes(damage(entry.read_bytes()))
    assert store.get("k" * 64) is None
    assert str(entry) in caplog.text
    store.put("k" * 64, grid)
    assert torch.equal(store.get("k" * 64).values, grid.values)


def test_any_bit_of_the_header_of_an_entry_may_be_flipped(tmp_path, caplog):
    store, grid = FeatureStore(tmp_path), some_grid()
    store.put("k" * 64, grid)
    (entry,) = tmp_path.rglob("*.safetensors")
    whole = entry.read_bytes()
    header_bits = 8 * (8 + int.from_bytes(whole[:8], "little"))
    for bit in range(0, header_bits, 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        entry.write_bytes(damaged)
        caplog.clear()
        assert store.get("k" * 64) is not None or entry.name in caplog.text


def test_entry_that_is_a_folder_or_cannot_be_read_is_missing(tmp_path, caplog, monkeypatch):
    store = FeatureStore(tmp_path)
    entry = tmp_path / "kk" / f"{'k' * 64}.safetensors"
    entry.mkdir(parents=True)
    assert store.get("k" * 64) is None
    entry.rmdir()
    store.put("k" * 64, some_grid())
    monkeypatch.setattr(Path, "read_bytes", lambda path: os.close(-1))  # OSError
    assert store.get("k" * 64) is None
    assert [str(entry) in record.getMessage() for record in caplog.records] == [True, True]


def test_features_stored_in_inference_mode_can_be_used_in_training():
    store = FeatureStore()
    with torch.inference_mode():
        store.put("k", some_grid())
    linear = torch.nn.Linear(4, 2)
    linear(store.get("k").values.float()).sum().backward()
    assert linear.weight.grad is not None


def test_encoding_ahead_ends_when_nothing_can_be_stored(tmp_path, monkeypatch):
    model = SimpleNamespace(
        vision=MultiEncoder(["fake"], grid=(4, 2, 2)), feature_store=FeatureStore(tmp_path)
    )
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    clips = list(torch.randint(256, (3, 8, 3, 32, 32)).byte())
    encoded = []
    encode_all(model, [(str(n), clip) for n, clip in enumerate(clips)], should_stop=lambda: encoded.append(1))
    assert len(encoded) == 2  # the second time, the store is read-only

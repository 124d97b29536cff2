"""FeatureStore: what is stored, under which key, and what happens to damaged entries."""

import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from merv.errors import DataError, UnreadableVideo
from merv.features.store import FeatureStore, video_key
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


def test_missing_file_is_named_in_error(tmp_path):
    with pytest.raises(UnreadableVideo, match=r"none\.mp4"):
        video_key(tmp_path / "none.mp4", "cache key")


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


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        FeatureStore(tmp_path).put("k" * 64, some_grid())
    assert not list(tmp_path.rglob("*kkk*"))


def test_entry_has_default_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        FeatureStore(tmp_path).put("k" * 64, some_grid())
    finally:
        os.umask(before)
    (entry,) = tmp_path.rglob("*.safetensors")
    assert entry.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_damaged_entry_is_missing_and_logged(tmp_path, caplog, damage):
    store = FeatureStore(tmp_path)
    store.put("k" * 64, some_grid())
    (entry,) = tmp_path.rglob("*.safetensors")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-20] if damage is None else damage)
    assert store.get("k" * 64) is None
    assert entry.name in caplog.text


def test_features_stored_in_inference_mode_can_be_used_in_training():
    store = FeatureStore()
    with torch.inference_mode():
        store.put("k", some_grid())
    linear = torch.nn.Linear(4, 2)
    linear(store.get("k").values.float()).sum().backward()
    assert linear.weight.grad is not None

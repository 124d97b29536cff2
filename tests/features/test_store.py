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
def test_what_comes_out_is_what_went_in(tmp_path, on_disk):
    store, grid = FeatureStore(tmp_path if on_disk else None), some_grid()
    assert store.get("k" * 64) is None
    store.put("k" * 64, grid)
    again = store.get("k" * 64)
    for name, tensor in vars(grid).items():
        assert torch.equal(tensor, getattr(again, name))
        assert tensor.dtype == getattr(again, name).dtype


def test_a_folder_outlives_the_store(tmp_path):
    FeatureStore(tmp_path).put("k" * 64, some_grid())
    assert FeatureStore(tmp_path).get("k" * 64) is not None


def test_the_key_follows_the_content_not_the_name(tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (video_key(tmp_path / name, "recipe") for name in "abc")
    assert a == b != c
    assert a == video_key(b"one", "recipe") == video_key(io.BytesIO(b"one"), "recipe")
    assert a != video_key(b"one", "other recipe")


def test_a_changed_file_has_another_key(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    before = video_key(path, "recipe")
    path.write_bytes(b"longer")
    assert video_key(path, "recipe") != before


def test_folders_and_arrays_have_keys(tmp_path):
    (tmp_path / "1.png").write_bytes(b"picture")
    folder = video_key(tmp_path, "recipe")
    (tmp_path / "2.png").write_bytes(b"picture")
    assert video_key(tmp_path, "recipe") != folder
    frames = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert video_key(frames, "r") == video_key(torch.from_numpy(frames), "r") != video_key(frames[:1], "r")


def test_views_of_an_array_have_the_key_of_what_they_show():
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    turned = frames[::-1, ..., ::-1]
    assert video_key(turned, "r") == video_key(turned.copy(), "r") != video_key(frames, "r")
    frames.flags.writeable = False
    assert video_key(frames, "r") == video_key(frames.copy(), "r")


def test_what_cannot_be_wound_back_is_refused_unread():
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    pipe = Pipe(b"one")
    with pytest.raises(DataError, match=r"a Pipe cannot be stored.*read twice. Give a path, or the bytes"):
        video_key(pipe, "recipe")
    assert pipe.read() == b"one"


def test_what_has_no_content_cannot_be_stored():
    with pytest.raises(DataError, match="a dict cannot be stored"):
        video_key({}, "recipe")


def test_a_file_is_read_once_while_it_does_not_change(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = video_key(path, "recipe")
    monkeypatch.setattr("builtins.open", None)  # reading again would fail
    assert video_key(path, "recipe") == first
    assert video_key(path, "other") != first


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UnreadableVideo, match=r"none\.mp4: No such file"):
        video_key(tmp_path / "none.mp4", "recipe")


def test_pictures_of_other_colours_have_other_keys():
    red, blue = (Image.new("P", (4, 4)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert video_key(red, "recipe") != video_key(blue, "recipe")


def test_writers_of_one_entry_do_not_meet(tmp_path, monkeypatch):
    both, write_bytes = threading.Barrier(2), Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda *args: (write_bytes(*args), both.wait(10)))
    faults = []

    def write():
        try:
            FeatureStore(tmp_path).put("k" * 64, some_grid())
        except OSError as error:
            faults.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not faults
    assert [path.suffix for path in tmp_path.rglob("*kkk*")] == [".safetensors"]


def test_an_entry_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        FeatureStore(tmp_path).put("k" * 64, some_grid())
    assert not list(tmp_path.rglob("*kkk*"))


def test_an_entry_has_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        FeatureStore(tmp_path).put("k" * 64, some_grid())
    finally:
        os.umask(before)
    (entry,) = tmp_path.rglob("*.safetensors")
    assert entry.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_a_damaged_entry_counts_as_missing_and_is_logged(tmp_path, caplog, damage):
    store = FeatureStore(tmp_path)
    store.put("k" * 64, some_grid())
    (entry,) = tmp_path.rglob("*.safetensors")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-20] if damage is None else damage)
    assert store.get("k" * 64) is None
    assert "is damaged and will be made again" in caplog.text


def test_what_inference_mode_put_there_can_be_trained_on():
    store = FeatureStore()
    with torch.inference_mode():
        store.put("k", some_grid())
    linear = torch.nn.Linear(4, 2)
    linear(store.get("k").values.float()).sum().backward()
    assert linear.weight.grad is not None

import io

import numpy as np
import pytest
import torch

from merv.errors import DataError
from merv.store import FeatureStore, video_key
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


def test_what_has_no_content_cannot_be_stored():
    with pytest.raises(DataError, match="a dict cannot be stored"):
        video_key({}, "recipe")

"""What the key of features depends on: the content of the video, the weights and the code of the encoder."""

import importlib
import io
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from merv.errors import DataError, UnreadableVideo
from merv.features.keys import code_digest, content_digest
from merv.models.multi_encoder import MultiEncoder


def test_digest_depends_on_content_not_on_name(tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (content_digest(tmp_path / name) for name in "abc")
    assert a == b != c
    assert a == content_digest(b"one") == content_digest(io.BytesIO(b"one"))


def test_modified_file_has_another_digest(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    before = content_digest(path)
    path.write_bytes(b"longer")
    assert content_digest(path) != before


def test_folders_and_arrays_have_digests(tmp_path):
    (tmp_path / "1.png").write_bytes(b"picture")
    folder = content_digest(tmp_path)
    (tmp_path / "2.png").write_bytes(b"picture")
    assert content_digest(tmp_path) != folder
    frames = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert content_digest(frames) == content_digest(torch.from_numpy(frames)) != content_digest(frames[:1])


def test_view_and_copy_of_an_array_have_the_same_digest():
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    view = frames[::-1, ..., ::-1]
    assert content_digest(view) == content_digest(view.copy()) != content_digest(frames)
    frames.flags.writeable = False
    assert content_digest(frames) == content_digest(frames.copy())


def test_stream_is_rejected_without_reading_it():
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    pipe = Pipe(b"one")
    with pytest.raises(DataError, match="Pipe"):
        content_digest(pipe)
    assert pipe.read() == b"one"


@pytest.mark.parametrize("source", [{}, io.StringIO("one")])
def test_object_without_content_is_rejected(source):
    with pytest.raises(DataError, match=type(source).__name__):
        content_digest(source)


def test_unchanged_file_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = content_digest(path)
    monkeypatch.setattr("builtins.open", None)  # reading again would fail
    assert content_digest(path) == first


@pytest.mark.parametrize("name", ["none.mp4", "none\0.mp4", "none\ud800.mp4", "none" * 99])
def test_file_that_cannot_be_read_is_named_in_error(tmp_path, name):
    with pytest.raises(UnreadableVideo, match="none"):
        content_digest(tmp_path / name)


def test_images_with_different_palettes_have_different_digests():
    red, blue = (Image.new("P", (4, 4)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert content_digest(red) != content_digest(blue)


# Code and weights -----------------------------------------------------------------------------

PLUGIN = """
    '''An encoder.'''
    from merv.encoders.fake import Fake
    from {package}.helper import SCALE

    class Mine(Fake):
        '''Its docstring.'''

        def encode(self, pixels):
            return super().encode(pixels) * SCALE  # a comment
"""


def edited_in_place(tmp_path, monkeypatch, change):
    """Digests of one class before and after its file is edited and imported again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "edited_encoder.py"
    text = textwrap.dedent(PLUGIN.replace("from {package}.helper import SCALE", "SCALE = 2.0"))
    digests = []
    for number, content in enumerate((text, change(text))):
        path.write_text(content)
        os.utime(path, (number, number))
        sys.modules.pop("edited_encoder", None)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        digests.append(code_digest(importlib.import_module("edited_encoder").Mine))
    sys.modules.pop("edited_encoder", None)
    return digests


def test_edited_code_has_another_key(tmp_path, monkeypatch):
    before, after = edited_in_place(tmp_path, monkeypatch, lambda text: text.replace("2.0", "3.0"))
    assert before != after


def test_comments_and_docstrings_do_not_change_the_key(tmp_path, monkeypatch):
    change = lambda text: text.replace("a comment", "another").replace("Its docstring", "Other words")  # noqa: E731
    before, after = edited_in_place(tmp_path, monkeypatch, change)
    assert before == after


def test_a_helper_of_the_same_package_belongs_to_the_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "encoder.py").write_text(textwrap.dedent(PLUGIN.format(package="package_of_mine")))
    digests = []
    for scale in (2.0, 3.0):
        (package / "helper.py").write_text(f"SCALE = {scale}\n")
        os.utime(package / "helper.py", (scale, scale))
        importlib.invalidate_caches()
        digests.append(code_digest(importlib.import_module("package_of_mine.encoder").Mine))
        for name in [name for name in sys.modules if name.startswith("package_of_mine")]:
            del sys.modules[name]
    assert digests[0] != digests[1]


def test_merv_itself_is_not_part_of_the_code():
    from merv.encoders.languagebind import LanguageBind
    from merv.features.keys import _collect

    modules = {}
    assert _collect(LanguageBind.__module__, modules)
    assert set(modules) == {"merv.encoders.languagebind", "merv.encoders._languagebind_tower"}


INTERACTIVE = """
from merv.features.keys import code_digest
scope = {"__name__": "no_such_module"}
exec("from merv.encoders.fake import Fake\\nclass Mine(Fake): pass", scope)
digests = [code_digest(scope["Mine"]) for _ in range(2)]
"""


def test_class_without_a_file_has_a_key_that_no_other_process_has():
    scope = {}
    exec(INTERACTIVE, scope)
    first, second = scope["digests"]
    other = subprocess.run(
        [sys.executable, "-c", f"{INTERACTIVE}print(digests[0])"], check=True, capture_output=True, text=True
    )
    assert first == second != other.stdout.strip()


def test_the_same_weights_in_another_folder_have_the_same_features(tmp_path):
    from safetensors.torch import save_file

    from merv.encoders.efficientnet_lite import EfficientNetLite

    keys = []
    torch.manual_seed(0)
    state = EfficientNetLite(weights=None).net.state_dict()
    weights = {name: tensor.contiguous() for name, tensor in state.items()}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        encoder = EfficientNetLite(weights=str(tmp_path / name))
        model = MultiEncoder({"x": encoder}, grid=(4, 2, 2))
        keys.append(model.key(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "x"))
    assert keys[0] == keys[1]
    assert keys[0].id == keys[1].id


def test_features_of_an_encoder_with_arguments_of_its_own_are_found_by_the_same_object_only():
    from merv.encoders.fake import Fake

    class Scaled(Fake):
        def __init__(self, *arguments, power=1.0, **options):
            super().__init__(*arguments, **options)
            self.power = power

        def encode(self, pixels):
            return super().encode(pixels) ** self.power

    video = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    keys = set()
    for power in range(8):  # the memory of one is used again by the next
        model = MultiEncoder({"x": Scaled(power=power)}, grid=(4, 2, 2))
        assert model.key(video, "x") == model.key(video, "x")
        keys.add(model.key(video, "x").id)
        del model
    assert len(keys) == 8

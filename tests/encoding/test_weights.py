"""Weights are found, read and loaded key by key; errors name the file or key."""

import hashlib
import pickle

import pytest
import torch
from hub import write_hub, write_shards
from torch import nn

from merv import create_encoder
from merv.encoding.weights import (
    BUILT_IN,
    Source,
    identity_of,
    joined,
    load_exactly,
    locate,
    package_file,
    renamed,
    select,
)
from merv.errors import WeightsError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def same(state):
    return state.keys() == STATE.keys() and all(torch.equal(state[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_folder_with_hub_file_names_is_found(tmp_path, file):
    source = locate(write_hub(tmp_path, STATE, file=file))
    assert same(source.state())
    assert source.revision is None


def test_safetensors_are_preferred_to_pickles(tmp_path):
    write_hub(tmp_path, {}, file="pytorch_model.bin")
    assert same(locate(write_hub(tmp_path, STATE)).state())


def test_other_file_names_can_be_given(tmp_path):
    write_hub(tmp_path, {})
    write_hub(tmp_path, STATE, file="open_clip_model.safetensors")
    assert same(locate(str(tmp_path), ("open_clip_model.safetensors",)).state())


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_read_together(tmp_path, stem):
    folder = write_shards(tmp_path, STATE, stem)
    assert same(locate(folder).state())
    assert same(locate(f"{folder}/{stem}.index.json").state())


def test_missing_shard_is_named(tmp_path):
    folder = write_shards(tmp_path, STATE)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors"):
        locate(folder)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("{cut", r"index\.json"),
        ("[]", "list"),
        ("{}", "none"),
        ('{"weight_map": {"bias": "../other.safetensors"}}', r"\.\./other\.safetensors"),
        ('{"weight_map": {"bias": "/etc/passwd"}}', "/etc/passwd"),
    ],
)
def test_malformed_index_is_refused(tmp_path, index, text):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=text):
        locate(str(tmp_path))


@pytest.mark.parametrize("file", ["any.safetensors", "any.pth", "any.bin"])
def test_single_file_is_read(tmp_path, file):
    write_hub(tmp_path, STATE, file=file)
    assert same(locate(str(tmp_path / file)).state())


@pytest.mark.parametrize("file", ["custom.bin", "custom.pt", "custom"])
def test_safetensors_are_recognized_by_their_content(tmp_path, file):
    write_hub(tmp_path, STATE)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    assert same(locate(tmp_path / file).state())


def test_path_object_is_accepted(tmp_path):
    write_hub(tmp_path, STATE)
    assert locate(tmp_path) == locate(str(tmp_path))
    assert same(locate(tmp_path / "model.safetensors").state())


def test_relative_path_is_found_from_another_directory(tmp_path, monkeypatch):
    write_hub(tmp_path / "custom", STATE)
    monkeypatch.chdir(tmp_path)
    names = [locate(typed).name for typed in ("custom", "./custom", "custom/model.safetensors")]
    monkeypatch.chdir("/")
    assert all(same(locate(name).state()) for name in names)


def test_identity_is_the_hash_of_the_bytes(tmp_path):
    one = locate(write_hub(tmp_path / "a", STATE)).identity()
    two = locate(write_hub(tmp_path / "b", STATE)).identity()
    other = locate(write_hub(tmp_path / "c", {**STATE, "bias": torch.zeros(2)})).identity()
    assert one.sha256 == two.sha256 != other.sha256


@pytest.mark.parametrize("weights", ["/no/such/folder", "./nothing", "nothing", "a/b/c"])
def test_missing_path_is_not_taken_for_a_hub_id(weights):
    with pytest.raises(WeightsError, match=weights):
        locate(weights)


def test_folder_without_weights_lists_the_file_names(tmp_path):
    with pytest.raises(WeightsError, match=r"model\.safetensors, "):
        locate(str(tmp_path))


def test_hash_equals_sha256sum(tmp_path):
    source = locate(write_hub(tmp_path, STATE))
    assert source.identity().sha256 == hashlib.sha256(source.files[0].read_bytes()).hexdigest()


def test_config_is_part_of_the_identity_if_it_was_read(tmp_path):
    def hashed(activation, read=True):
        source = locate(write_hub(tmp_path, STATE, config={"hidden_act": activation}))
        if read:
            assert source.config() == {"hidden_act": activation}
        return source.identity().sha256

    assert hashed("gelu") == hashed("gelu") != hashed("relu")
    assert hashed("gelu", read=False) == hashed("relu", read=False) != hashed("gelu")


def test_damaged_config_is_named(tmp_path):
    folder = write_hub(tmp_path, STATE)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json"):
        locate(folder).config()


def test_missing_config_raises(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json"):
        locate(write_hub(tmp_path, STATE)).config()


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_pickled_objects_are_not_loaded(tmp_path, capsys):
    file = tmp_path / "weights.pt"
    file.write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"weight": Evil()}, tmp_path / "zipped.pt")
    for path in (file, tmp_path / "zipped.pt"):
        with pytest.raises(WeightsError, match=path.name):
            Source("x", (path,)).state()
    assert capsys.readouterr().out == ""


def test_pickled_objects_are_refused_without_unsafe_advice(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match=r"whole\.pt.*UnpicklingError") as error:
        locate(tmp_path / "whole.pt").state()
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("file", ["cut.safetensors", "cut.bin"])
def test_damaged_file_is_named(tmp_path, file):
    write_hub(tmp_path, STATE, file=file)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:40])
    with pytest.raises(WeightsError, match=file):
        locate(str(tmp_path / file)).state()


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_weights_in_a_training_checkpoint_are_found(tmp_path, wrapper):
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    torch.save({wrapper: STATE, "optimizer": optimizer, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert same(locate(str(tmp_path / "checkpoint.pth")).state())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"network": STATE, "step": 3}, "network, step"),
        ({"model": STATE, "model_ema": STATE}, "model, model_ema"),
        ({"model": {"net": STATE}}, "model"),
        ({}, "empty"),
        ([torch.ones(1)], "list"),
    ],
)
def test_file_without_exactly_one_state_dict_names_its_keys(tmp_path, content, text):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(WeightsError, match=rf"checkpoint\.pt.*got.*{text}"):
        locate(str(tmp_path / "checkpoint.pt")).state()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_other_floating_point_dtype_is_converted(tmp_path, dtype, file):
    module, state = nn.Linear(3, 2), {key: torch.rand_like(value).to(dtype) for key, value in STATE.items()}
    load_exactly(module, locate(write_hub(tmp_path, state, file=file)).state(), "w", "Linear")
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, state["weight"].float())


def test_quantized_weights_are_refused():
    quantized = {**STATE, "weight": STATE["weight"].to(torch.int8)}
    with pytest.raises(WeightsError, match=r"weight torch\.int8"):
        load_exactly(nn.Linear(3, 2), quantized, "w", "Linear")


def test_tensors_that_share_memory_are_all_loaded(tmp_path):
    shared = torch.rand(2, 2)
    torch.save({"0.weight": shared, "1.weight": shared}, tmp_path / "tied.bin")
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    load_exactly(module, locate(str(tmp_path / "tied.bin")).state(), "w", "Sequential")
    assert torch.equal(module[0].weight, shared)
    assert torch.equal(module[1].weight, shared)


def test_load_exactly_requires_the_same_keys_and_shapes():
    module = nn.Linear(3, 2)
    load_exactly(module, STATE, "w", "Linear")
    assert same(module.state_dict())
    wrong = {"weight": torch.zeros(3, 3), "scale": torch.zeros(1)}
    with pytest.raises(
        WeightsError, match=r"Linear.*1 missing \(bias\).*1 unexpected \(scale\).*weight \[3, 3\].*\[2, 3\]"
    ):
        load_exactly(module, wrong, "w", "Linear")
    assert same(module.state_dict())  # nothing was copied


def test_many_wrong_keys_are_counted_and_the_first_are_named():
    with pytest.raises(WeightsError, match=r"9 unexpected \(k0, k1, k2, k3, …\)"):
        load_exactly(nn.ReLU(), {f"k{i}": torch.zeros(1) for i in range(9)}, "w", "ReLU")


def test_renamed_can_add_a_prefix():
    assert list(renamed(STATE, {"^": "0."})) == ["0.weight", "0.bias"]


def test_select_drops_only_the_given_prefixes():
    state = dict.fromkeys(["visual.proj", "text.proj", "other"], torch.zeros(1))
    assert list(select(state, prefix="visual.", drop=("text.",))) == ["proj", "other"]


def test_joined_concatenates_in_the_given_order():
    state = {f"a.{part}.bias": torch.full((2,), float(i)) for i, part in enumerate("kvq")}
    assert joined(state, "qkv", "qkv")["a.qkv.bias"].tolist() == [2, 2, 0, 0, 1, 1]


def test_joined_keeps_tensors_if_one_is_missing():
    state = {f"a.{part}.bias": torch.zeros(2) for part in "qk"}
    assert list(joined(state, "qkv", "qkv")) == ["a.q.bias", "a.k.bias"]


def test_built_in_weights_have_a_stable_identity():
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    one.load_state_dict(STATE)
    two.load_state_dict(STATE)
    assert identity_of(one) == identity_of(two)
    assert identity_of(one).source == BUILT_IN


def test_package_is_found_installed_or_in_the_cache_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MERV_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="merv download some-weights"):
        package_file("some_weights", "*.pth")
    downloaded = tmp_path / "parts" / "some_weights"
    write_hub(downloaded, STATE, file="w.pth")
    assert package_file("some_weights", "*.pth") == downloaded / "w.pth"
    installed = tmp_path / "site" / "some_weights"
    write_hub(installed, STATE, file="w.pth")
    (installed / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert package_file("some_weights", "*.pth") == installed / "w.pth"
    assert same(locate("package:some_weights/*.pth").state())


@pytest.mark.parametrize("weights", ["package:merv", "package:", "package:merv//w.pth", "package:merv/**w"])
def test_package_without_glob_is_refused(weights):
    with pytest.raises(WeightsError, match=r"package:MODULE/GLOB"):
        locate(weights)


def test_built_in_weights_of_an_encoder_that_has_none_are_refused():
    with pytest.raises(WeightsError, match="dinov2"):
        create_encoder("dinov2/small", weights="built-in")

"""config.json is checked before anything is built: one error names the file, the key and its value."""

import copy
import json
from dataclasses import fields

import pytest
import torch

from merv.checkpoints.config_schema import LoraConfig, check_config
from merv.checkpoints.folder import read_config, save_folder, write_config
from merv.errors import CheckpointError
from merv.models.llm import LoraOptions, load_llm
from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.testing import tiny_llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved VideoLLM with a LoRA."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llm(folder / "llm")
    llm, tokenizer = load_llm(folder / "llm")
    vision = MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=llm.config.hidden_size, num_frames={"fake": 4})
    model = VideoLLM(llm, tokenizer, vision)
    model.add_lora(LoraOptions(r=2))
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def config(folder):
    return read_config(folder)[1]


def keys(value, path=()):
    """The paths of all keys of an object."""
    for name, item in value.items():
        yield (*path, name)
        if isinstance(item, dict):
            yield from keys(item, (*path, name))


def changed(config, path, value):
    """A copy of the config with another value."""
    config = owner = copy.deepcopy(config)
    *owners, last = path.split(".")
    for name in owners:
        owner = owner[name]
    owner[last] = value
    return config


OPTIONAL = {"vision.num_frames.fake", "vision.encoders.fake"}  # names that a user chose


def test_every_key_is_required_and_has_a_type(config):
    paths = [".".join(path) for path in keys(config)]
    assert len(paths) > 50
    for path in paths:
        for value in (object(), [[[]]]) if path in OPTIONAL else ("remove", object(), [[[]]]):
            config_changed = changed(config, path, value)
            if value == "remove":
                *owners, last = path.split(".")
                owner = config_changed
                for name in owners:
                    owner = owner[name]
                del owner[last]
            with pytest.raises(CheckpointError, match=path):
                check_config("VideoLLM", config_changed, "config.json")


def test_unknown_key_is_named_with_the_nearest(config):
    with pytest.raises(CheckpointError, match=r"file.*vision\.sampling\.fsp.*'fps'"):
        check_config("VideoLLM", changed(config, "vision.sampling.fsp", 1), "file")
    with pytest.raises(CheckpointError, match=r"VideoLM.*'VideoLLM'"):
        check_config("VideoLM", config, "file")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("vision.grid", [2, 1], r"vision\.grid is \[2, 1\]"),
        ("vision.grid", [2**20, 2**20, 1], r"vision\.grid\[0\] is 1048576.* 262144"),
        ("vision.grid", [2**10, 2**10, 2**10], r"vision\.grid .*262144"),
        ("vision.grid", [2, 1.0, 1], r"vision\.grid\[1\] is 1\.0"),
        ("vision.output_dim", 10**40, r"vision\.output_dim is .*133 bits.*65536"),
        ("vision.num_frames", {"fake": True}, r"vision\.num_frames\.fake is true"),
        ("vision.num_frames", {"fake": 4097}, r"vision\.num_frames\.fake is 4097.*4096"),
        ("vision.align", "are", r"vision\.align is 'are'.*'area'"),
        ("vision.sampling.start_s", float("nan"), r"vision\.sampling\.start_s is NaN"),
        ("vision.sampling.start_s", -1.0, r"vision\.sampling.*start_s=-1"),
        ("vision.sampling.mode", "unifrom", r"vision\.sampling\.mode is 'unifrom'.*'uniform'"),
        ("vision.mixer_options", {"a": [1e400]}, r"vision\.mixer_options\.a\[0\] is Infinity"),
        ("vision.encoders.fake.identity.sha256", "abc", r"identity\.sha256 is 'abc'"),
        ("vision.encoders.fake.identity.source", "a\0b", r"identity\.source is 'a\\\\x00b'"),
        ("vision.encoders.fake.identity.source", "\ud800", r"identity\.source is '\\\\ud800'"),
        ("lora.r", 0, r"lora\.r is 0.* 1 to 8192"),
        ("lora.lora_dropout", 1.5, r"lora\.lora_dropout is 1\.5"),
        ("llm.dtype", "int3", r"llm\.dtype is 'int3'.*bfloat16"),
    ],
)
def test_value_that_is_not_allowed_is_named(config, path, value, named):
    with pytest.raises(CheckpointError, match=named.replace("\\\\\\\\", "\\\\")):
        check_config("VideoLLM", changed(config, path, value), "config.json")


def test_options_may_be_nested_but_not_deeply(config):
    value = 1
    for _ in range(14):
        value = [value]
    check_config("VideoLLM", changed(config, "vision.mixer_options", {"x": value}), "config.json")
    with pytest.raises(CheckpointError, match="mixer_options"):
        check_config("VideoLLM", changed(config, "vision.mixer_options", {"x": [[[value]]]}), "config.json")


def test_lora_of_the_schema_has_the_fields_of_its_options():
    assert set(LoraConfig.__annotations__) == {field.name for field in fields(LoraOptions)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 10**5,
        b'{"merv": 3, "x": ' + b'{"a":' * 10**5,
        b'{"merv": 3, "kind": "VideoLLM"}',
        b'{"merv": [[3]]}',
        b" " * (17 << 20),
        b"\xff\xfe",
        '{"merv": 3}'.encode("utf-16"),
        b"1" * 5000,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_file_that_is_not_a_config_is_named(tmp_path, data):
    save_folder(tmp_path / "a", "MultiEncoder", MultiEncoder(["fake"]).config(), {})
    (tmp_path / "a/config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MultiEncoder.from_pretrained(tmp_path / "a")


def test_what_could_not_be_read_is_not_written(tmp_path, config):
    with pytest.raises(CheckpointError, match="num_frames"):
        write_config(tmp_path, "VideoLLM", changed(config, "vision.num_frames", {"fake": 10**6}))
    assert not list(tmp_path.iterdir())


# Options that only a class can check ----------------------------------------------------------


@pytest.fixture
def edit(folder, tmp_path):
    """Write the model with another value into a new folder; its SHA-256 are those of the new files."""

    def edit(path, value):
        kind, config = read_config(folder)
        target = tmp_path / "edited"
        target.mkdir()
        (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        write_config(target, kind, changed(config, path, value))
        return target

    return edit


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("vision.mixer_options", {"hiden": 3}, "hiden"),
        ("vision.mixer_options", {"hidden": "x"}, "edited"),
        ("vision.mixer_options", {"hidden": 10**9}, r"to_query\.weight \[128, 32\], expected \[1000000000"),
        ("vision.projector_options", {"norm": [1], "x": 2}, "'x'"),
        ("vision.output_dim", 2**16, r"config\.json.*expected \[65536"),
        ("vision.num_frames", {"other": 4}, "'other'"),
        ("vision.encoders.fake.variant", "vidoe", "'vidoe'.*'video'"),
        ("vision.encoders.fake.preset", "none", "'none'"),
        ("lora.r", 8192, r"lora\.r is 8192"),
        ("trained", ["proector"], "'proector'.*'projector'"),
        ("modified_parts", ["fakee"], "fakee"),
    ],
)
def test_option_that_does_not_fit_names_the_file(edit, path, value, named):
    target = edit(path, value)
    with pytest.raises(CheckpointError, match=named) as caught:
        VideoLLM.from_pretrained(target)
    assert str(target) in str(caught.value)


def test_dict_for_from_config_is_checked():
    config = json.loads(json.dumps(MultiEncoder(["fake"], output_dim=8).config()))
    assert MultiEncoder.from_config(config, {}).fusion.output_dim == 8
    with pytest.raises(CheckpointError, match="output_dim"):
        MultiEncoder.from_config({**config, "output_dim": "8"}, {})


@pytest.mark.parametrize("value", [torch.full((32,), float("nan")), torch.ones(32, dtype=torch.int32)])
def test_tensor_with_nan_or_other_numbers_is_named(folder, tmp_path, value):
    from safetensors.torch import load_file

    name = "vision.fusion.projectors.fake.linear.bias"
    state = {**load_file(folder / "model.safetensors"), name: value}
    save_folder(tmp_path / "model", *read_config(folder), state)
    with pytest.raises(CheckpointError, match=name.removeprefix("vision.fusion.")):
        VideoLLM.from_pretrained(tmp_path / "model")

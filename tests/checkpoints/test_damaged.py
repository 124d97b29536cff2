"""A bit that flips in a saved file is noticed, and no code of a folder runs."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from merv.checkpoints import folder as folders
from merv.checkpoints.average import average
from merv.checkpoints.folder import read_config, write_config
from merv.errors import CheckpointError
from merv.models.llm import load_llm
from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.testing import tiny_llm
from merv.training.checkpointing import Folders


@pytest.fixture
def saved(tmp_path):
    MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    tiny_llm(folder)
    llm, tokenizer = load_llm(folder)
    return VideoLLM(llm, tokenizer, MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=llm.config.hidden_size))


@pytest.fixture
def checkpoint(model):
    """What Lightning saves."""
    state = {f"model.{name}": tensor for name, tensor in model.trainable_state_dict().items()}
    return {"state_dict": state, "config": model.config(), "global_step": 3}


def flip_bit(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 4
    file.write_bytes(data)


def digests_are_complete(folder) -> bool:
    """Whether config.json has the digests of exactly the other files."""
    sha256 = json.loads((folder / "config.json").read_text())["sha256"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return set(sha256) == files - {"config.json"} and len(sha256) > 0


@pytest.mark.parametrize("byte", [-1, -40, 30])
def test_flipped_bit_in_the_weights_is_named(saved, byte):
    flip_bit(saved / "model.safetensors", byte)
    for verify in (None, True):
        with pytest.raises(CheckpointError, match=r"model/model\.safetensors"):
            MultiEncoder.from_pretrained(saved, verify=verify)


def test_large_files_are_compared_on_request(saved, monkeypatch):
    monkeypatch.setattr(folders, "VERIFY_BYTES", 100)
    flip_bit(saved / "model.safetensors", -1)
    MultiEncoder.from_pretrained(saved)
    MultiEncoder.from_pretrained(saved, verify=False)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        MultiEncoder.from_pretrained(saved, verify=True)


def test_changed_config_is_a_warning(saved):
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text(text.replace("\n", "\n\n"))
    MultiEncoder.from_pretrained(saved, verify=True)  # other white space is no change
    (saved / "config.json").write_text(text.replace('"area"', '"released"'))
    for verify in (None, True):
        with pytest.warns(UserWarning, match=r"config\.json"):
            assert MultiEncoder.from_pretrained(saved, verify=verify).aligner.mode == "released"


def test_folder_without_digests_cannot_be_verified(saved):
    content = json.loads((saved / "config.json").read_text())
    del content["sha256"], content["config_sha256"]
    (saved / "config.json").write_text(json.dumps(content))
    MultiEncoder.from_pretrained(saved)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MultiEncoder.from_pretrained(saved, verify=True)


def test_every_file_of_a_bundled_language_model_is_compared(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(model.llm.config.name_or_path, tmp_path / "model/llm")
    kind, config = read_config(tmp_path / "model")
    config["llm"]["source"] = "llm"
    write_config(tmp_path / "model", kind, config)
    average([tmp_path / "model"] * 2, tmp_path / "mean")
    assert digests_are_complete(tmp_path / "mean")
    text = (tmp_path / "mean/llm/config.json").read_text()
    (tmp_path / "mean/llm/config.json").write_text(text.replace("1e-06", "1e-05"))
    with pytest.raises(CheckpointError, match=r"llm/config\.json"):
        VideoLLM.from_pretrained(tmp_path / "mean")


# Checkpoints of a run -------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["training.pt", "model.safetensors"])
def test_flipped_bit_is_noticed_on_resuming(checkpoint, tmp_path, file):
    Folders().save_checkpoint(checkpoint, tmp_path / "step=3")
    assert digests_are_complete(tmp_path / "step=3")
    assert Folders().load_checkpoint(tmp_path / "step=3")["global_step"] == 3
    flip_bit(tmp_path / "step=3" / file, -30)
    with pytest.raises(CheckpointError, match=file):
        Folders().load_checkpoint(tmp_path / "step=3")


@pytest.mark.parametrize("data", [b"", b"torn", pickle.dumps({"a": Path("x")})])
def test_training_state_that_cannot_be_read_names_the_way_out(checkpoint, tmp_path, data):
    folder = tmp_path / "step=3"
    Folders().save_checkpoint(checkpoint, folder)
    (folder / "training.pt").write_bytes(data)
    write_config(folder, *read_config(folder))
    with pytest.raises(CheckpointError, match=rf"training\.pt.*--model\.init_from={folder}"):
        Folders().load_checkpoint(folder)


class Touch:
    """An object whose pickle creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_in_a_training_state_are_not_run(checkpoint, tmp_path):
    folder, ran = tmp_path / "step=3", tmp_path / "ran"
    Folders().save_checkpoint(checkpoint, folder)
    torch.save({"global_step": Touch(ran)}, folder / "training.pt")
    write_config(folder, *read_config(folder))
    with pytest.raises(CheckpointError, match=r"training\.pt"):
        Folders().load_checkpoint(folder)
    assert not ran.exists()

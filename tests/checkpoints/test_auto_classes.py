"""Every saved folder has a model type, so that the Auto classes of transformers can load it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from merv.checkpoints.folder import read_config, write_config
from merv.models.multi_encoder import MultiEncoder


class MervConfig(PreTrainedConfig):
    model_type = "merv"


class AutoMultiEncoder:
    config_class = MervConfig

    @staticmethod
    def from_pretrained(folder, *arguments, **options):
        return MultiEncoder.from_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    MultiEncoder(["fake"], grid=(4, 2, 2), output_dim=8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_registered_auto_classes_load_a_saved_folder(folder):
    AutoConfig.register("merv", MervConfig, exist_ok=True)
    AutoModel.register(MervConfig, AutoMultiEncoder, exist_ok=True)
    assert type(AutoConfig.from_pretrained(folder)) is MervConfig
    loaded, expected = AutoModel.from_pretrained(folder), MultiEncoder.from_pretrained(folder)
    assert all(map(torch.equal, loaded.state_dict().values(), expected.state_dict().values()))


def test_folder_without_a_model_type_is_still_read(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    assert content.pop("model_type") == "merv"
    before = read_config(folder)
    path.write_text(json.dumps(content))
    assert read_config(folder) == before


def test_writer_of_checkpoints_adds_the_model_type(tmp_path):
    config = MultiEncoder(["fake"], grid=(4, 2, 2)).config()
    write_config(tmp_path, "MultiEncoder", config)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "merv"

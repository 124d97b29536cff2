"""Parts: fetched whole or not at all, by pip or uv, and found again."""

import argparse
import subprocess
from pathlib import Path

import pytest
import torch

from merv.cli import download
from merv.errors import MissingDependency, WeightsError
from merv.testing import tiny_llm
from merv.utils import assets

ASSET = assets.Asset("a-part", "1.0", "0" * 64, "a_part", "models/*.pth", "A part (MIT), 1 MB")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a table of one part that no index has."""
    monkeypatch.setenv("MERV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "ASSETS", (ASSET,))
    return tmp_path / "cache"


@pytest.fixture
def installer(monkeypatch) -> list[list[str]]:
    """Stands in for pip: unpacks a wheel of three files; what it was called with."""
    calls = []

    def install(command, **kwargs):
        calls.append(command)
        target = Path(command[command.index("--target") + 1])
        for name in ("a_part/models/net.pth", "a_part/__init__.py", "tests/test.mp4"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", install)
    return calls


def test_only_the_wanted_files_are_kept(cache, installer):
    folder = assets.fetch_asset(ASSET)
    assert folder == cache / "parts" / "a_part" == assets.asset_folder("a_part")
    assert sorted(file.name for file in folder.rglob("*.*")) == ["net.pth"]
    assert sorted(file.name for file in folder.parent.iterdir()) == ["a_part"]  # nothing half done beside it


def test_the_hash_is_checked_by_the_installer(cache, installer):
    assets.fetch_asset(ASSET)
    assert {"--require-hashes", "--no-deps"} <= set(installer[0])
    assert ASSET.requirement == "a-part==1.0 --hash=sha256:" + "0" * 64


def test_what_is_there_is_not_fetched_again(cache, installer, capsys):
    wanted = argparse.Namespace(names=["a-part"])
    assert download.run(wanted) == 0
    assert download.run(wanted) == 0
    assert len(installer) == 1
    assert "is in" in capsys.readouterr().out.splitlines()[1]


def test_another_version_is_fetched_again(cache, installer, monkeypatch):
    assets.fetch_asset(ASSET)
    newer = assets.Asset("a-part", "2.0", "1" * 64, "a_part", "models/*.pth", "A part")
    monkeypatch.setattr(assets, "ASSETS", (newer,))
    assert assets.installed_folder("a_part") is None
    assets.fetch_asset(newer)
    assert assets.installed_folder("a_part") is not None


def test_a_failed_fetch_leaves_nothing_and_shows_why(cache, monkeypatch):
    refuse = lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", "hashes do not match")  # noqa: E731
    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(
        WeightsError, match=r"(?s)a-part==1.0 could not be .*hashes do not match.*`merv download a-part`"
    ):
        assets.fetch_asset(ASSET)
    assert list((cache / "parts").iterdir()) == []


def test_a_missing_part_says_what_to_type(cache):
    with pytest.raises(
        WeightsError, match=r"A part \(MIT\) is not on this machine. Type `merv download a-part`"
    ):
        assets.asset_folder("a_part")


def test_an_unknown_part_suggests_the_nearest(cache):
    with pytest.raises(
        WeightsError, match=r"Unknown asset 'a-prt'. Did you mean 'a-part'\? There are: a-part."
    ):
        assets.find_asset("a-prt")


def test_an_installed_package_is_found_without_being_imported(cache, tmp_path, monkeypatch):
    (tmp_path / "a_part").mkdir()
    (tmp_path / "a_part" / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert assets.asset_folder("a_part") == tmp_path / "a_part"


def test_uv_is_taken_where_pip_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    monkeypatch.setattr(assets.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install uv"):
        assets._installer()
    (tmp_path / "uv").touch()
    assert assets._installer()[:3] == [str(tmp_path / "uv"), "pip", "install"]


def test_the_language_model_is_converted_once(cache, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(assets, "asset_folder", lambda module: tmp_path)
    converted = []
    monkeypatch.setattr(assets, "_convert_gguf", lambda gguf, folder: converted.append(gguf))
    assert assets.smollm2_folder() == assets.smollm2_folder() == cache / "smollm2-135m-instruct"
    assert converted == [tmp_path / "model.gguf"]


def test_a_packed_model_is_saved_plain_and_in_bfloat16(cache, tmp_path, monkeypatch):
    import transformers

    llm, tokenizer = tiny_llm()
    llm.config.quantization_config = {"quant_method": "gguf"}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: llm)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    assets._convert_gguf(tmp_path / "model.gguf", tmp_path / "plain")
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert saved.dtype == torch.bfloat16
    assert not hasattr(saved.config, "quantization_config")
    assert torch.equal(saved.lm_head.weight, llm.lm_head.weight.bfloat16())
    assert (tmp_path / "plain" / "tokenizer.json").exists()


def test_a_conversion_that_fails_leaves_nothing(cache, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(assets, "asset_folder", lambda module: tmp_path)
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"merv\[demo\]"):
        assets.smollm2_folder()
    assert list(cache.iterdir()) == []


def test_every_part_is_pinned():
    for part in assets.ASSETS:
        assert len(part.sha256) == 64
        assert part.version[0].isdigit()

"""Assets are downloaded completely or not at all, by pip or uv, and found again."""

import argparse
import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from merv.cli import download
from merv.encoding.weights import package_file
from merv.errors import MissingDependency, WeightsError
from merv.testing import tiny_llm
from merv.utils import assets
from merv.utils.files import _host

FILES = {"models/net.pth": hashlib.sha256(b"an_asset/models/net.pth").hexdigest()}
ASSET = assets.Asset("an-asset", "1.0", "0" * 64, "an_asset", FILES, "An asset (MIT), 1 MB")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a table with one asset that does not exist on the package index."""
    monkeypatch.setenv("MERV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "ASSETS", (ASSET,))
    return tmp_path / "cache"


@pytest.fixture
def installer(monkeypatch) -> list[list[str]]:
    """Replace pip: unpack a wheel of three files. Returns the commands it was called with."""
    calls = []

    def install(command, **kwargs):
        calls.append(command)
        target = Path(command[command.index("--target") + 1])
        for name in ("an_asset/models/net.pth", "an_asset/__init__.py", "tests/test.mp4"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", install)
    return calls


def test_only_matching_files_are_kept(cache, installer):
    folder = assets.download_asset(ASSET)
    assert folder == cache / "parts" / "an_asset" == assets.asset_folder("an_asset")
    assert sorted(file.name for file in folder.rglob("*.*")) == ["net.pth"]
    assert sorted(file.name for file in folder.parent.iterdir()) == [
        "an_asset"
    ]  # no temporary folder is left


def test_installer_checks_the_hash(cache, installer):
    assets.download_asset(ASSET)
    assert {"--require-hashes", "--no-deps"} <= set(installer[0])
    assert ASSET.requirement == "an-asset==1.0 --hash=sha256:" + "0" * 64


def test_downloaded_asset_is_not_downloaded_again(cache, installer, capsys):
    args = argparse.Namespace(names=["an-asset"])
    assert download.run(args) == 0
    assert download.run(args) == 0
    assert len(installer) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_damaged_asset_is_an_error_and_downloaded_again(cache, installer):
    file = assets.download_asset(ASSET) / "models/net.pth"
    file.write_bytes(flip_bit(file.read_bytes(), 5))
    for find in (lambda: assets.asset_folder("an_asset"), lambda: package_file("an_asset", "models/*")):
        with pytest.raises(WeightsError, match=r"net\.pth.*merv download an-asset"):
            find()
    assert download.run(argparse.Namespace(names=["an-asset"])) == 0
    assert package_file("an_asset", "models/*") == file


def flip_bit(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_other_version_is_downloaded_again(cache, installer, monkeypatch):
    assets.download_asset(ASSET)
    newer = assets.Asset("an-asset", "2.0", "1" * 64, "an_asset", FILES, "An asset")
    monkeypatch.setattr(assets, "ASSETS", (newer,))
    assert assets.existing_folder("an_asset") is None
    assets.download_asset(newer)
    assert assets.existing_folder("an_asset") is not None


def test_failed_download_leaves_nothing_and_shows_the_reason(cache, monkeypatch):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "hashes do not match")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(WeightsError, match=r"(?s)an-asset==1.0.*hashes do not match.*merv download an-asset"):
        assets.download_asset(ASSET)
    assert list((cache / "parts").iterdir()) == []


def test_error_for_missing_asset_has_the_command(cache):
    with pytest.raises(WeightsError, match="merv download an-asset"):
        assets.asset_folder("an_asset")


def test_unknown_asset_suggests_the_nearest(cache):
    with pytest.raises(WeightsError, match=r"'an-aset'.*'an-asset'"):
        assets.find_asset("an-aset")


def test_installed_package_is_found_without_importing_it(cache, tmp_path, monkeypatch):
    (tmp_path / "an_asset").mkdir()
    (tmp_path / "an_asset" / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert assets.asset_folder("an_asset") == tmp_path / "an_asset"


def test_uv_is_used_without_pip(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    monkeypatch.setattr(assets.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install uv"):
        assets._installer()
    (tmp_path / "uv").touch()
    assert assets._installer()[:3] == [str(tmp_path / "uv"), "pip", "install"]


def test_llm_is_converted_once(cache, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(assets, "asset_folder", lambda module: tmp_path)
    converted = []

    def convert(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"weights")
        converted.append(gguf)

    monkeypatch.setattr(assets, "_convert_gguf", convert)
    assert assets.smollm2_folder() == assets.smollm2_folder() == cache / "smollm2-135m-instruct"
    assert converted == [tmp_path / "model.gguf"]
    (cache / "smollm2-135m-instruct/model.safetensors").write_bytes(b"weight3")
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        assets.smollm2_folder()


def test_converted_llm_is_not_quantized_and_has_bfloat16(cache, tmp_path, monkeypatch):
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


def test_failed_conversion_leaves_nothing(cache, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(assets, "asset_folder", lambda module: tmp_path)
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="demo"):
        assets.smollm2_folder()
    assert list(cache.iterdir()) == []


def test_every_asset_is_pinned():
    for asset in assets.ASSETS:
        assert len(asset.sha256) == 64
        assert asset.version[0].isdigit()


def test_cache_that_cannot_be_written_is_an_error_with_a_way_out(cache, installer):
    cache.write_bytes(b"")  # a file in place of the folder
    with pytest.raises(WeightsError, match=r"an_asset could not be written: .*MERV_CACHE"):
        assets.download_asset(ASSET)


def test_damaged_marker_counts_as_not_downloaded(cache, installer):
    (assets.download_asset(ASSET) / "PART").write_bytes(b"\xff\xfe")
    assert assets.existing_folder("an_asset") is None


def test_download_removes_what_a_killed_download_left(cache, installer):
    leftover = cache / "parts" / f".an_asset.{_host()}.9999999.0123abcd"
    (leftover / "models").mkdir(parents=True)
    assets.download_asset(ASSET)
    assert [path.name for path in (cache / "parts").iterdir()] == ["an_asset"]

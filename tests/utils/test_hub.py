"""Files of the hub: the exact revision, the cache if the hub does not answer, errors without retries."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub import cache_as_hub, write_hub, write_shards
from huggingface_hub import errors

from merv.encoders.fake import Fake
from merv.encoding.weights import Identity, locate
from merv.errors import WeightsError
from merv.models.multi_encoder import MultiEncoder
from merv.utils.hub import find_transformer

REPO = "someone/model"
OLD, NEW = "0" * 40, "1" * 40
SEEDS = {OLD: 1.0, NEW: 2.0}


def state(commit):
    return {"weight": torch.full((2, 3), SEEDS[commit])}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache with two commits: the newer one is main, the older one is the tag v1."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for commit, ref in ((OLD, "v1"), (NEW, "main")):
        folder = write_hub(tmp_path / ref, state(commit), config={"of": commit})
        cache_as_hub(cache, REPO, commit, folder, ref)
    return cache


@pytest.fixture
def answer(monkeypatch):
    """Set the answer of the hub: names of files, or an error. Returns the list of requests."""
    asked = []

    def set_to(answered):
        def model_info(self, repo, revision, timeout):
            asked.append((repo, revision))
            if isinstance(answered, Exception):
                raise answered
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in answered])

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
        return asked

    return set_to


def refusal(kind):
    """An error of huggingface_hub without the HTTP response that its constructor needs."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error.",)
    return error


@pytest.mark.parametrize(
    ("typed", "commit"),
    [(REPO, NEW), (f"{REPO}@main", NEW), (f"{REPO}@v1", OLD), (f"{REPO}@{OLD}", OLD), (f"{REPO}@{NEW}", NEW)],
)
def test_cached_revision_is_found_offline_with_its_commit(hub, typed, commit):
    source = locate(typed)
    assert torch.equal(source.state()["weight"], state(commit)["weight"])
    assert source.config() == {"of": commit}
    assert source.identity() == Identity(REPO, commit, source.identity().sha256)


@pytest.mark.parametrize("revision", ["another", "2" * 40, "refs/pr/1"])
def test_missing_revision_is_not_replaced_by_another(hub, revision):
    with pytest.raises(WeightsError, match=f"{REPO}@{revision}.*HF_HUB_OFFLINE"):
        locate(f"{REPO}@{revision}")


def test_shards_and_config_come_from_one_commit(hub, tmp_path):
    commit = "3" * 40
    whole = {"a": torch.zeros(1), "b": torch.ones(1)}
    folder = write_shards(tmp_path / "sharded", whole)
    cache_as_hub(hub, REPO, commit, folder)
    source = locate(REPO)
    assert source.state().keys() == whole.keys()
    assert {file.parent.name for file in source.files} == {commit}


def test_missing_shard_in_the_cache_is_named(hub, tmp_path):
    folder = write_shards(tmp_path / "sharded", {"a": torch.zeros(1), "b": torch.ones(1)})
    cache_as_hub(hub, REPO, "3" * 40, folder)
    (hub / "models--someone--model" / "snapshots" / ("3" * 40) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors"):
        locate(REPO)


def test_repository_without_config_raises(hub, answer):
    (hub / "models--someone--model" / "snapshots" / NEW / "config.json").unlink()
    source = locate(REPO)
    answer(["model.safetensors"])
    with pytest.raises(WeightsError, match=r"config\.json"):
        source.config()


def test_cached_commit_is_read_without_a_request(hub, answer):
    asked = answer(["model.safetensors"])
    assert locate(f"{REPO}@{OLD}").revision == OLD
    assert asked == []


def test_best_file_of_a_branch_is_downloaded(hub, answer, monkeypatch):
    moved_to = hub / "models--someone--model" / "snapshots" / OLD
    downloaded = []

    def fetch(repo, name, revision):
        downloaded.append((repo, name, revision))
        return str(moved_to / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    asked = answer(["README.md", "pytorch_model.bin", "model.safetensors"])
    assert locate(f"{REPO}@main").revision == OLD
    assert asked == [(REPO, "main")]
    assert downloaded == [(REPO, "model.safetensors", "main")]


def test_repository_without_weights_lists_the_file_names(hub, answer):
    answer(["README.md"])
    with pytest.raises(WeightsError, match=r"someone/empty.*model\.safetensors, "):
        locate("someone/empty")


def test_cache_is_read_after_one_failed_request(hub, answer):
    asked = answer(ConnectionError("no route"))
    assert locate(REPO).revision == NEW
    assert asked == [(REPO, None)]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConnectionError("no route to host.\nmore"), r"ConnectionError: no route to host\. "),
        (TimeoutError(), "TimeoutError"),
        (refusal(errors.GatedRepoError), "HF_TOKEN"),
        (refusal(errors.RepositoryNotFoundError), "private.*HF_TOKEN"),
        (refusal(errors.RevisionNotFoundError), "revision"),
    ],
)
def test_hub_error_is_raised_without_retries(hub, answer, monkeypatch, error, text):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # it would retry for 23 s
    asked = answer(error)
    with pytest.raises(WeightsError, match=f"someone/other.*{text}.*weights=None"):
        locate("someone/other")
    assert asked == [("someone/other", None)]


def test_malformed_hub_id_raises_weights_error():
    with pytest.raises(WeightsError, match="'some one/model'"):
        locate("some one/model")


def test_saved_model_loads_the_commit_it_was_created_with(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    net = Fake().net
    cache_as_hub(cache, REPO, OLD, write_hub(tmp_path / "old", net.state_dict()))
    model = MultiEncoder({"fake": Fake(weights=REPO)})
    model.save_pretrained(tmp_path / "saved")
    torch.nn.init.ones_(net.weight)
    cache_as_hub(cache, REPO, NEW, write_hub(tmp_path / "new", net.state_dict()))  # main has moved on
    loaded = MultiEncoder.from_pretrained(tmp_path / "saved")
    assert loaded.encoder("fake").identity == model.encoder("fake").identity
    assert loaded.encoder("fake").identity.revision == OLD


def test_spec_can_pin_its_revision(hub, monkeypatch):
    from dataclasses import replace

    seen = []
    monkeypatch.setattr("merv.encoding.base.locate", lambda weights, names: seen.append(weights))
    pinned = replace(Fake.variants["image"], source=REPO, revision=OLD)
    monkeypatch.setitem(Fake.variants, "image", pinned)
    Fake()
    assert seen == [f"{REPO}@{OLD}"]


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    """The snapshot in the cache of a model of transformers with two shards."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder = write_shards(tmp_path / "llm", {"a": torch.ones(2), "b": torch.ones(3)})
    cache_as_hub(cache, REPO, NEW, folder)
    return cache / "models--someone--model" / "snapshots" / NEW


def test_cached_language_model_is_found_without_retries(sharded, answer):
    asked = answer(ConnectionError("no route to host"))
    assert find_transformer(REPO) == sharded
    assert asked == [(REPO, None), (REPO, NEW)]


def test_missing_shard_is_downloaded(sharded, answer, monkeypatch):
    shard = next(sharded.glob("*-00002-of-*"))
    shard.unlink()
    answer(
        ["model.safetensors.index.json", "config.json", "original/params.json", "consolidated.safetensors"]
    )
    downloaded = []

    def hf_hub_download(repo, name, revision):
        downloaded.append(name)
        return str(sharded / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    find_transformer(REPO)
    assert shard.name in downloaded
    assert not {"original/params.json", "consolidated.safetensors"} & set(downloaded)


def test_missing_shard_without_the_hub_is_an_error(sharded, answer, monkeypatch):
    next(sharded.glob("*-00002-of-*")).unlink()
    answer(ConnectionError("no route to host"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="00002-of-00002"):
        find_transformer(REPO)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"weight_map": 1}', b"\xff", b"[" * 100_000])
def test_damaged_index_of_shards_is_named(sharded, answer, content):
    answer(ConnectionError("no route to host"))
    index = sharded / "model.safetensors.index.json"
    index.unlink()
    index.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json is damaged"):
        find_transformer(REPO)

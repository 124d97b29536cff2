"""Files of a hub: exactly the revision asked for, from the cache where the hub is silent, errors at once."""

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

REPO = "someone/model"
OLD, NEW = "0" * 40, "1" * 40
SEEDS = {OLD: 1.0, NEW: 2.0}


def state(commit):
    return {"weight": torch.full((2, 3), SEEDS[commit])}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache with two commits, of which main is the newer and the tag v1 the older."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for commit, ref in ((OLD, "v1"), (NEW, "main")):
        folder = write_hub(tmp_path / ref, state(commit), config={"of": commit})
        cache_as_hub(cache, REPO, commit, folder, ref)
    return cache


@pytest.fixture
def answer(monkeypatch):
    """Sets what the hub answers: names of files, or an error; what it was asked and what was fetched."""
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
    """An error of the hub, of that kind, without the answer that it would carry."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error.",)
    return error


@pytest.mark.parametrize(
    ("typed", "commit"),
    [(REPO, NEW), (f"{REPO}@main", NEW), (f"{REPO}@v1", OLD), (f"{REPO}@{OLD}", OLD), (f"{REPO}@{NEW}", NEW)],
)
def test_a_cached_revision_is_found_offline_and_its_commit_recorded(hub, typed, commit):
    source = locate(typed)
    assert torch.equal(source.state()["weight"], state(commit)["weight"])
    assert source.config() == {"of": commit}
    assert source.identity() == Identity(REPO, commit, source.identity().sha256)


@pytest.mark.parametrize("revision", ["another", "2" * 40, "refs/pr/1"])
def test_a_revision_that_is_not_cached_is_not_replaced_by_another(hub, revision):
    with pytest.raises(
        WeightsError, match=f"{REPO}@{revision} could not be downloaded.*HF_HUB_OFFLINE is set.*the cache"
    ):
        locate(f"{REPO}@{revision}")


def test_shards_and_config_come_from_one_commit(hub, tmp_path):
    commit = "3" * 40
    whole = {"a": torch.zeros(1), "b": torch.ones(1)}
    folder = write_shards(tmp_path / "sharded", whole)
    cache_as_hub(hub, REPO, commit, folder)
    source = locate(REPO)
    assert source.state().keys() == whole.keys()
    assert {file.parent.name for file in source.files} == {commit}


def test_an_absent_shard_of_the_cache_is_an_error_of_ours(hub, tmp_path):
    folder = write_shards(tmp_path / "sharded", {"a": torch.zeros(1), "b": torch.ones(1)})
    cache_as_hub(hub, REPO, "3" * 40, folder)
    (hub / "models--someone--model" / "snapshots" / ("3" * 40) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"Nor is model-00002-of-00002.safetensors in the cache"):
        locate(REPO)


def test_a_config_that_the_repository_lacks_is_an_error(hub, answer):
    (hub / "models--someone--model" / "snapshots" / NEW / "config.json").unlink()
    source = locate(REPO)
    answer(["model.safetensors"])
    with pytest.raises(WeightsError, match=r"no config.json beside model.safetensors"):
        source.config()


def test_a_cached_commit_is_taken_without_asking(hub, answer):
    asked = answer(["model.safetensors"])
    assert locate(f"{REPO}@{OLD}").revision == OLD
    assert asked == []


def test_a_branch_is_asked_for_and_its_best_file_fetched(hub, answer, monkeypatch):
    moved_to = hub / "models--someone--model" / "snapshots" / OLD
    fetched = []

    def fetch(repo, name, revision):
        fetched.append((repo, name, revision))
        return str(moved_to / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    asked = answer(["README.md", "pytorch_model.bin", "model.safetensors"])
    assert locate(f"{REPO}@main").revision == OLD
    assert asked == [(REPO, "main")]
    assert fetched == [(REPO, "model.safetensors", "main")]


def test_a_repository_without_weights_lists_what_was_looked_for(hub, answer):
    answer(["README.md"])
    with pytest.raises(WeightsError, match=r"is on the hub, but holds none of model.safetensors, "):
        locate("someone/empty")


def test_a_silent_hub_is_asked_once_and_the_cache_then_read(hub, answer):
    asked = answer(ConnectionError("no route"))
    assert locate(REPO).revision == NEW
    assert asked == [(REPO, None)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route to host.\nmore"), "ConnectionError: no route to host. Nor is"),
        (TimeoutError(), "TimeoutError: no reason given. Nor is"),
        (refusal(errors.GatedRepoError), "accept the terms on its page.*HF_TOKEN"),
        (refusal(errors.RepositoryNotFoundError), "no such repository, or it is private.*HF_TOKEN"),
        (refusal(errors.RevisionNotFoundError), "has no such revision"),
    ],
)
def test_what_a_hub_refuses_is_told_at_once_with_a_remedy(hub, answer, monkeypatch, error, said):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # which would try again for 23 s
    asked = answer(error)
    with pytest.raises(
        WeightsError, match=f'someone/other could not be downloaded.*{said}.*weights="/path.*weights=None'
    ):
        locate("someone/other")
    assert asked == [("someone/other", None)]


def test_a_malformed_hub_id_is_an_error_of_ours():
    with pytest.raises(WeightsError, match="'some one/model' is neither a path nor an id of the hub"):
        locate("some one/model")


def test_a_saved_model_asks_for_the_commit_that_it_was_made_with(tmp_path, monkeypatch):
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


def test_a_spec_may_pin_its_revision(hub, monkeypatch):
    from dataclasses import replace

    seen = []
    monkeypatch.setattr("merv.encoding.base.locate", lambda weights, names: seen.append(weights))
    pinned = replace(Fake.variants["image"], source=REPO, revision=OLD)
    monkeypatch.setitem(Fake.variants, "image", pinned)
    Fake()
    assert seen == [f"{REPO}@{OLD}"]

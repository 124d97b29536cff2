"""Models on the hub: pushing, loading, model cards, and errors about parts that only this machine has."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
import yaml
from hub import cache_as_hub
from huggingface_hub import HfApi, errors

from merv.checkpoints.folder import read_config, write_config
from merv.errors import CheckpointError, WeightsError
from merv.models.chat import user_message
from merv.models.llm import LoraOptions, load_llm
from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.testing import tiny_llm

REPO = "someone/sees"
VIDEO = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    tiny_llm(folder)
    return folder


@pytest.fixture
def model(llm) -> VideoLLM:
    loaded, tokenizer = load_llm(llm)
    vision = MultiEncoder(["fake", "fake/video"], grid=(4, 2, 2), output_dim=loaded.config.hidden_size)
    model = VideoLLM(loaded, tokenizer, vision)
    model.add_lora(LoraOptions(r=2))
    model.train_only(["projector", "mixer", "lora"])
    return model.eval()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake hub with the signatures of HfApi. What is pushed can be loaded from the cache."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    hub = SimpleNamespace(
        cache=cache,
        files={},
        **{
            name: create_autospec(getattr(HfApi, name))
            for name in ("create_repo", "create_branch", "file_exists", "upload_folder")
        },
    )
    hub.file_exists.return_value = False

    def upload(self, *, repo_id, folder_path, **options):
        hub.files = {
            path.name: path.read_text(errors="replace") for path in sorted(Path(folder_path).iterdir())
        }
        shutil.copytree(folder_path, tmp_path / "pushed")
        cache_as_hub(
            cache, repo_id, COMMIT, str(tmp_path / "pushed"), Path(options["revision"] or "main").name
        )
        return SimpleNamespace(oid=COMMIT)

    hub.upload_folder.side_effect = upload
    for name in ("create_repo", "create_branch", "file_exists", "upload_folder"):
        monkeypatch.setattr(HfApi, name, getattr(hub, name))
    return hub


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


# Pushing and loading ------------------------------------------------------------------------


@pytest.mark.parametrize("revision", [None, "trial"])
def test_pushed_model_loads_by_name_and_commit(model, llm, hub, revision):
    info = model.push_to_hub(REPO, sources={"llm": "someone/llm"}, revision=revision)
    messages = user_message("What?", VIDEO, answer="cat")
    for name in (f"{REPO}@{revision}" if revision else REPO, f"{REPO}@{info.oid}"):
        again = VideoLLM.from_pretrained(name, llm=llm)
        assert torch.equal(model.log_probs([messages])[0], again.log_probs([messages])[0])
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md"}


def test_pushed_multi_encoder_loads(hub):
    encoders = MultiEncoder(["fake"], grid=(4, 2, 2), output_dim=16).eval()
    encoders.push_to_hub(REPO)
    assert torch.equal(MultiEncoder.from_pretrained(REPO).eval()(VIDEO).tokens, encoders(VIDEO).tokens)


def test_bundled_language_model_is_found_in_the_repository(model, llm, hub, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    shutil.copytree(llm, tmp_path / "whole/llm")
    kind, config = read_config(tmp_path / "whole")
    config["llm"]["source"] = "llm"
    write_config(tmp_path / "whole", kind, config)
    cache_as_hub(hub.cache, REPO, COMMIT, str(tmp_path / "whole"))
    assert VideoLLM.from_pretrained(REPO).llm_identity["source"].endswith(f"snapshots/{COMMIT}/llm")


def test_options_are_passed_to_the_hub(model, hub):
    options = {"private": True, "commit_message": "Step 500", "create_pr": True, "revision": "trial"}
    model.push_to_hub(REPO, sources={"llm": "someone/llm"}, **options)
    assert hub.create_repo.call_args.kwargs == {"private": True, "exist_ok": True}
    assert hub.create_branch.call_args.kwargs == {"branch": "trial", "exist_ok": True}
    pushed = hub.upload_folder.call_args.kwargs
    assert (pushed["commit_message"], pushed["create_pr"], pushed["revision"]) == ("Step 500", True, "trial")


def test_no_branch_is_created_for_a_pull_request(model, hub):
    model.push_to_hub(REPO, sources={"llm": "someone/llm"}, revision="refs/pr/1")
    assert not hub.create_branch.called


def test_pushed_model_has_the_digests_of_its_files(model, llm, hub, tmp_path):
    model.push_to_hub(REPO, sources={"llm": "someone/llm"})
    config = json.loads(hub.files["config.json"])
    assert set(config["sha256"]) == set(hub.files) - {"config.json", "README.md"}
    assert VideoLLM.from_pretrained(REPO, llm=llm, verify=True)
    (weights,) = hub.cache.rglob("snapshots/*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        VideoLLM.from_pretrained(REPO, llm=llm, verify=True)


# Sources ------------------------------------------------------------------------------------


def test_local_source_is_an_error_before_anything_is_uploaded(model, hub):
    with pytest.raises(CheckpointError, match=r'llm\. .*sources={"llm": "owner/name"}'):
        model.push_to_hub(REPO)
    assert not hub.create_repo.called


def test_sources_set_hub_ids_and_revisions(model, hub):
    model.push_to_hub(REPO, sources={"llm": "someone/llm", "fake": f"someone/fake@{COMMIT}"})
    config = json.loads(hub.files["config.json"])
    fake = config["vision"]["encoders"]["fake"]["identity"]
    assert (config["llm"]["source"], fake["source"], fake["revision"]) == (
        "someone/llm",
        "someone/fake",
        COMMIT,
    )
    assert model.vision.encoder("fake").identity.source == "built-in"


def test_source_of_an_unknown_part_is_an_error(model, hub):
    with pytest.raises(CheckpointError, match=r"'lm'.*'llm'"):
        model.push_to_hub(REPO, sources={"lm": "someone/llm"})


# The card -----------------------------------------------------------------------------------


def test_card_describes_the_model(model):
    card = model.card(REPO, {"llm": "someone/llm", "fake_video": f"someone/fake@{COMMIT}"})
    assert header(card) == {
        "library_name": "merv",
        "pipeline_tag": "video-text-to-text",
        "tags": ["merv", "video"],
        "base_model": ["someone/llm", "someone/fake"],
        "base_model_relation": "adapter",
    }
    sha256 = model.vision.encoder("fake_video").identity.sha256
    assert f"`someone/fake@{COMMIT}` with SHA-256 `{sha256[:16]}…`, license Apache-2.0" in card
    assert f'VideoLLM.from_pretrained("{REPO}")' in card
    assert "projector, mixer, lora. " in card
    assert f"{sum(tensor.numel() for tensor in model.trainable_state_dict().values()):,} values" in card


def test_card_marks_what_is_unknown(model):
    card = model.card(REPO, {"llm": "someone/llm"})
    assert card.count("**to be filled in**") == 4
    assert "license" not in header(card)


def test_card_of_a_trained_language_model_is_a_finetune(model):
    model.train_only(["projector", "llm"])
    assert header(model.card(REPO, {"llm": "someone/llm"}))["base_model_relation"] == "finetune"


@pytest.mark.parametrize(("output_dim", "trained"), [(16, "projectors, mixer"), (None, "none")])
def test_card_of_a_multi_encoder(output_dim, trained):
    card = MultiEncoder(["fake"], output_dim=output_dim).card(REPO)
    assert header(card) == {
        "library_name": "merv",
        "pipeline_tag": "feature-extraction",
        "tags": ["merv", "video"],
    }
    assert f"Trained parts: {trained}. " in card
    assert f'MultiEncoder.from_pretrained("{REPO}")' in card


def test_code_in_the_card_compiles(model):
    for shared in (model, model.vision):
        card = shared.card(REPO, {"llm": "someone/llm"} if shared is model else None)
        compile(card.split("```python")[1].split("```")[0], "card", "exec")


def test_existing_card_is_kept(model, hub):
    hub.file_exists.return_value = True
    model.push_to_hub(REPO, sources={"llm": "someone/llm"})
    assert "README.md" not in hub.files


def test_given_card_replaces_the_existing_one(model, hub):
    hub.file_exists.return_value = True
    model.push_to_hub(REPO, sources={"llm": "someone/llm"}, card="# Mine")
    assert hub.files["README.md"] == "# Mine"


# Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route to host"), "ConnectionError: no route to host"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_error_of_the_hub_is_reported(model, hub, error, message):
    hub.create_repo.side_effect = error
    with pytest.raises(CheckpointError, match=f"{REPO}.*{message}"):
        model.push_to_hub(REPO, sources={"llm": "someone/llm"})


def test_missing_model_is_named(hub):
    with pytest.raises(WeightsError, match=r"someone/other.*HF_HUB_OFFLINE"):
        VideoLLM.from_pretrained("someone/other")


def test_incomplete_model_in_the_cache_is_an_error(model, llm, hub):
    model.push_to_hub(REPO, sources={"llm": "someone/llm"})
    (hub.cache / f"models--someone--sees/snapshots/{COMMIT}/model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        VideoLLM.from_pretrained(REPO, llm=llm)


def test_repository_without_a_model_is_an_error(hub, monkeypatch):
    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename="README.md")])
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo, revision, timeout: listing)
    with pytest.raises(WeightsError, match=r"someone/readme.*config\.json"):
        MultiEncoder.from_pretrained("someone/readme")


def test_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MultiEncoder(["fake"], grid=(4, 2, 2)).save_pretrained("someone/sees")
    assert MultiEncoder.from_pretrained("someone/sees").aligner.grid == (4, 2, 2)

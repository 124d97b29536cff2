"""Models on a hub: what is pushed is found again, says what it is, and names what others cannot find."""

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
    """A hub that takes what is pushed, with the signatures of HfApi; found again in the cache."""
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


# There and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("revision", [None, "trial"])
def test_what_is_pushed_is_loaded_by_name_and_by_commit(model, llm, hub, revision):
    info = model.push_to_hub(REPO, sources={"llm": "someone/llm"}, revision=revision)
    talk = user_message("What?", VIDEO, answer="cat")
    for name in (f"{REPO}@{revision}" if revision else REPO, f"{REPO}@{info.oid}"):
        again = VideoLLM.from_pretrained(name, llm=llm)
        assert torch.equal(model.log_probs([talk])[0], again.log_probs([talk])[0])
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md"}


def test_a_multi_encoder_is_pushed_and_loaded(hub):
    encoders = MultiEncoder(["fake"], grid=(4, 2, 2), output_dim=16).eval()
    encoders.push_to_hub(REPO)
    assert torch.equal(MultiEncoder.from_pretrained(REPO).eval()(VIDEO).tokens, encoders(VIDEO).tokens)


def test_a_language_model_that_is_brought_along_is_found_in_the_repository(model, llm, hub, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    config["llm"]["source"] = "llm"
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    shutil.copytree(llm, tmp_path / "whole/llm")
    cache_as_hub(hub.cache, REPO, COMMIT, str(tmp_path / "whole"))
    assert VideoLLM.from_pretrained(REPO).identity["source"].endswith(f"snapshots/{COMMIT}/llm")


def test_options_go_on_to_the_hub(model, hub):
    options = {"private": True, "commit_message": "Step 500", "create_pr": True, "revision": "trial"}
    model.push_to_hub(REPO, sources={"llm": "someone/llm"}, **options)
    assert hub.create_repo.call_args.kwargs == {"private": True, "exist_ok": True}
    assert hub.create_branch.call_args.kwargs == {"branch": "trial", "exist_ok": True}
    pushed = hub.upload_folder.call_args.kwargs
    assert (pushed["commit_message"], pushed["create_pr"], pushed["revision"]) == ("Step 500", True, "trial")


def test_no_branch_is_made_of_a_pull_request(model, hub):
    model.push_to_hub(REPO, sources={"llm": "someone/llm"}, revision="refs/pr/1")
    assert not hub.create_branch.called


# What others find ---------------------------------------------------------------------------


def test_a_part_that_nobody_else_could_find_is_named_before_anything_is_uploaded(model, llm, hub):
    with pytest.raises(CheckpointError, match=rf'find llm \({llm}\)\. .*sources={{"llm": "owner/name"}}'):
        model.push_to_hub(REPO)
    assert not hub.create_repo.called


def test_sources_say_where_parts_are_with_their_revision(model, hub):
    model.push_to_hub(REPO, sources={"llm": "someone/llm", "fake": f"someone/fake@{COMMIT}"})
    config = json.loads(hub.files["config.json"])
    fake = config["vision"]["encoders"]["fake"]["identity"]
    assert (config["llm"]["source"], fake["source"], fake["revision"]) == (
        "someone/llm",
        "someone/fake",
        COMMIT,
    )
    assert model.vision.encoder("fake").identity.source == "built-in"


def test_a_source_of_no_part_is_an_error(model, hub):
    with pytest.raises(CheckpointError, match=r"names 'lm', which is no part\. Did you mean 'llm'"):
        model.push_to_hub(REPO, sources={"lm": "someone/llm"})


# The card -----------------------------------------------------------------------------------


def test_the_card_says_what_is_known(model):
    card = model.card(REPO, {"llm": "someone/llm", "fake_video": f"someone/fake@{COMMIT}"})
    assert header(card) == {
        "library_name": "merv",
        "pipeline_tag": "video-text-to-text",
        "tags": ["merv", "video"],
        "base_model": ["someone/llm", "someone/fake"],
        "base_model_relation": "adapter",
    }
    sha256 = model.vision.encoder("fake_video").identity.sha256
    assert f"| `someone/fake@{COMMIT}` | `{sha256[:16]}…` | Apache-2.0 |" in card
    assert f'VideoLLM.from_pretrained("{REPO}")' in card
    assert "projector, mixer, lora. " in card
    assert "rank 2, alpha 16, on q_proj, v_proj" in card
    assert f"{sum(tensor.numel() for tensor in model.trainable_state_dict().values()):,} values" in card


def test_the_card_marks_what_is_not_known(model):
    card = model.card(REPO, {"llm": "someone/llm"})
    assert card.count("**to be filled in**") == 4
    assert "license" not in header(card)


def test_the_card_of_a_trained_language_model_says_so(model):
    model.train_only(["projector", "llm"])
    assert header(model.card(REPO, {"llm": "someone/llm"}))["base_model_relation"] == "finetune"


@pytest.mark.parametrize(("width", "said"), [(16, "Projectors and mixer."), (None, "Nothing.")])
def test_the_card_of_a_multi_encoder_names_no_language_model(width, said):
    card = MultiEncoder(["fake"], output_dim=width).card(REPO)
    assert header(card) == {
        "library_name": "merv",
        "pipeline_tag": "feature-extraction",
        "tags": ["merv", "video"],
    }
    assert said in card
    assert f'MultiEncoder.from_pretrained("{REPO}")' in card


def test_the_code_of_a_card_compiles(model):
    for shared in (model, model.vision):
        card = shared.card(REPO, {"llm": "someone/llm"} if shared is model else None)
        compile(card.split("```python")[1].split("```")[0], "card", "exec")


def test_a_card_that_is_there_already_is_left_alone(model, hub):
    hub.file_exists.return_value = True
    model.push_to_hub(REPO, sources={"llm": "someone/llm"})
    assert "README.md" not in hub.files


def test_a_card_of_ones_own_replaces_what_is_there(model, hub):
    hub.file_exists.return_value = True
    model.push_to_hub(REPO, sources={"llm": "someone/llm"}, card="# Mine")
    assert hub.files["README.md"] == "# Mine"


# What goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route to host"), "ConnectionError: no route to host"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_hub_that_refuses_is_told(model, hub, error, said):
    hub.create_repo.side_effect = error
    with pytest.raises(CheckpointError, match=f"{REPO} cannot be pushed to the hub: {said}"):
        model.push_to_hub(REPO, sources={"llm": "someone/llm"})


def test_a_model_that_is_nowhere_is_told(hub):
    with pytest.raises(
        WeightsError,
        match=r"someone/other could not be downloaded.*HF_HUB_OFFLINE is set.*There is no folder of that",
    ):
        VideoLLM.from_pretrained("someone/other")


def test_half_of_a_model_in_the_cache_is_not_loaded(model, llm, hub):
    model.push_to_hub(REPO, sources={"llm": "someone/llm"})
    (hub.cache / f"models--someone--sees/snapshots/{COMMIT}/model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"Nor is model\.safetensors in the cache"):
        VideoLLM.from_pretrained(REPO, llm=llm)


def test_a_repository_of_something_else_is_told(hub, monkeypatch):
    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename="README.md")])
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo, revision, timeout: listing)
    with pytest.raises(WeightsError, match=r"is on the hub, but has no config\.json: it is no model of merv"):
        MultiEncoder.from_pretrained("someone/readme")


def test_a_folder_goes_before_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MultiEncoder(["fake"], grid=(4, 2, 2)).save_pretrained("someone/sees")
    assert MultiEncoder.from_pretrained("someone/sees").aligner.grid == (4, 2, 2)

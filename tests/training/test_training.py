"""The LightningModule, and every recipe with tiny parts."""

import json
import re

import pytest
import torch
from lightning import Trainer
from PIL import Image

from merv.cli.fit import NOISE
from merv.cli.main import main
from merv.data.module import ChatData
from merv.errors import TrainingError
from merv.features.store import FeatureStore
from merv.models.llm import LoraOptions
from merv.models.video_llm import VideoLLM
from merv.testing import make_video, tiny_llm
from merv.training.module import Training, save
from merv.training.recipes import recipes, with_recipes
from merv.utils.plot import draw_clip, draw_loss
from merv.video.clip import prepare

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{re.escape(text)}.*") for text in NOISE]


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny LLM, a video, an image, and questions about them."""
    tiny_llm(tmp_path / "llm")
    make_video(tmp_path / "0.mp4", frames=4)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "1.png")
    rows = []
    for number, name in enumerate(("0.mp4", "1.png")):
        rows.append(
            {
                "video": name,
                "questions": [{"question": "Who?", "answer": "ab"[number], "kind": "who"}],
            }
        )
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def training(folder, **options) -> Training:
    return Training(str(folder / "llm"), ["fake", "fake/video"], grid=(2, 1, 1), lr=3e-2, **options)


def trainer(folder, **options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        **{
            **quiet,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "default_root_dir": folder,
            **options,
        }
    )


def test_training_learns_to_distinguish_two_videos(folder):
    module = training(folder, trainable=["projector", "mixer", "llm"], lr_overrides={"llm": 3e-3})
    data = ChatData(str(folder / "data.jsonl"), str(folder / "data.jsonl"), batch_size=2)
    fit = trainer(folder, max_steps=60, check_val_every_n_epoch=60, num_sanity_val_steps=0)
    fit.fit(module, data)
    assert fit.callback_metrics["loss"] < 0.1
    assert fit.callback_metrics["val/exact_match"] == 1
    again = VideoLLM.from_pretrained(save(module, folder / "model"))
    assert again.exact_match([sample.conversations for sample in data.val]) == [[True], [True]]


def test_only_trained_parts_change(folder):
    module = training(folder)
    module.configure_model()
    before = {name: p.clone() for name, p in module.named_parameters()}
    data = ChatData(str(folder / "data.jsonl"), batch_size=2)
    trainer(folder, max_steps=2).fit(module, data)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".fusion." in name for name in changed)


def test_frozen_parts_stay_in_eval_mode(folder):
    module = training(folder)
    module.configure_model()
    module.train()
    assert not module.model.llm.training
    assert not any(
        m.training for m in module.model.vision.encoders.modules() if m is not module.model.vision.encoders
    )
    assert module.model.vision.fusion.training


def test_videos_are_encoded_once(folder, monkeypatch):
    module, read = training(folder, feature_store="memory"), []

    def count(video, *args, **options):
        read.append(video)
        return prepare(video, *args, **options)

    monkeypatch.setattr("merv.features.reader.prepare", count)
    trainer(folder, max_epochs=3).fit(module, ChatData(str(folder / "data.jsonl"), batch_size=1))
    assert len(read) == 2


def test_state_dict_holds_only_trained_parameters_and_loads(folder):
    module = training(folder, feature_store="memory")
    module.configure_model()
    state = module.state_dict()
    assert state
    assert all(".fusion." in name for name in state)
    again = training(folder)
    again.configure_model()
    again.load_state_dict(state)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    state.pop(next(iter(state)))
    with pytest.raises(TrainingError, match=r"vision\.fusion"):
        again.load_state_dict(state)


def test_run_resumes_from_a_checkpoint_of_lightning(folder):
    data = ChatData(str(folder / "data.jsonl"), batch_size=2)
    parts = {"trainable": ["projector", "mixer", "lora"], "lora": LoraOptions(r=2)}
    whole = training(folder, **parts)
    torch.manual_seed(0)
    trainer(folder, max_steps=2).fit(whole, data)
    half = training(folder, **parts)
    torch.manual_seed(0)
    first = trainer(folder, max_steps=2)
    first.fit(half, data)
    first.save_checkpoint(folder / "half.ckpt")
    again = training(folder, **parts)
    trainer(folder, max_steps=2).fit(again, data, ckpt_path=folder / "half.ckpt", weights_only=True)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in half.state_dict().items())
    assert {name for name in half.state_dict()} == set(whole.state_dict())


def test_folder_that_blocks_saving_is_found_before_training(folder, monkeypatch, capsys):
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(Training, "training_step", None)
    options = [
        f"--model.llm={folder / 'llm'}",
        "--model.encoders=[fake]",
        f"--data.train={folder / 'data.jsonl'}",
    ]
    fit = [
        "fit",
        *options,
        f"--trainer.default_root_dir={folder}",
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    assert main(fit) == 2
    assert str(folder / "model") in capsys.readouterr().err


def test_weight_decay_applies_only_to_matrices(folder):
    module = training(folder, weight_decay=0.1, lr_overrides={"mixer": 1e-5})
    module.configure_model()
    groups = module.parameter_groups()
    assert {(p.ndim > 1, group["weight_decay"]) for group in groups for p in group["params"]} == {
        (True, 0.1),
        (False, 0.0),
    }
    assert {group["lr"] for group in groups} == {3e-2, 1e-5}


def test_tokens_start_at_the_scale_of_the_embeddings(folder):
    module = training(folder)
    module.configure_model()
    scale = module.model.llm.get_input_embeddings().weight.square().mean().sqrt()
    tokens = module.model.vision(str(folder / "0.mp4")).tokens
    assert 0.5 < tokens.square().mean().sqrt() / scale < 2


def test_training_the_llm_in_bf16_is_an_error(folder):
    with pytest.raises(TrainingError, match="fp32"):
        training(folder, trainable=["projector", "llm"], dtype="bf16").configure_model()


def test_schedule_without_an_end_is_an_error(folder):
    module, data = training(folder), ChatData(str(folder / "data.jsonl"))
    with pytest.raises(TrainingError, match=r"trainer\.max_steps"):
        trainer(folder, max_epochs=-1).fit(module, data)


def tiny(folder, out, **more) -> list[str]:
    """Options that replace the large parts of a recipe by tiny ones and leave the rest unchanged."""
    options = {
        "model.llm": folder / "llm",
        "model.encoders": "[fake]",
        "model.num_frames": "null",
        "model.feature_store": "null",
        "model.quantize": "null",
        "data.train": folder / "data.jsonl",
        "data.val": "null",
        "data.num_workers": 0,
        "trainer.max_steps": 2,
        "trainer.accumulate_grad_batches": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.default_root_dir": out,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        **more,
    }
    return [f"--{key}={value}" for key, value in options.items()]


def earlier_stage(folder, name) -> dict:
    """Train the stage that a recipe starts from; return the options for it."""
    more = {}
    if "init_from:" in recipes()[name].read_text():
        first = "merv/full_stage1" if name == "merv/full_stage2" else "merv/lora"
        assert main(["fit", "--config", first, *tiny(folder, folder / "first")]) == 0
        more["model.init_from"] = folder / "first/model"
    if name == "merv/add_encoder":
        more["model.encoders"] = "[fake,fake/video]"
        more["model.trainable"] = "[projector.fake_video,mixer.fake_video]"
    return more


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_trains_with_tiny_parts(folder, name, capsys):
    more = earlier_stage(folder, name)
    assert main(["fit", "--config", name, *tiny(folder, folder / "run", **more)]) == 0
    assert (folder / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "merv ask VIDEO QUESTION --model" in capsys.readouterr().out
    assert main(["ask", str(folder / "0.mp4"), "Who?", "--model", str(folder / "run/model")]) == 0


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_trains_from_a_store_bit_for_bit(folder, name):
    more = earlier_stage(folder, name) | {"trainer.precision": "32-true"}
    store = {"model.feature_store": folder / "store"}
    assert main(["fit", "--config", name, *tiny(folder, folder / "run", **more)]) == 0
    assert main(["fit", "--config", name, *tiny(folder, folder / "stored", **more, **store)]) == 0
    num_encoders = 2 if name == "merv/add_encoder" else 1
    assert len(FeatureStore(folder / "store", read_only=True)) == 2 * num_encoders
    trained = [file for file in (folder / "run/model").rglob("*.safetensors") if file.is_file()]
    assert trained
    for file in trained:
        assert file.read_bytes() == (folder / "stored" / file.relative_to(folder / "run")).read_bytes()


def test_every_recipe_has_a_complete_header():
    assert recipes()
    for name, path in recipes().items():
        head = path.read_text().partition("trainer:")[0]
        assert head.startswith(f"# merv fit --config {name}")
        assert "Hardware:" in head
        assert re.search(r"# Planned: [\d.]+ GB per GPU, \d+ h for|[\d.]+ minutes", head)
        assert re.search("# (Result|Expected|Reported)", head)


def test_misspelled_recipe_suggests_the_nearest():
    with pytest.raises(TrainingError, match="'demo'"):
        with_recipes(["--config", "dem"])


def test_name_of_a_recipe_is_replaced_by_its_path():
    assert with_recipes(["--config=demo"]) == [f"--config={recipes()['demo']}"]


def test_plots_are_drawn(tmp_path):
    draw_loss([(step, 1 / (step + 1)) for step in range(50)], tmp_path / "loss.png")
    pictures = [torch.zeros(16, 24, 3, dtype=torch.uint8).numpy()] * 3
    weights = torch.tensor([[0.2, 0.8], [0.8, 0.2]])
    draw_clip(
        pictures,
        [0.5, 1.5, 2.5],
        weights,
        [0.75, 2.25],
        ["a", "b"],
        [("Who?", "cat", "dog")],
        tmp_path / "clip.png",
    )
    draw_clip(pictures, [0.5, 1.5, 2.5], None, [], ["a"], [("Who?", "cat", "cat")], tmp_path / "plain.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("loss.png", "clip.png", "plain.png"))

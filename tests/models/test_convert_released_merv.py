"""`merv convert`: checkpoints in the layout of the released MERV, against its forward pass in plain torch."""

import json
from pathlib import Path

import pytest
import torch
from official import Official, config_of, grown, write
from transformers import AutoTokenizer

from merv.cli.main import main
from merv.errors import CheckpointError, WeightsError
from merv.models.chat import render, user_message
from merv.models.convert_released_merv import convert
from merv.models.released_merv import read_config
from merv.models.video_llm import VideoLLM
from merv.testing import make_video, tiny_llm
from merv.types import VideoInfo
from merv.video.sampling import Sampling, official_indices

TWO = config_of(["fake", "fake-video"], [16, 32], 16)
QUESTION = "What moves?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base language model, a clip of 50 frames, and a converted model of two encoders."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    tiny_llm(folder / "base", chat_template=True)  # which the release does not use for this model
    make_video(folder / "clip.mp4", frames=50)
    official = official_model(folder)
    write(folder / "two", official.state(), TWO, optimizer={"state": {}}, lr_scheduler={}, step=7)
    lines: list[str] = []
    convert_in(folder, "two", say=lines.append)
    return folder, official, lines


def official_model(folder, widths=(8, 12), **options) -> Official:
    llm, tokenizer = tiny_llm()
    return Official(grown(llm, len(tokenizer)), list(widths), **options)


def convert_in(folder, name, **options) -> Path:
    out = folder / f"{name}_converted"
    options = {"llm": folder / "base", **options}
    convert(folder / name / "latest-checkpoint.pt", folder / name / "config.json", out, **options)
    return out


def logits_of(model: VideoLLM, clip: Path) -> torch.Tensor:
    with torch.no_grad():
        packed, visual = model.prepare([[user_message(QUESTION, str(clip))]])
        return model.logits(packed, visual.tokens, torch.arange(packed.mask.shape[-1]))


def expected(official: Official, model: VideoLLM, clip: Path) -> torch.Tensor:
    """Of the encoders' own features, before they are aligned."""
    grids = model.vision.encode([model.vision.read(str(clip))])
    ids = model.tokenizer(f"In: {QUESTION}\nOut:").input_ids
    return official([own[0].values for own in grids.values()], ids)


# What comes out -----------------------------------------------------------------------------


def test_logits_are_those_of_the_release(place):
    folder, official, _ = place
    model = VideoLLM.from_pretrained(folder / "two_converted")
    ours = logits_of(model, folder / "clip.mp4")
    assert torch.allclose(ours, expected(official, model, folder / "clip.mp4"), atol=1e-4)
    torch.nn.init.normal_(model.fusion.mixer.query)
    assert not torch.allclose(ours, logits_of(model, folder / "clip.mp4"), atol=1e-4)


@pytest.mark.parametrize("older", ["adapter", "projector", "packed", "mlp"])
def test_other_forms_of_the_file_give_the_logits_of_the_release(place, tmp_path, older):
    folder, *_ = place
    alone = older == "projector"
    config = config_of(["fake"], [16], 16) if alone else TWO
    if older == "mlp":
        config = config_of(["fake", "fake-video"], [16, 32], 16, arch_specifier="3davg+gelu-mlp")
    official = official_model(
        folder, (8,) if alone else (8, 12), hidden=32 if older == "packed" else 48, mlp=older == "mlp"
    )
    state = official.state()
    if older == "adapter":
        state["adapter"] = state.pop("feature_fusion")
    if alone:
        state["projector"] = {name.removeprefix("0."): t for name, t in state.pop("projectors").items()}
    assert ("attention.in_proj_weight" in state.get("feature_fusion", ())) == (older == "packed")
    write(tmp_path / "older", state, config)
    model = VideoLLM.from_pretrained(convert_in(tmp_path, "older", llm=folder / "base"))
    ours = logits_of(model, folder / "clip.mp4")
    assert torch.allclose(ours, expected(official, model, folder / "clip.mp4"), atol=1e-4)


def test_frames_are_those_that_the_release_takes(place):
    folder, *_ = place
    model = VideoLLM.from_pretrained(folder / "two_converted")
    clip = model.vision.read(str(folder / "clip.mp4"))
    times = {name: (frames.times_s[0] * 8).round().long().tolist() for name, frames in clip.frames.items()}
    assert times == {"fake": official_indices(50, 16), "fake_video": official_indices(50, 32)}


def test_an_encoder_alone_reads_as_many_frames_as_it_takes():
    info = VideoInfo("clip", 100.0, times_s=tuple(range(100)), width=8, height=8)
    alone = Sampling("official", total=16).times(info, 16)
    assert alone[-1] == 99.0
    assert alone != Sampling("official").times(info, 16)


def test_ask_answers_from_the_converted_folder(place, capsys):
    folder, *_ = place
    typed = [str(folder / "clip.mp4"), QUESTION, "--model", str(folder / "two_converted"), "--weights"]
    assert main(["ask", *typed, "--max-new-tokens", "4"]) == 0
    assert "weights: fake " in capsys.readouterr().out


def test_the_converted_folder_can_be_moved_and_replaced(place, tmp_path):
    folder, *_ = place
    out = convert_in(folder, "two").rename(tmp_path / "moved")
    assert VideoLLM.from_pretrained(out).identity["source"] == str(tmp_path / "moved" / "llm")
    convert_in(folder, "two")
    assert convert_in(folder, "two").is_dir()
    assert not list(folder.glob(".*"))


def test_the_tokenizer_has_the_added_token_and_no_chat_template(place):
    folder, *_ = place
    tokenizer = AutoTokenizer.from_pretrained(folder / "two_converted" / "llm")
    model = VideoLLM.from_pretrained(folder / "two_converted")
    assert (tokenizer.pad_token, tokenizer.chat_template) == ("<PAD>", None)
    assert model.llm.get_input_embeddings().num_embeddings == 320  # 263 tokens, up to a multiple of 64
    first, visual, rest = render(user_message(QUESTION, "clip"), tokenizer).pieces
    assert tokenizer.decode(first) == "<s>"
    assert visual.source == "clip"
    assert tokenizer.decode(rest) == f"In: {QUESTION}\nOut:"


def test_what_is_left_out_is_told(place):
    *_, lines = place
    text = "\n".join(lines)
    for part in (
        "optimizer",
        "lr_scheduler",
        "step",
        "v_proj_weight",
        "out_proj.weight",
        "out_proj.bias",
        "keys",
    ):
        assert part in text
    assert len(lines) == 7


def test_shards_hold_the_same_language_model(place, tmp_path):
    folder, official, _ = place
    write(tmp_path / "two", official.state(), TWO)
    out = convert_in(tmp_path, "two", llm=folder / "base", shard_bytes=40_000)
    assert len(list((out / "llm").glob("model-0*.safetensors"))) > 2
    assert len({file.stat().st_mode for file in (out / "llm").iterdir()}) == 1  # none its owner's alone
    whole = VideoLLM.from_pretrained(folder / "two_converted")
    assert VideoLLM.from_pretrained(out).identity["fingerprint"] == whole.identity["fingerprint"]


def test_a_tied_head_is_kept_once_and_must_be_the_embeddings(place, tmp_path):
    folder, official, _ = place
    base = tmp_path / "base"
    base.mkdir()
    for file in (folder / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    state = official.state()
    write(tmp_path / "tied", state, TWO)
    with pytest.raises(CheckpointError, match=r"its own lm_head\.weight"):
        convert_in(tmp_path, "tied")
    llm = dict(state["llm_backbone"])
    llm["llm.lm_head.weight"] = llm["llm.model.embed_tokens.weight"].clone()
    llm["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(tmp_path / "tied", {**state, "llm_backbone": llm}, TWO)
    lines: list[str] = []
    model = VideoLLM.from_pretrained(convert_in(tmp_path, "tied", say=lines.append))
    assert model.llm.lm_head.weight is model.llm.get_input_embeddings().weight
    assert any("inv_freq" in line for line in lines)


# What is refused ----------------------------------------------------------------------------


def refuse(place, tmp_path, config=TWO, match="", error=CheckpointError, beside=None, llm=None, **changed):
    """Conversion fails with `match` in the message, and leaves nothing behind."""
    folder, official, _ = place
    state = official.state()
    for name, value in changed.items():
        state[name] = value(dict(state[name])) if callable(value) else value
    write(tmp_path / "bad", {k: v for k, v in state.items() if v is not None}, config, **(beside or {}))
    with pytest.raises(error, match=match):
        convert_in(tmp_path, "bad", llm=llm or folder / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


NEW = torch.ones(1)


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        (r"not known: model\.more", {"more": {"a": NEW}}),
        (r"not known: ema", {"beside": {"ema": {}}}),
        (r"feature_fusion .*pe not known", {"feature_fusion": lambda own: {**own, "pe": NEW}}),
        (r"feature_fusion .*Q missing", {"feature_fusion": lambda own: own.pop("Q") is None or own}),
        (r"2\.projector\.x not known", {"projectors": lambda own: {**own, "2.projector.x": NEW}}),
        (
            r"4 of another shape \(projectors\.fake",
            {"projectors": lambda own: {n: t[:2] for n, t in own.items()}},
        ),
        (r"lacks projectors", {"projectors": None}),
        (r"lacks llm_backbone", {"llm_backbone": None}),
        (r"both feature_fusion and adapter", {"adapter": {"Q": NEW}}),
        (r"llm_backbone\.lora", {"llm_backbone": lambda own: {**own, "lora": NEW}}),
        (r"model\.more not known", {"llm_backbone": lambda own: {**own, "llm.model.more": NEW}}),
        (
            r"embed_tokens\.weight \[256, 32\], wanted \[320, 32\]",
            {"llm_backbone": lambda own: {n: t[:256] if "embed" in n else t for n, t in own.items()}},
        ),
    ],
)
def test_tensors_that_are_not_known_are_refused_by_name(place, tmp_path, what, changed):
    refuse(place, tmp_path, match=what, **changed)


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("has crop_size", {"crop_size": 3}),
        ("'vivit-google-b-all-no-cls'", {"video_backbone_ids": ["fake", "vivit-google-b-all-no-cls"]}),
        ("distinct video_backbone_ids", {"video_backbone_ids": ["fake", "fake"]}),
        ("a num_frames each", {"num_frames": [16]}),
        ("divisors of 32", {"num_frames": [12, 32]}),
        ("'no-align\\+attntv\\+linear'", {"arch_specifier": "no-align+attntv+linear"}),
        ("'3davg\\+fused-gelu-mlp'", {"arch_specifier": "3davg+fused-gelu-mlp"}),
        ("'scalar' is not known", {"feature_fusion": "scalar"}),
        ("None with 2 encoders", {"feature_fusion": None}),
        ("'llama2-7b' is not known. Did you mean", {"llm_backbone_id": "llama2-7b"}),
        ("end answers with the letters </s>", {"llm_backbone_id": "llama3-8b-pure"}),
        ("'letterbox'", {"image_resize_strategy": "letterbox"}),
        ("wanted a square", {"projector_token_length": 5}),
        ("wanted a square, equal steps", {"num_frames": [16, 16]}),
        ("visual_feature_length 8", {"visual_feature_length": 8}),
    ],
)
def test_configurations_that_are_not_known_are_refused_by_name(what, changed):
    with pytest.raises(CheckpointError, match=what):
        read_config({"model": {**TWO["model"], **changed}})


def test_a_configuration_that_lacks_something_is_refused_by_name():
    with pytest.raises(CheckpointError, match="lacks num_frames"):
        read_config({"model": {name: value for name, value in TWO["model"].items() if name != "num_frames"}})
    with pytest.raises(CheckpointError, match="no 'model'"):
        read_config({"trainer": {}})


def test_an_encoder_that_cannot_be_had_is_told_with_what_to_type(place, tmp_path):
    config = config_of(["fake", "dinov2-video-all-tokens"], [16, 16], 16)
    refuse(place, tmp_path, config, "--encoder dinov2=FOLDER", WeightsError)


def test_a_language_model_that_cannot_be_had_is_told_with_what_to_type(place, tmp_path):
    refuse(place, tmp_path, match="--llm FOLDER", error=WeightsError, llm=tmp_path / "nowhere")


def test_an_encoder_that_the_model_has_not_is_refused(place, tmp_path):
    folder, official, _ = place
    write(tmp_path / "two", official.state(), TWO)
    with pytest.raises(WeightsError, match="names siglip; this model has fake, fake_video"):
        convert_in(tmp_path, "two", llm=folder / "base", encoders={"siglip": "/folder"})


@pytest.mark.parametrize("written", [b"no checkpoint", None, [1], {"weights": {}}])
def test_files_that_are_no_checkpoint_are_refused(place, tmp_path, written):
    folder, *_ = place
    path, config = tmp_path / "latest.pt", folder / "two" / "config.json"
    if isinstance(written, bytes):
        path.write_bytes(written)
    elif written is not None:
        torch.save(written, path)
    with pytest.raises(CheckpointError, match=r"latest\.pt (cannot be read|holds)"):
        convert(path, config, tmp_path / "out", llm=folder / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_configuration_is_refused(place, tmp_path, text):
    folder, *_ = place
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(folder / "two" / "latest-checkpoint.pt", tmp_path / "config.json", tmp_path / "out")


def test_a_folder_that_is_not_ours_is_left_as_it_is(place, tmp_path, capsys):
    folder, *_ = place
    (tmp_path / "thesis.tex").write_text("years of work")
    typed = [str(folder / "two" / "latest-checkpoint.pt"), str(tmp_path)]
    assert main(["convert", *typed, "--config", str(folder / "two" / "config.json")]) == 2
    assert "is left as it is" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_command_says_what_it_left_out_and_what_to_type_next(place, tmp_path, capsys):
    folder, *_ = place
    typed = [str(folder / "two" / "latest-checkpoint.pt"), str(tmp_path / "out")]
    options = ["--config", str(folder / "two" / "config.json"), "--llm", str(folder / "base")]
    assert main(["convert", *typed, *options, "--encoder", "fake=built-in"]) == 0
    out = capsys.readouterr().out
    assert "left out optimizer" in out
    assert "merv ask CLIP" in out

"""`merv convert`: compare converted checkpoints with the forward pass of the released MERV in plain torch."""

import json
from pathlib import Path

import pytest
import torch
from llama_tokenizer import write_llama_tokenizer
from original import OriginalMERV, config_of, grown, write
from transformers import AutoTokenizer

from merv.cli.main import main
from merv.errors import CheckpointError, WeightsError
from merv.models.chat import user_message
from merv.models.chat_template import ChatTemplate
from merv.models.convert_released_merv import convert
from merv.models.llm import load_tokenizer
from merv.models.released_merv import read_config
from merv.models.video_llm import VideoLLM
from merv.testing import make_video, tiny_llm
from merv.types import VideoInfo
from merv.video.sampling import Sampling, released_indices

TWO = config_of(["fake", "fake-video"], [16, 32], 16)
QUESTION = "What moves?"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Return a folder with base LLM, clip and converted model; the original model; and what was left out."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    tiny_llm(folder / "base", chat_template=True)  # the release does not use the chat template of this model
    make_video(folder / "clip.mp4", frames=50)
    original = original_model(folder)
    write(folder / "two", original.state(), TWO, optimizer={"state": {}}, lr_scheduler={}, step=7)
    return folder, original, convert_in(folder, "two")[1]


def original_model(folder, widths=(8, 12), **options) -> OriginalMERV:
    llm, tokenizer = tiny_llm()
    return OriginalMERV(grown(llm, len(tokenizer)), list(widths), **options)


def convert_in(folder, name, **options) -> tuple[Path, dict[str, str]]:
    """Return the folder of the converted model, and what was left out."""
    out = folder / f"{name}_converted"
    options = {"llm": folder / "base", **options}
    checkpoint = folder / name / "latest-checkpoint.pt"
    return out, convert(checkpoint, folder / name / "config.json", out, **options)


def logits_of(model: VideoLLM, clip: Path) -> torch.Tensor:
    with torch.no_grad():
        packed, visual = model.prepare([[model.chat.generation_prompt(user_message(QUESTION, str(clip)))]])
        return model.logits(packed, visual.tokens, torch.arange(packed.mask.shape[-1]))


def expected(original: OriginalMERV, model: VideoLLM, clip: Path) -> torch.Tensor:
    """Return the logits of the released model on the unaligned features of the encoders."""
    grids = model.vision.encode([model.vision.read(str(clip))])
    ids = model.tokenizer(f"In: {QUESTION}\nOut:").input_ids
    return original([features[0].values for features in grids.values()], ids)


# Converted models ---------------------------------------------------------------------------


def test_every_file_of_a_converted_model_has_a_digest(released):
    out = released[0] / "two_converted"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"llm/config.json", "llm/tokenizer.json"} < files
    assert set(json.loads((out / "config.json").read_text())["sha256"]) == files - {"config.json"}
    VideoLLM.from_pretrained(out, verify=True)


def test_logits_equal_those_of_the_release(released):
    folder, original, _ = released
    model = VideoLLM.from_pretrained(folder / "two_converted")
    ours = logits_of(model, folder / "clip.mp4")
    assert torch.allclose(ours, expected(original, model, folder / "clip.mp4"), atol=1e-4)
    torch.nn.init.normal_(model.fusion.mixer.query)
    assert not torch.allclose(ours, logits_of(model, folder / "clip.mp4"), atol=1e-4)


@pytest.mark.parametrize("variant", ["adapter", "projector", "packed", "mlp"])
def test_older_formats_give_the_logits_of_the_release(released, tmp_path, variant):
    folder, *_ = released
    single = variant == "projector"
    config = config_of(["fake"], [16], 16) if single else TWO
    if variant == "mlp":
        config = config_of(["fake", "fake-video"], [16, 32], 16, arch_specifier="3davg+gelu-mlp")
    original = original_model(
        folder, (8,) if single else (8, 12), hidden=32 if variant == "packed" else 48, mlp=variant == "mlp"
    )
    state = original.state()
    if variant == "adapter":
        state["adapter"] = state.pop("feature_fusion")
    if single:
        state["projector"] = {name.removeprefix("0."): t for name, t in state.pop("projectors").items()}
    assert ("attention.in_proj_weight" in state.get("feature_fusion", ())) == (variant == "packed")
    write(tmp_path / "older", state, config)
    model = VideoLLM.from_pretrained(convert_in(tmp_path, "older", llm=folder / "base")[0])
    ours = logits_of(model, folder / "clip.mp4")
    assert torch.allclose(ours, expected(original, model, folder / "clip.mp4"), atol=1e-4)


def test_frames_are_those_of_the_release(released):
    folder, *_ = released
    model = VideoLLM.from_pretrained(folder / "two_converted")
    clip = model.vision.read(str(folder / "clip.mp4"))
    times = {name: (frames.times_s[0] * 8).round().long().tolist() for name, frames in clip.frames.items()}
    assert times == {"fake": released_indices(50, 16), "fake_video": released_indices(50, 32)}


def test_total_limits_the_frames_of_a_single_encoder():
    info = VideoInfo("clip", 100.0, times_s=tuple(range(100)), width=8, height=8)
    times_s = Sampling("released", total=16).times(info, 16)
    assert times_s[-1] == 99.0
    assert times_s != Sampling("released").times(info, 16)


def test_ask_uses_a_converted_folder(released, capsys):
    folder, *_ = released
    model = str(folder / "two_converted")
    arguments = [str(folder / "clip.mp4"), QUESTION, "--model", model, "--mix-weights"]
    assert main(["ask", *arguments, "--max-new-tokens", "4"]) == 0
    assert "weights: fake " in capsys.readouterr().out


def test_converted_folder_can_be_moved_and_replaced(released, tmp_path):
    folder, *_ = released
    out = convert_in(folder, "two")[0].rename(tmp_path / "moved")
    assert VideoLLM.from_pretrained(out).llm_identity["source"] == str(tmp_path / "moved" / "llm")
    convert_in(folder, "two")
    assert convert_in(folder, "two")[0].is_dir()
    assert not list(folder.glob(".*"))


def test_tokenizer_has_the_added_token_and_no_chat_template(released):
    folder, *_ = released
    tokenizer = AutoTokenizer.from_pretrained(folder / "two_converted" / "llm")
    model = VideoLLM.from_pretrained(folder / "two_converted")
    assert (tokenizer.pad_token, tokenizer.chat_template) == ("<PAD>", None)
    assert model.llm.get_input_embeddings().num_embeddings == 320  # 263 tokens, padded to a multiple of 64
    bos, visual, *rest = ChatTemplate(tokenizer).generation_prompt(user_message(QUESTION, "clip")).items
    assert tokenizer.decode(bos) == "<s>"
    assert visual.source == "clip"
    assert tokenizer.decode(rest) == f"In: {QUESTION}\nOut:"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return the tokenizer in the file of a base LLM like Llama 2, and the folder of a converted model."""
    folder = tmp_path_factory.mktemp("llama")
    llm, _ = tiny_llm(folder / "base")
    file = write_llama_tokenizer(folder / "base")
    original = OriginalMERV(grown(llm, file.get_vocab_size()), [8, 12])
    write(folder / "two", original.state(), TWO)
    return file, convert_in(folder, "two", llm=folder / "base")[0]


TURNS = "In: a\nOut: b</s>In: c\nOut: d</s>In: a b?\nOut:"


@pytest.mark.parametrize("load", [load_tokenizer, AutoTokenizer.from_pretrained])
def test_saved_tokenizer_gives_the_ids_of_its_original_file(llama, load):
    file, folder = llama
    tokenizer = load(folder / "llm")
    expected = file.encode(TURNS, add_special_tokens=False)
    assert tokenizer(TURNS, add_special_tokens=False).input_ids == expected.ids
    assert expected.tokens.count("▁In") == 3
    assert tokenizer.decode(expected.ids) == file.decode(expected.ids, skip_special_tokens=False)
    assert tokenizer("In: a").input_ids == file.encode("In: a").ids


def test_turns_of_a_converted_model_have_the_ids_of_the_original_tokenizer(llama):
    file, folder = llama
    roles = ["user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, "abcd", strict=True)]
    (prompt,) = VideoLLM.from_pretrained(folder).chat.training_prompts(turns)
    text = "<s>In: a\nOut: b</s>In: c\nOut: d</s>"
    assert prompt.items == file.encode(text, add_special_tokens=False).ids


def test_what_is_left_out_is_listed(released):
    *_, left_out = released
    text = "\n".join(left_out)
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
    assert len(left_out) == 7


def test_shards_hold_the_same_language_model(released, tmp_path):
    folder, original, _ = released
    write(tmp_path / "two", original.state(), TWO)
    out, _ = convert_in(tmp_path, "two", llm=folder / "base", shard_bytes=40_000)
    assert len(list((out / "llm").glob("model-0*.safetensors"))) > 2
    assert (
        len({file.stat().st_mode for file in (out / "llm").iterdir()}) == 1
    )  # none that only its owner can read
    whole = VideoLLM.from_pretrained(folder / "two_converted")
    assert VideoLLM.from_pretrained(out).llm_identity["sha256"] == whole.llm_identity["sha256"]


def test_tied_head_is_saved_once_and_must_equal_the_embeddings(released, tmp_path):
    folder, original, _ = released
    base = tmp_path / "base"
    base.mkdir()
    for file in (folder / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    state = original.state()
    write(tmp_path / "tied", state, TWO)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        convert_in(tmp_path, "tied")
    llm = dict(state["llm_backbone"])
    llm["llm.lm_head.weight"] = llm["llm.model.embed_tokens.weight"].clone()
    llm["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(tmp_path / "tied", {**state, "llm_backbone": llm}, TWO)
    out, left_out = convert_in(tmp_path, "tied")
    model = VideoLLM.from_pretrained(out)
    assert model.llm.lm_head.weight is model.llm.get_input_embeddings().weight
    assert any("inv_freq" in name for name in left_out)


# Unsupported checkpoints --------------------------------------------------------------------


def check_rejected(
    released, tmp_path, config=TWO, match="", error=CheckpointError, other_entries=None, llm=None, **changed
):
    """Check that the conversion fails with `match` in the message and leaves no files."""
    folder, original, _ = released
    state = original.state()
    for name, value in changed.items():
        state[name] = value(dict(state[name])) if callable(value) else value
    write(
        tmp_path / "bad", {k: v for k, v in state.items() if v is not None}, config, **(other_entries or {})
    )
    with pytest.raises(error, match=match):
        convert_in(tmp_path, "bad", llm=llm or folder / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


NEW = torch.ones(1)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        (r"unexpected \(more\.a\)", {"more": {"a": NEW}}),
        ("ema", {"other_entries": {"ema": {}}}),
        (r"unexpected \(feature_fusion\.pe\)", {"feature_fusion": lambda tensors: {**tensors, "pe": NEW}}),
        (
            r"missing \(mixer\.query\)",
            {"feature_fusion": lambda tensors: tensors.pop("Q") is None or tensors},
        ),
        (
            r"unexpected \(projectors\.2\.projector\.x\)",
            {"projectors": lambda tensors: {**tensors, "2.projector.x": NEW}},
        ),
        (
            r"projectors\.fake",
            {"projectors": lambda tensors: {n: t[:2] for n, t in tensors.items()}},
        ),
        ("projectors", {"projectors": None}),
        ("llm_backbone", {"llm_backbone": None}),
        ("feature_fusion and adapter", {"adapter": {"Q": NEW}}),
        (r"llm_backbone\.lora", {"llm_backbone": lambda tensors: {**tensors, "lora": NEW}}),
        (r"unexpected \(model\.more\)", {"llm_backbone": lambda tensors: {**tensors, "llm.model.more": NEW}}),
        (
            r"embed_tokens\.weight .*\[256, 32\].*\[320, 32\]",
            {"llm_backbone": lambda tensors: {n: t[:256] if "embed" in n else t for n, t in tensors.items()}},
        ),
    ],
)
def test_unknown_tensors_are_rejected_by_name(released, tmp_path, name, changed):
    check_rejected(released, tmp_path, match=name, **changed)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("crop_size", {"crop_size": 3}),
        ("'vivit-google-b-all-no-cls'", {"video_backbone_ids": ["fake", "vivit-google-b-all-no-cls"]}),
        ("video_backbone_ids", {"video_backbone_ids": ["fake", "fake"]}),
        (r"\[16\]", {"num_frames": [16]}),
        (r"\[12, 32\]", {"num_frames": [12, 32]}),
        ("'no-align\\+attntv\\+linear'", {"arch_specifier": "no-align+attntv+linear"}),
        ("'3davg\\+fused-gelu-mlp'", {"arch_specifier": "3davg+fused-gelu-mlp"}),
        ("'scalar'", {"feature_fusion": "scalar"}),
        ("None with 2 encoders", {"feature_fusion": None}),
        (r"'llama2-7b'.*'llama2-7b-pure'", {"llm_backbone_id": "llama2-7b"}),
        ("llama3-8b-pure", {"llm_backbone_id": "llama3-8b-pure"}),
        ("'letterbox'", {"image_resize_strategy": "letterbox"}),
        ("projector_token_length 5", {"projector_token_length": 5}),
        (r"\[16, 8\]", {"num_frames": [16, 16]}),
        ("visual_feature_length 8", {"visual_feature_length": 8}),
    ],
)
def test_unsupported_configurations_are_rejected_by_name(name, changed):
    with pytest.raises(CheckpointError, match=name):
        read_config({"model": {**TWO["model"], **changed}})


def test_incomplete_configuration_is_rejected_by_name():
    with pytest.raises(CheckpointError, match=r"num_frames.*num_frames"):
        read_config({"model": {name: value for name, value in TWO["model"].items() if name != "num_frames"}})
    with pytest.raises(CheckpointError, match=r"'model'.*trainer"):
        read_config({"trainer": {}})


def test_encoder_without_weights_suggests_an_option(released, tmp_path):
    config = config_of(["fake", "dinov2-video-all-tokens"], [16, 16], 16)
    check_rejected(released, tmp_path, config, "--encoder dinov2=FOLDER", WeightsError)


def test_language_model_that_cannot_be_loaded_suggests_an_option(released, tmp_path):
    check_rejected(released, tmp_path, match="--llm FOLDER", error=WeightsError, llm=tmp_path / "nowhere")


def test_weights_for_an_unknown_encoder_are_rejected(released, tmp_path):
    folder, original, _ = released
    write(tmp_path / "two", original.state(), TWO)
    with pytest.raises(WeightsError, match="siglip"):
        convert_in(tmp_path, "two", llm=folder / "base", encoders={"siglip": "/folder"})


@pytest.mark.parametrize("content", [b"no checkpoint", None, [1], {"weights": {}}])
def test_file_that_is_not_a_checkpoint_is_rejected(released, tmp_path, content):
    folder, *_ = released
    path, config = tmp_path / "latest.pt", folder / "two" / "config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"latest\.pt"):
        convert(path, config, tmp_path / "out", llm=folder / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_configuration_is_rejected(released, tmp_path, text):
    folder, *_ = released
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(folder / "two" / "latest-checkpoint.pt", tmp_path / "config.json", tmp_path / "out")


def test_folder_with_other_files_is_not_replaced(released, tmp_path, capsys):
    folder, *_ = released
    (tmp_path / "thesis.tex").write_text("years of work")
    arguments = [str(folder / "two" / "latest-checkpoint.pt"), str(tmp_path)]
    assert main(["convert", *arguments, "--config", str(folder / "two" / "config.json")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_command_lists_what_it_left_out_and_the_next_command(released, tmp_path, capsys):
    folder, *_ = released
    arguments = [str(folder / "two" / "latest-checkpoint.pt"), str(tmp_path / "out")]
    options = ["--config", str(folder / "two" / "config.json"), "--llm", str(folder / "base")]
    assert main(["convert", *arguments, *options, "--encoder", "fake=built-in"]) == 0
    out = capsys.readouterr().out
    assert "left out optimizer" in out
    assert "merv ask" in out

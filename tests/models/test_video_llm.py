from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import build, count_readings, video

from merv.cli.main import main
from merv.errors import CheckpointError, PromptError, ShapeError, TrainingError
from merv.features.store import FeatureStore
from merv.models.chat import user_message
from merv.models.llm import LoraOptions, check_same, identity, load_llm
from merv.models.multi_encoder import MultiEncoder
from merv.models.packing import Tokens, pack
from merv.models.video_llm import VideoLLM
from merv.testing import make_video, tiny_llm


@pytest.fixture
def folder(tmp_path):
    tiny_llm(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("llm", [{}, {"chat_template": False}, {"chat_template": False, "bos": False}])
def test_answers_do_not_depend_on_the_batch(llm, conditioned):
    model = build(conditioned, **llm)
    conversations = [
        user_message("What is on it?", video(1)),
        user_message("What happens?", video(3)),
        user_message("And in this much longer question about a longer clip?", video(80, 40, 24)),
        user_message("Just text."),
        user_message("Which of the two?", video(20), video(1)),
    ]
    together = model.generate(conversations, max_new_tokens=6)
    assert together == [model.generate([conversation], max_new_tokens=6)[0] for conversation in conversations]


def test_the_video_changes_the_answer():
    model = build()
    one, other = (model.log_probs([user_message("What?", video(8), answer="cat")])[0] for _ in range(2))
    assert (one - other).abs().max() > 1e-4


def test_logits_equal_those_of_the_llm_on_spliced_embeddings():
    """Splice the embeddings without merv and call the LLM of transformers directly."""
    model, clip = build(), video(8)
    conversation = user_message("What?", clip, answer="cat")
    before, after = (
        model.tokenizer(part, add_special_tokens=False).input_ids
        for part in model.tokenizer.apply_chat_template(
            [{"role": "user", "content": "\ue000What?"}, conversation[1]], tokenize=False
        ).split("\ue000")
    )
    table = model.llm.get_input_embeddings()
    tokens = model.vision(clip).tokens
    spliced = torch.cat([table(torch.tensor([before])), tokens, table(torch.tensor([after]))], dim=1)
    logits = model.llm(inputs_embeds=spliced).logits
    expected = logits[0, -len(after) - 1 : -1].log_softmax(-1)[range(len(after)), after]
    ours = model.log_probs([conversation])[0]
    torch.testing.assert_close(
        ours,
        expected[-len(ours) :]
        if after[-1] == model.tokenizer.eos_token_id
        else expected[-len(ours) - 1 : -1],
    )


def test_exact_match_is_true_for_the_greedy_answer_only(monkeypatch):
    """The LLM answers every question with "ab"."""
    model, clip = build(), video(8)
    a, b = model.tokenizer("ab", add_special_tokens=False).input_ids
    after = {a: b, b: model.tokenizer.eos_token_id}
    table = model.llm.get_input_embeddings().weight.data
    table.copy_(torch.nn.functional.normalize(torch.randn_like(table)))  # each is nearest to itself
    forward = model.llm.forward

    def answer_ab(*args, **kwargs):
        out = forward(*args, **kwargs)
        tokens = (kwargs["inputs_embeds"] @ table.T).argmax(dim=-1)[:, kwargs["logits_to_keep"]]
        answer = [[after.get(token, a) for token in row] for row in tokens.tolist()]
        out.logits = torch.nn.functional.one_hot(torch.tensor(answer), len(table)).float()
        return out

    monkeypatch.setattr(model.llm, "forward", answer_ab)
    conversations = [user_message("What?", clip, answer=answer) for answer in ("ab", "a", "abb", "b", "aab")]
    assert model.exact_match([conversations]) == [[True, False, False, False, False]]


def test_stream_gives_the_same_text_as_generate():
    model, conversation = build(), user_message("What?", video(4))
    assert (
        "".join(model.stream(conversation, max_new_tokens=6)).strip()
        == model.generate([conversation], max_new_tokens=6)[0]
    )


def test_error_while_streaming_is_raised():
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(build().stream(user_message("What?"), max_new_tokens=-1))


def test_log_probs_are_per_token_of_the_answer():
    model = build()
    scores = model.log_probs([user_message("What?", answer="abc"), user_message("What?", answer="a")])
    assert [len(s) for s in scores] == [4, 2]  # bytes and the end
    assert all((s < 0).all() for s in scores)


def test_all_answers_of_a_conversation_are_learned():
    turns = [*user_message("One?", video(4), answer="a"), *user_message("Two?", answer="b")]
    assert len(build().log_probs([turns])[0]) == 4


def test_forward_without_an_answer_is_an_error():
    with pytest.raises(PromptError, match="What"):
        build()([[user_message("What?")]])


def test_generate_after_an_answer_is_an_error():
    with pytest.raises(PromptError, match="cat"):
        build().generate([user_message("What?", answer="cat")])


def test_other_output_dim_is_rejected():
    llm, tokenizer = tiny_llm()
    with pytest.raises(ShapeError, match=f"output_dim={llm.config.hidden_size}.* output_dim=8"):
        VideoLLM(llm, tokenizer, MultiEncoder(["fake"], output_dim=8))


def test_only_the_named_parts_are_trained():
    model = build()
    model.add_lora(LoraOptions(r=2))
    model.train_only(["projector", "lora"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".projectors." in name or "lora_" in name for name in trained)


def test_every_trained_parameter_gets_a_gradient():
    model = build()
    model.add_lora(LoraOptions(r=2))
    model.train_only(["projector", "mixer", "lora"])
    model([[user_message("What?", video(4), answer="cat")]]).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_single_part_can_be_trained_by_its_name():
    model = build()
    model.train_only("projector")
    assert model.trained == ("projector",)


def test_lora_of_other_options_is_refused():
    with pytest.raises(TrainingError, match=r"SimpleNamespace.*LoraOptions"):
        build().add_lora(SimpleNamespace(r=2, use_rslora=True))


def test_unknown_part_suggests_the_nearest_name():
    with pytest.raises(TrainingError, match=r"'projectors'.*'projector'"):
        build().train_only(["projectors"])


@pytest.mark.parametrize(
    "parts", [["projector", "mixer"], ["projector", "lora"], ["projector", "mixer", "llm"]]
)
def test_saved_model_answers_the_same_after_loading(parts, folder, tmp_path):
    llm, tokenizer = load_llm(folder)
    model = VideoLLM(
        llm, tokenizer, MultiEncoder(["fake"], grid=(4, 2, 2), output_dim=llm.config.hidden_size)
    )
    if "lora" in parts:
        model.add_lora(LoraOptions(r=2))
    model.train_only(parts)
    model.fusion.init_scale(0.2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval().save_pretrained(tmp_path / "saved")
    again = VideoLLM.from_pretrained(tmp_path / "saved")
    conversation = user_message("What?", video(8), answer="cat")
    assert torch.equal(model.log_probs([conversation])[0], again.log_probs([conversation])[0])
    assert again.trained == tuple(parts)


def test_saved_folder_has_only_the_trained_tensors(folder, tmp_path):
    llm, tokenizer = load_llm(folder)
    model = VideoLLM(llm, tokenizer, MultiEncoder(["fake"], output_dim=llm.config.hidden_size))
    model.save_pretrained(tmp_path / "saved")
    trained = sum(p.numel() for p in model.vision.fusion.parameters()) * 4
    assert trained < (tmp_path / "saved/model.safetensors").stat().st_size < trained + 4096


def test_llm_with_other_weights_is_rejected(folder, tmp_path):
    llm, tokenizer = load_llm(folder)
    model = VideoLLM(llm, tokenizer, MultiEncoder(["fake"], output_dim=llm.config.hidden_size))
    model.save_pretrained(tmp_path / "saved")
    llm.get_input_embeddings().weight.data.add_(1)
    llm.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="other"):
        VideoLLM.from_pretrained(tmp_path / "saved", llm=tmp_path / "other")


def test_identity_does_not_depend_on_the_precision_of_loading(folder):
    llm = load_llm(folder)[0].bfloat16()
    llm.save_pretrained(folder)
    fp32, bf16 = (identity(load_llm(folder, dtype)[0]) for dtype in ("fp32", "bf16"))
    check_same(fp32, bf16, folder)


def test_any_flipped_bit_of_the_llm_is_noticed(folder):
    llm = load_llm(folder)[0]
    before = identity(llm)
    weight = llm.model.layers[1].mlp.up_proj.weight
    weight.data.view(torch.int32)[5, 7] ^= 1
    with pytest.raises(CheckpointError, match=str(folder)):
        check_same(before, identity(llm), folder)


def test_padding_on_either_side():
    rows = [
        [Tokens(torch.tensor([5, 6]), torch.tensor([-100, 6]))],
        [Tokens(torch.tensor([7]), torch.tensor([-100]))],
    ]
    assert pack(rows, pad_id=0, side="left").ids.tolist() == [[5, 6], [0, 7]]
    assert pack(rows, pad_id=0, side="right").ids.tolist() == [[5, 6], [7, 0]]


@pytest.mark.parametrize("conditioned", [False, True])
def test_log_probs_do_not_depend_on_the_batch(conditioned):
    model = build(conditioned)
    conversations = [
        user_message("What is on it?", video(1), answer="a cat"),
        user_message("What happens?", video(3), answer="no"),
        user_message("And in this much longer question?", video(80, 40, 24), answer="a much longer answer"),
        user_message("Just text.", answer="yes"),
    ]
    for together, conversation in zip(model.log_probs(conversations), conversations, strict=True):
        torch.testing.assert_close(together, model.log_probs([conversation])[0])


def test_log_probs_of_no_conversations_are_empty():
    assert build().log_probs([]) == []


def test_path_bytes_and_open_file_give_the_same(tmp_path):
    model, path = build(), make_video(tmp_path / "clip.mp4")
    with path.open("rb") as file:
        conversations = [
            user_message("What?", source, answer="cat") for source in (path, path.read_bytes(), file)
        ]
        first, *others = (model.log_probs([conversation])[0] for conversation in conversations)
        model.feature_store = FeatureStore()
        stored = model.log_probs(conversations)
    for other in (*others, *stored):
        torch.testing.assert_close(first, other)


def test_image_file_gets_one_step_of_time(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    content = [{"type": "image", "image": tmp_path / "red.png"}, {"type": "text", "text": "What?"}]
    assert build().encode([{"role": "user", "content": content}]).tokens.shape[:2] == (1, 4)


def test_llm_in_bf16_answers_and_trains_the_fusion_in_fp32():
    model, clip = build(), video(8)
    exact = model.log_probs([user_message("What?", clip, answer="cat")])[0]
    model.llm.bfloat16()
    conversations = [user_message("What?", clip, answer="cat"), user_message("Who?", clip, answer="dog")]
    torch.testing.assert_close(model.log_probs(conversations[:1])[0], exact, atol=0.2, rtol=0.1)
    model([conversations]).loss.backward()
    for parameter in model.vision.fusion.projectors.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0
    assert len(model.generate([user_message("What?", clip)], max_new_tokens=3)) == 1


def test_lora_on_llm_in_bf16_is_fp32_and_keeps_small_steps(folder, tmp_path):
    llm, tokenizer = load_llm(folder, "bf16")
    model = VideoLLM(
        llm, tokenizer, MultiEncoder(["fake"], grid=(4, 2, 2), output_dim=llm.config.hidden_size)
    )
    model.add_lora(LoraOptions(r=2))
    model.train_only(["lora"])
    adapter = model.parts()["lora"]
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    for parameter in adapter.values():
        torch.nn.init.normal_(parameter)
    conversation = user_message("What?", video(8), answer="cat")
    model([[conversation]]).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.values())
    torch.optim.SGD(adapter.values(), lr=1e-5).step()
    model.eval().save_pretrained(tmp_path / "saved")
    again = VideoLLM.from_pretrained(tmp_path / "saved")
    assert again.llm.dtype == torch.bfloat16
    for name, parameter in again.parts()["lora"].items():
        assert torch.equal(parameter, adapter[name])
    assert torch.equal(model.log_probs([conversation])[0], again.log_probs([conversation])[0])


def test_weights_of_a_conditioned_mixer_depend_on_the_question():
    model, clip = build(conditioned=True), video(8)
    one, other = (
        model.encode(user_message(question, clip)).mix_weights for question in ("How many?", "Which color?")
    )
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(other.sum(dim=1), torch.ones_like(other.sum(dim=1)))


def test_weights_without_conditioning_do_not_depend_on_the_question():
    model, clip = build(), video(8)
    one, other = (
        model.encode(user_message(question, clip)).mix_weights for question in ("How many?", "Which color?")
    )
    assert torch.equal(one, other)


def test_generation_config_of_the_llm_does_not_change_greedy_decoding(caplog):
    model, conversation = build(), user_message("What?", video(4))
    expected = model.generate([conversation], max_new_tokens=8)
    config = model.llm.generation_config
    config.temperature, config.top_p, config.top_k, config.do_sample = 0.6, 0.9, 20, True
    config.repetition_penalty, config.max_length = 1.5, 4096
    assert model.generate([conversation], max_new_tokens=8) == expected
    assert caplog.text == ""


@pytest.mark.parametrize("method", ["generate", "log_probs"])
def test_one_conversation_instead_of_a_list_is_an_error(method):
    with pytest.raises(PromptError, match="user"):
        getattr(build(), method)(user_message("What?"))


def test_ask_prints_the_answer_and_the_weights_for_that_question(folder, tmp_path, capsys, monkeypatch):
    llm, tokenizer = load_llm(folder)
    vision = MultiEncoder(
        ["fake", "fake/video"], output_dim=llm.config.hidden_size, mixer_options={"conditioned": True}
    )
    VideoLLM(llm, tokenizer, vision).save_pretrained(tmp_path / "model")
    path, seen = make_video(tmp_path / "clip.mp4"), count_readings(monkeypatch)
    assert main(["ask", str(path), "What?", "--model", str(tmp_path / "model"), "--mix-weights"]) == 0
    assert capsys.readouterr().out.endswith("\nmix_weights: fake 50%, fake_video 50%\n")
    assert len(seen) == 1

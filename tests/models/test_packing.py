"""Conversations about the same video share a row, but do not attend to each other."""

import pytest
import torch
from tiny import build, count_readings, video

from merv.errors import PromptError
from merv.models.chat import user_message
from merv.models.llm import check_llm
from merv.models.packing import Tokens, pack
from merv.testing import tiny_llm


def test_shared_video_occurs_once_and_gives_the_same_loss():
    model, clip = build(), video(8)
    conversations = [
        user_message("What?", clip, answer="cat"),
        user_message("Who is it then?", clip, answer="a dog"),
        user_message("Why?", clip, answer="x"),
    ]
    packed, _ = model.prepare(model.render([conversations]))
    alone = [model.prepare(model.render([[c]]))[0].ids.shape[1] for c in conversations]
    assert packed.ids.shape[1] < sum(alone) - 2 * 16
    torch.testing.assert_close(
        model([conversations]).loss, model([[conversation] for conversation in conversations]).loss
    )


@pytest.mark.parametrize("answers", [("cat", "dog"), ("cat", "cat"), ("cat", "cats")])
def test_two_answers_to_one_question_give_the_loss_of_separate_rows(answers):
    model, clip = build(), video(8)
    conversations = [user_message("What?", clip, answer=answer) for answer in answers]
    torch.testing.assert_close(
        model([conversations]).loss, model([[conversation] for conversation in conversations]).loss
    )


def test_conversations_about_one_video_do_not_attend_to_each_other():
    model, clip = build(), video(8)
    conversations = [user_message("What?", clip, answer="cat"), user_message("Who?", clip, answer="dog")]
    first = model([conversations])
    conversations[0] = user_message("Whoever?", clip, answer="cats")
    second = model([conversations])
    torch.testing.assert_close(
        first.logits[first.conversations == 1], second.logits[second.conversations == 1]
    )


def test_gradients_of_a_shared_video_add_up():
    model, clip = build().train(), video(8)
    conversations = [user_message("What?", clip, answer="cat"), user_message("Who?", clip, answer="dog")]
    grads = []
    for groups in ([conversations], [[conversation] for conversation in conversations]):
        model.zero_grad()
        model(groups).loss.backward()
        grads.append([p.grad.clone() for p in model.vision.fusion.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_rows_are_exact(attention):
    model, clip = build(), video(8)
    model.llm.set_attn_implementation(attention)
    conversations = [
        user_message("What?", clip, answer="cat"),
        user_message("Who is it then?", clip, answer="a dog"),
    ]
    torch.testing.assert_close(
        model([conversations]).loss, model([[conversation] for conversation in conversations]).loss
    )


def test_attention_without_custom_masks_gets_one_row_per_conversation(monkeypatch):
    model, clip = build(), video(8)
    conversations = [user_message("What?", clip, answer="cat"), user_message("Who?", clip, answer="a dog")]
    groups = [conversations, conversations[:1]]
    shared_loss, exact = model(groups).loss, model.exact_match(groups)
    monkeypatch.setattr(model.llm.config, "_attn_implementation_internal", "flash_attention_2")
    packed, _ = model.prepare(model.render(groups))
    assert packed.mask.ndim == 2
    assert len(packed.ids) == 3
    monkeypatch.setattr(model.llm.config, "_attn_implementation_internal", "sdpa")
    monkeypatch.setattr(model, "_shared_prefix_is_exact", False)
    torch.testing.assert_close(model(groups).loss, shared_loss)
    assert model.exact_match(groups) == exact


@pytest.mark.parametrize("change", [{"sliding_window": 8}, {"layer_types": ["conv", "full_attention"]}])
def test_llm_without_full_attention_does_not_share_rows(change):
    llm = tiny_llm()[0]
    assert check_llm(llm)
    for name, value in change.items():
        setattr(llm.config, name, value)
    assert not check_llm(llm)


def test_video_with_several_questions_is_read_once(monkeypatch):
    model, clip = build(conditioned=True), video(8)
    seen = count_readings(monkeypatch)
    model([[user_message("What?", clip, answer="a"), user_message("Who?", clip, answer="b")]])
    assert len(seen) == 1


def test_encode_without_a_video_is_an_error():
    with pytest.raises(PromptError, match="What"):
        build().encode(user_message("What?"))


def test_additive_mask_is_zero_where_tokens_attend():
    row = [Tokens(torch.tensor([5, 6, i]), torch.tensor([-100, -100, i])) for i in (7, 8)]
    packed = pack([row], pad_id=0)
    added = packed.attention_mask(like=torch.zeros(1, dtype=torch.bfloat16), additive=True)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, packed.mask)
    assert packed.attention_mask(like=added, additive=False) is packed.mask

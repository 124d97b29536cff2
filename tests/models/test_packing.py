"""Conversations that share a video share a row, and know nothing of each other."""

import pytest
import torch
from tiny import build, count_readings, video

from merv.errors import PromptError
from merv.models.chat import user_message
from merv.models.llm import supports_shared_prefix
from merv.models.packing import Tokens, pack
from merv.testing import tiny_llm


def test_questions_that_share_a_video_cost_it_once_and_give_the_same_loss():
    model, clip = build(), video(8)
    talks = [
        user_message("What?", clip, answer="cat"),
        user_message("Who is it then?", clip, answer="a dog"),
        user_message("Why?", clip, answer="x"),
    ]
    packed, _ = model.prepare([talks])
    alone = [model.prepare([[talk]])[0].ids.shape[1] for talk in talks]
    assert packed.ids.shape[1] < sum(alone) - 2 * 16
    torch.testing.assert_close(model([talks]).loss, model([[talk] for talk in talks]).loss)


@pytest.mark.parametrize("answers", [("cat", "dog"), ("cat", "cat"), ("cat", "cats")])
def test_one_question_with_two_answers_gives_the_loss_of_separate_rows(answers):
    model, clip = build(), video(8)
    talks = [user_message("What?", clip, answer=answer) for answer in answers]
    torch.testing.assert_close(model([talks]).loss, model([[talk] for talk in talks]).loss)


def test_questions_that_share_a_video_do_not_see_each_other():
    model, clip = build(), video(8)
    talks = [user_message("What?", clip, answer="cat"), user_message("Who?", clip, answer="dog")]
    first = model([talks])
    talks[0] = user_message("Whoever?", clip, answer="cats")
    second = model([talks])
    torch.testing.assert_close(first.logits[first.branches == 2], second.logits[second.branches == 2])


def test_gradients_of_a_shared_video_add_up():
    model, clip = build().train(), video(8)
    talks = [user_message("What?", clip, answer="cat"), user_message("Who?", clip, answer="dog")]
    grads = []
    for groups in ([talks], [[talk] for talk in talks]):
        model.zero_grad()
        model(groups).loss.backward()
        grads.append([p.grad.clone() for p in model.vision.fusion.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sharing_a_video_is_exact_with_either_attention(attention):
    model, clip = build(), video(8)
    model.llm.set_attn_implementation(attention)
    talks = [user_message("What?", clip, answer="cat"), user_message("Who is it then?", clip, answer="a dog")]
    torch.testing.assert_close(model([talks]).loss, model([[talk] for talk in talks]).loss)


def test_attention_without_free_masks_gets_a_row_for_each_conversation(monkeypatch):
    model, clip = build(), video(8)
    talks = [user_message("What?", clip, answer="cat"), user_message("Who?", clip, answer="a dog")]
    groups = [talks, talks[:1]]
    shared, said = model(groups).loss, model.exact_match(groups)
    monkeypatch.setattr(model.llm.config, "_attn_implementation_internal", "flash_attention_2")
    packed, _ = model.prepare(groups)
    assert packed.mask.ndim == 2
    assert len(packed.ids) == 3
    monkeypatch.setattr("merv.models.video_llm.supports_shared_prefix", lambda llm: False)
    monkeypatch.setattr(model.llm.config, "_attn_implementation_internal", "sdpa")
    torch.testing.assert_close(model(groups).loss, shared)
    assert model.exact_match(groups) == said


@pytest.mark.parametrize("change", [{"sliding_window": 8}, {"layer_types": ["conv", "full_attention"]}])
def test_layers_that_do_not_attend_freely_share_no_rows(change):
    llm = tiny_llm()[0]
    assert supports_shared_prefix(llm)
    for name, value in change.items():
        setattr(llm.config, name, value)
    assert not supports_shared_prefix(llm)


def test_several_questions_about_a_video_encode_it_once(monkeypatch):
    model, clip = build(conditioned=True), video(8)
    seen = count_readings(monkeypatch)
    model([[user_message("What?", clip, answer="a"), user_message("Who?", clip, answer="b")]])
    assert len(seen) == 1


def test_a_conversation_without_a_video_has_nothing_to_encode():
    with pytest.raises(PromptError, match="no video or image"):
        build().encode(user_message("What?"))


def test_a_mask_to_add_to_scores_is_zero_where_one_may_look():
    row = [Tokens(torch.tensor([5, 6, i]), torch.tensor([-100, -100, i])) for i in (7, 8)]
    packed = pack([row], pad_id=0)
    added = packed.attention_mask(like=torch.zeros(1, dtype=torch.bfloat16), additive=True)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, packed.mask)
    assert packed.attention_mask(like=added, additive=False) is packed.mask

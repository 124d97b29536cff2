import pytest

from merv.errors import PromptError
from merv.models.chat import NOT_LEARNED, VISUAL, render, user_message
from merv.testing import tiny_llm

MESSAGES = [
    {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Who?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "image", "image": "b.png"}]},
    {"role": "assistant", "content": "A dog."},
]


@pytest.fixture(params=["template", "plain with BOS", "plain without BOS"])
def tokenizer(request):
    return tiny_llm(chat_template=request.param == "template", bos=request.param != "plain without BOS")[1]


def text_of(prompt, tokenizer) -> str:
    return "".join(
        VISUAL if not isinstance(piece, list) else tokenizer.decode(piece) for piece in prompt.pieces
    )


def learned_of(prompt, tokenizer) -> str:
    kept = []
    for piece, flags in zip(prompt.pieces, prompt.learned, strict=True):
        kept += [i for i, flag in zip(piece if flags else [], flags, strict=True) if flag]
    return tokenizer.decode(kept)


def test_videos_stand_where_their_content_is():
    tokenizer = tiny_llm()[1]
    text = text_of(render(MESSAGES, tokenizer), tokenizer)
    assert text.index(VISUAL) < text.index("Who?") < text.index("A cat.") < text.index("And")
    assert text.index("And") < text.rindex(VISUAL) < text.index("A dog.")


def test_only_answers_and_their_end_are_learned(tokenizer):
    learned = learned_of(render(MESSAGES, tokenizer), tokenizer)
    end = tokenizer.eos_token
    assert learned.replace(" ", "") == f"Acat.{end}Adog.{end}"


def test_a_prompt_is_the_beginning_of_its_answered_form(tokenizer):
    asked = text_of(render(MESSAGES[:1], tokenizer), tokenizer)
    answered = text_of(render(MESSAGES[:2], tokenizer), tokenizer)
    assert answered.startswith(asked)
    assert asked != answered


def test_the_plain_form_is_that_of_the_released_model():
    tokenizer = tiny_llm(chat_template=False)[1]
    prompt = render(user_message("Who?", "a.mp4", answer="A cat"), tokenizer)
    assert text_of(prompt, tokenizer) == f"<s>{VISUAL}In: Who?\nOut: A cat</s>"


def test_without_bos_the_plain_form_begins_with_the_video():
    tokenizer = tiny_llm(chat_template=False, bos=False)[1]
    assert text_of(render(user_message("Who?", "a.mp4"), tokenizer), tokenizer) == f"{VISUAL}In: Who?\nOut:"


@pytest.mark.parametrize(
    ("tokenizer", "times"),
    [("template", 1), ("plain with BOS", 1), ("plain without BOS", 0)],
    indirect=["tokenizer"],
)
def test_bos_stands_once_where_there_is_one(tokenizer, times):
    text = text_of(render(MESSAGES, tokenizer), tokenizer)
    assert text.count("<s>") == times
    assert text.startswith("<s>") == bool(times)


def test_text_only_has_no_visuals(tokenizer):
    assert render(user_message("Who?"), tokenizer).visuals == []


def test_a_visual_knows_the_question_beside_it():
    assert [v.question for v in render(MESSAGES, tiny_llm()[1]).visuals] == ["Who?", "And"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ([{"role": "user"}], "non-empty list"),
        ([{"role": "user", "content": [{"type": "sound", "sound": 1}]}], "'video' or 'image'"),
        ([{"role": "user", "content": [{"type": "video"}]}], "'video' or 'image'"),
        ([{"role": "user", "content": ["Hi"]}], "or a list of parts .* got Hi"),
        ([{"role": "user", "content": None}], "or a list of parts .* got None"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "or a list of parts .* got"),
        ([{"role": "user", "content": f"Hi {VISUAL}"}], r"U\+E000"),
    ],
)
def test_malformed_messages_say_what_is_wanted(messages, words):
    with pytest.raises(PromptError, match=words):
        render(messages, tiny_llm()[1])


def test_a_template_that_raises_is_a_prompt_error():
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="roles must alternate"):
        render(user_message("Who?"), tokenizer)


def test_a_template_that_rewrites_history_is_a_prompt_error():
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(PromptError, match="rewrites earlier turns"):
        render(MESSAGES, tokenizer)


def test_a_question_can_follow_under_such_a_template():
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    prompt = render(MESSAGES[:3], tokenizer)
    assert text_of(prompt, tokenizer).startswith("3")
    assert not any(flag for flags in prompt.learned for flag in flags)


def test_a_template_that_drops_videos_is_a_prompt_error():
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "no content"
    with pytest.raises(PromptError, match="kept 0 of 1 videos"):
        render(user_message("Who?", "a.mp4"), tokenizer)


def test_not_learned_is_what_torch_ignores():
    assert NOT_LEARNED == -100

import pytest

from merv.errors import PromptError
from merv.models.chat import NOT_LEARNED, VISUAL, user_message
from merv.models.chat_template import ChatTemplate
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


def render(messages, tokenizer):
    """The only sequence of a conversation, or the prompt of its next answer."""
    template = ChatTemplate(tokenizer)
    if messages and messages[-1].get("role") == "assistant":
        (prompt,) = template.training_prompts(messages)
        return prompt
    return template.generation_prompt(messages)


def text_of(prompt, tokenizer) -> str:
    return "".join(tokenizer.decode(item) if isinstance(item, int) else VISUAL for item in prompt.items)


def learned_of(prompt, tokenizer) -> str:
    pairs = zip(prompt.items, prompt.learned, strict=True)
    return tokenizer.decode([item for item, is_learned in pairs if is_learned])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a b.mp4"},
        {"type": "video", "path": "a b.mp4"},
        {"type": "video", "url": "a b.mp4", "path": None},
        {"type": "image_url", "image_url": {"url": "a b.mp4"}},
        {"type": "video_url", "video_url": {"url": "a b.mp4"}},
    ],
)
def test_source_of_a_part_may_have_any_of_the_usual_keys(part):
    (visual,) = render([{"role": "user", "content": [part]}], tiny_llm()[1]).visuals
    assert visual.source == "a b.mp4"


def test_file_url_is_a_path():
    url = {"type": "image_url", "image_url": {"url": "file:///clips/a%20b.png"}}
    (visual,) = render([{"role": "user", "content": [url]}], tiny_llm()[1]).visuals
    assert visual.source == "/clips/a b.png"


def test_videos_keep_their_position_in_the_content():
    tokenizer = tiny_llm()[1]
    text = text_of(render(MESSAGES, tokenizer), tokenizer)
    assert text.index(VISUAL) < text.index("Who?") < text.index("A cat.") < text.index("And")
    assert text.index("And") < text.rindex(VISUAL) < text.index("A dog.")


def test_only_answers_and_their_end_tokens_are_learned(tokenizer):
    learned = learned_of(render(MESSAGES, tokenizer), tokenizer)
    end = tokenizer.eos_token
    assert learned.replace(" ", "") == f"Acat.{end}Adog.{end}"


def test_prompt_is_a_prefix_of_the_prompt_with_answer(tokenizer):
    asked = text_of(render(MESSAGES[:1], tokenizer), tokenizer)
    answered = text_of(render(MESSAGES[:2], tokenizer), tokenizer)
    assert answered.startswith(asked)
    assert asked != answered


def test_plain_format_is_that_of_the_released_model():
    tokenizer = tiny_llm(chat_template=False)[1]
    prompt = render(user_message("Who?", "a.mp4", answer="A cat"), tokenizer)
    assert text_of(prompt, tokenizer) == f"<s>{VISUAL}In: Who?\nOut: A cat</s>"


def test_plain_format_without_bos_begins_with_the_video():
    tokenizer = tiny_llm(chat_template=False, bos=False)[1]
    assert text_of(render(user_message("Who?", "a.mp4"), tokenizer), tokenizer) == f"{VISUAL}In: Who?\nOut:"


@pytest.mark.parametrize(
    ("tokenizer", "times"),
    [("template", 1), ("plain with BOS", 1), ("plain without BOS", 0)],
    indirect=["tokenizer"],
)
def test_bos_occurs_once_if_the_tokenizer_has_one(tokenizer, times):
    text = text_of(render(MESSAGES, tokenizer), tokenizer)
    assert text.count("<s>") == times
    assert text.startswith("<s>") == bool(times)


def test_text_without_videos_has_no_visuals(tokenizer):
    assert render(user_message("Who?"), tokenizer).visuals == []


def test_visual_has_the_question_of_its_message():
    assert [v.question for v in render(MESSAGES, tiny_llm()[1]).visuals] == ["Who?", "And"]


@pytest.mark.parametrize(
    ("messages", "value"),
    [
        ([], r"got \[\]"),
        ([{"role": "user"}], "'role': 'user'"),
        ([{"role": "user", "content": [{"type": "sound", "sound": 1}]}], "sound"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"\{'type': 'video'\}"),
        ([{"role": "user", "content": [{"type": "video", "video": "a", "path": "b"}]}], "'path': 'b'"),
        ([{"role": "user", "content": ["Hi"]}], "got Hi"),
        ([{"role": "user", "content": None}], "got None"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "7"),
        ([{"role": "user", "content": f"Hi {VISUAL}"}], r"U\+E000"),
    ],
)
def test_malformed_messages_are_rejected(messages, value):
    with pytest.raises(PromptError, match=value):
        render(messages, tiny_llm()[1])


def test_chat_template_that_raises_is_a_prompt_error():
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="roles must alternate"):
        render(user_message("Who?"), tokenizer)


def test_chat_template_that_changes_earlier_turns_is_a_prompt_error():
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(PromptError, match="chat template"):
        render(MESSAGES, tokenizer)


def test_chat_template_that_changes_earlier_turns_renders_questions():
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    prompt = render(MESSAGES[:3], tokenizer)
    assert text_of(prompt, tokenizer).startswith("3")
    assert not any(prompt.learned)


def test_chat_template_that_drops_videos_is_a_prompt_error():
    tokenizer = tiny_llm()[1]
    tokenizer.chat_template = "no content"
    with pytest.raises(PromptError, match="0 of 1"):
        render(user_message("Who?", "a.mp4"), tokenizer)


def test_not_learned_is_what_torch_ignores():
    assert NOT_LEARNED == -100

"""Prompts and answers under the chat templates of today's language models."""

import pytest
import torch
from chat_templates import SPECIAL, TEMPLATES

from merv import MultiEncoder, VideoLLM, user_message
from merv.errors import CheckpointError, PromptError
from merv.models.chat import VISUAL
from merv.models.chat_template import ChatTemplate
from merv.testing import tiny_llm

VIDEO = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
ONE = user_message("Who?", VIDEO, answer="A cat.")
SEVERAL = [*user_message("Who?", VIDEO, answer="A cat."), *user_message("And then?", answer="A dog!")]


def tokenizer_of(name):
    tokenizer = tiny_llm()[1]
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def learned_of(prompt):
    return [item for item, is_learned in zip(prompt.items, prompt.learned, strict=True) if is_learned]


def text_of(prompt, tokenizer, learned=False):
    items = learned_of(prompt) if learned else prompt.items
    return "".join(tokenizer.decode(item) if isinstance(item, int) else VISUAL for item in items)


def model_of(name, **options):
    llm = tiny_llm()[0]
    tokenizer = tokenizer_of(name)
    llm.resize_token_embeddings(len(tokenizer))
    vision = MultiEncoder(["fake"], grid=(1, 1, 1), output_dim=llm.config.hidden_size)
    return VideoLLM(llm, tokenizer, vision, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_learned_once_and_ends_in_the_end_token(name):
    tokenizer = tokenizer_of(name)
    template = ChatTemplate(tokenizer)
    learned = "".join(
        text_of(prompt, tokenizer, learned=True) for prompt in template.training_prompts(SEVERAL)
    )
    assert learned.count("A cat.") == learned.count("A dog!") == 1
    assert learned.count(template.end_token) == 2
    assert learned.endswith(template.end_token)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_learned_under_the_prompt_of_inference(name):
    tokenizer = tokenizer_of(name)
    template = ChatTemplate(tokenizer)
    sequences = [text_of(prompt, tokenizer) for prompt in template.training_prompts(SEVERAL)]
    for end in (1, 3):
        asked = text_of(template.generation_prompt(SEVERAL[:end]), tokenizer)
        assert any(sequence.startswith(asked) for sequence in sequences)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answer_is_what_follows_the_last_thinking_block(name):
    tokenizer = tokenizer_of(name)
    template = ChatTemplate(tokenizer)
    learned = learned_of(template.training_prompts(SEVERAL)[-1])
    assert template.answer_of(learned, template.opens_thinking(ONE[:1])).endswith("A dog!")


def test_thinking_is_dropped_from_the_answer_and_kept_on_request():
    tokenizer = tokenizer_of("thinking dropped")
    template = ChatTemplate(tokenizer)
    ids = tokenizer("<think>\nHm.\n</think>\n\nA cat.<|im_end|>").input_ids
    assert template.answer_of(ids) == "A cat."
    assert template.answer_of(ids, keep_thinking=True) == "<think>\nHm.\n</think>\n\nA cat."


def test_unfinished_thinking_is_no_answer(caplog):
    tokenizer = tokenizer_of("thinking opened")
    assert ChatTemplate(tokenizer).answer_of(tokenizer("Hm, perhaps").input_ids, opened=True) == ""
    assert "max_new_tokens" in caplog.text


def test_streamed_answer_is_without_thinking():
    template = ChatTemplate(tokenizer_of("thinking opened"))
    pieces = ["Hm. ", "</thi", "nk>\n\nA ", "cat.<|im_end|>"]
    assert "".join(template.stream_of(pieces, opened=True)) == "A cat."
    assert "".join(template.stream_of(["A ", "cat. ", "</s>"])) == "A cat."
    assert "".join(template.stream_of(["<think>", "Hm</think>", "A cat."])) == "A cat."


def test_streamed_answer_that_looks_like_thinking_is_not_lost():
    template = ChatTemplate(tokenizer_of("chatml"))
    assert "".join(template.stream_of(["<", "th"])) == "<th"


def test_unfinished_streamed_thinking_is_no_answer(caplog):
    template = ChatTemplate(tokenizer_of("thinking opened"))
    assert "".join(template.stream_of(["Hm, ", "perhaps"], opened=True)) == ""
    assert "max_new_tokens" in caplog.text


def test_end_token_that_is_not_special_is_no_part_of_the_answer():
    tokenizer = tiny_llm()[1]
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.chat_template = TEMPLATES["chatml"]
    template = ChatTemplate(tokenizer)
    assert template.end_token == "<|im_end|>"
    assert template.answer_of(tokenizer("A cat.<|im_end|>", add_special_tokens=False).input_ids) == "A cat."


def test_thinking_in_an_answer_is_learned():
    tokenizer = tokenizer_of("chatml")
    answer = "<think>\nHm.\n</think>\n\nA cat."
    (prompt,) = ChatTemplate(tokenizer).training_prompts(user_message("Who?", answer=answer))
    assert text_of(prompt, tokenizer, learned=True) == f"{answer}<|im_end|>"


def test_line_breaks_around_an_answer_are_not_learned():
    tokenizer = tokenizer_of("chatml")
    (prompt,) = ChatTemplate(tokenizer).training_prompts(user_message("Who?", answer="\n\nA cat.\n"))
    assert text_of(prompt, tokenizer, learned=True) == "A cat.<|im_end|>"


def test_variables_of_the_template_are_passed():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"].replace(
        "<|im_start|>assistant\n",
        "<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}",
    )
    prompt = ChatTemplate(tokenizer, {"enable_thinking": False}).generation_prompt(ONE[:1])
    assert text_of(prompt, tokenizer).endswith("<think></think>")


def test_tokenizer_without_any_end_token_is_refused():
    tokenizer = tokenizer_of("no end")
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match="eos_token"):
        ChatTemplate(tokenizer).check()


def test_text_with_half_a_surrogate_pair_is_refused():
    with pytest.raises(PromptError, match=r"ud83d"):
        ChatTemplate(tokenizer_of("chatml")).generation_prompt(user_message("Who \ud83d?"))


@pytest.mark.parametrize(
    "name", ["no template", "space before the end", "no end", "end after end", "thinking opened"]
)
def test_trained_answers_are_generated_and_stop(name):
    model = model_of(name)
    model.train_only(["llm"])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model([[SEVERAL]]).loss.backward()
        optimizer.step()
    model.eval()
    first, second = model.generate([SEVERAL[:1], SEVERAL[:3]])
    assert (first, second) == ("A cat.", "A dog!")
    assert "".join(model.stream(SEVERAL[:3])) == "A dog!"
    assert model.exact_match([[SEVERAL, ONE]]) == [[True, True]]
    wrong = [*SEVERAL[:1], {"role": "assistant", "content": "A dog."}]
    assert model.exact_match([[wrong]]) == [[False]]


def test_rewritten_turns_share_their_prefix_in_one_row():
    model = model_of("thinking off")
    (row,) = model.render([[SEVERAL]])
    assert [prompt.conversation for prompt in row] == [0, 0]
    loss, log_probs = model([[SEVERAL]]).loss, model.log_probs([SEVERAL])
    model._shared_prefix_is_exact = False
    torch.testing.assert_close(model([[SEVERAL]]).loss, loss)
    torch.testing.assert_close(model.log_probs([SEVERAL]), log_probs)


def test_template_and_its_variables_are_saved(tmp_path, encoder_file):
    model = encoder_file(tmp_path)
    model.tokenizer.chat_template = TEMPLATES["eos after a newline"]
    model.chat.options["date"] = "today"
    model.save_pretrained(tmp_path / "model")
    loaded = VideoLLM.from_pretrained(tmp_path / "model")
    assert loaded.tokenizer.chat_template == TEMPLATES["eos after a newline"]
    assert loaded.chat.options == {"date": "today"}


def test_another_tokenizer_is_refused(tmp_path, encoder_file):
    encoder_file(tmp_path).save_pretrained(tmp_path / "model")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.add_tokens(["cat"])
    tokenizer.save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match=str(tmp_path / "model")):
        VideoLLM.from_pretrained(tmp_path / "model")


@pytest.fixture
def encoder_file():
    """A function that makes a model that can be saved, on an LLM in a folder `llm`."""
    from merv.models.llm import load_llm

    def make(folder):
        tiny_llm(folder / "llm")
        llm, tokenizer = load_llm(folder / "llm")
        vision = MultiEncoder(["fake"], grid=(1, 1, 1), output_dim=llm.config.hidden_size)
        return VideoLLM(llm, tokenizer, vision)

    return make

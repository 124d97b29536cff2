"""`merv fit` on conversations of several turns, with a language model and a template that drop thinking."""

import json

from chat_templates import SPECIAL, TEMPLATES
from running import QUIET, fit
from transformers import Qwen3Config, Qwen3ForCausalLM

from merv import VideoLLM
from merv.testing import make_video, tiny_llm

pytestmark = QUIET

TURNS = ["<video>\nWho?", "A cat.", "And then?", "It jumps!"]


def test_every_answer_of_a_llava_row_is_learned_by_a_qwen3(tmp_path):
    tokenizer = tiny_llm()[1]
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TEMPLATES["thinking dropped"]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    make_video(tmp_path / "cat.mp4", frames=4)
    speakers = ["human", "gpt"] * 2
    turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, TURNS, strict=True)]
    (tmp_path / "data.json").write_text(json.dumps([{"video": "cat.mp4", "conversations": turns}]))
    options = {
        "model__trainable": "[projector,mixer,llm]",
        "model__dtype": "fp32",
        "model__lr": 2e-2,
        "data__train": tmp_path / "data.json",
        "data__batch_size": 1,
        "trainer__max_epochs": 40,
        "sample_answers__every_n_steps": 0,
    }
    assert fit(tmp_path, tmp_path / "out", **options) == 0

    model = VideoLLM.from_pretrained(tmp_path / "out/model")
    video = {"type": "video", "video": str(tmp_path / "cat.mp4")}
    asked = [{"role": "user", "content": [video, {"type": "text", "text": "Who?"}]}]
    more = [*asked, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "And then?"}]
    assert model.generate([asked, more]) == ["A cat.", "It jumps!"]

"""Configurations, mixers and prompts of the released MERV, translated to merv."""

import pytest
import torch
from original import config_of

from merv.fusion.registry import MIXERS
from merv.models.chat import VISUAL, user_message
from merv.models.chat_template import ChatTemplate
from merv.models.released_merv import LLMS, ReleasedConfig, read_config, translate
from merv.models.released_merv import MIXERS as RELEASED_MIXERS
from merv.testing import tiny_llm


def test_default_configuration_of_the_release_is_translated():
    released = config_of(
        [
            "languagebind-video-noclass",
            "dinov2-video-all-tokens",
            "vivit-google-b-all-no-cls-16frames",
            "siglip-vit-b16-224px-all-no-cls",
        ],
        [16, 16, 32, 16],
        16,
        projector_token_length=64,
        visual_feature_length=1024,
    )
    encoders = {
        "languagebind": "languagebind/large",
        "dinov2": "dinov2/large",
        "vivit": "vivit/b-16x2-kinetics400",
        "siglip": "siglip/base",
    }
    frames = {"languagebind": 16, "dinov2": 16, "vivit": 32, "siglip": 16}
    expected = ReleasedConfig(
        encoders, frames, (16, 8, 8), "linear", "cross_attention_avg_lq", "llama2-7b-pure"
    )
    assert read_config(released) == expected


@pytest.mark.parametrize(
    ("specifier", "steps", "projector"),
    [
        ("3davg+linear", 16, "linear"),
        ("no-align+avg+gelu-mlp", 16, "gelu-mlp"),
        ("3davg+frame4+linear", 4, "linear"),
    ],
)
def test_architectures_of_the_release_are_translated(specifier, steps, projector):
    released = read_config(config_of(["fake"], [16], steps, arch_specifier=specifier))
    assert (released.grid, released.projector) == ((steps, 2, 2), projector)


@pytest.mark.parametrize(
    ("kind", "names", "mixer"),
    [
        (None, [], "mean"),
        ("concat", [], "concat"),
        ("concat_channel", ["projector.weight", "projector.bias"], "concat_channels"),
        (
            "concat_channel_ln",
            ["0.weight", "0.bias", "1.projector.weight", "1.projector.bias"],
            "concat_channels",
        ),
    ],
)
def test_other_mixers_of_the_release_are_translated(kind, names, mixer):
    encoders = ["fake"] if kind is None else ["fake", "fake-video"]
    frames = [16] if kind is None else [16, 32]
    released = read_config(config_of(encoders, frames, 16, feature_fusion=kind))
    translated, _ = translate({f"feature_fusion.{name}": torch.ones(1) for name in names}, released)
    kind_of_merv, options, _ = RELEASED_MIXERS[kind]
    state = MIXERS.create(mixer, 8, len(encoders), **options).state_dict()
    assert kind_of_merv == mixer
    assert {f"mixer.{name}" for name in state} == set(translated)


SEEING = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
POLITE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    ("name", "question", "follow_up"),
    [
        ("vicuna-v15-7b", POLITE + " USER: Why? ASSISTANT:", " So.</s>USER: And? ASSISTANT:"),
        (
            "llama2-7b-chat",
            f"[INST] <<SYS>\n{SEEING}\n<</SYS>>\n\nWhy? [/INST]",
            " So.</s><s>[INST] And? [/INST]",
        ),
        (
            "llama3.1-8b-chat",
            f"<|start_header_id|>system<|end_header_id|>\n\n{SEEING}<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "So.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "qwen2.5-7b-instruct",
            f"<|im_start|>system\n{SEEING}<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            "So.<|im_end|><|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_chat_models_have_the_prompt_of_the_release_with_videos_after_bos(name, question, follow_up):
    _, tokenizer = tiny_llm(bos="qwen" not in name)
    tokenizer.chat_template = LLMS[name].chat_template
    bos = tokenizer.bos_token or ""
    for conversation, expected in [
        (user_message("Why?", "clip"), question),
        (
            [*user_message("Why?", "clip", answer="So."), {"role": "user", "content": "And?"}],
            question + follow_up,
        ),
    ]:
        items = ChatTemplate(tokenizer).generation_prompt(conversation).items
        text = "".join(tokenizer.decode(item) if isinstance(item, int) else VISUAL for item in items)
        assert text == bos + VISUAL + expected

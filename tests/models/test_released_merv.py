"""The released MERV's configurations, mixers and prompts, under our names."""

import pytest
import torch
from official import config_of

from merv.fusion.registry import create_mixer
from merv.models.chat import VISUAL, render, user_message
from merv.models.released_merv import LLMS, Released, read_config, translate_fusion
from merv.testing import tiny_llm


def test_the_default_configuration_of_the_release_is_that_of_the_paper():
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
    wanted = Released(encoders, frames, (16, 8, 8), 32, "linear", "cross_attention_avg_lq", "llama2-7b-pure")
    assert read_config(released) == wanted


@pytest.mark.parametrize(
    ("specifier", "steps", "projector"),
    [
        ("3davg+linear", 16, "linear"),
        ("no-align+avg+gelu-mlp", 16, "mlp"),
        ("3davg+frame4+linear", 4, "linear"),
    ],
)
def test_architectures_of_the_release_that_have_an_equal_here(specifier, steps, projector):
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
def test_other_mixers_of_the_release_fit_ours(kind, names, mixer):
    encoders = 1 if kind is None else 2
    translated = translate_fusion(kind, {name: torch.ones(1) for name in names}, encoders)
    own = create_mixer(mixer, 8, encoders, **translated.options).state_dict()
    assert translated.mixer == mixer
    assert {f"mixer.{name}" for name in own} == set(translated.state)


SEEING = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
POLITE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    ("name", "first", "more"),
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
def test_chat_models_get_the_prompt_of_the_release_with_videos_right_after_bos(name, first, more):
    _, tokenizer = tiny_llm(bos="qwen" not in name)
    tokenizer.chat_template = LLMS[name].template
    bos = tokenizer.bos_token or ""
    for talk, wanted in [
        (user_message("Why?", "clip"), first),
        ([*user_message("Why?", "clip", answer="So."), {"role": "user", "content": "And?"}], first + more),
    ]:
        pieces = render(talk, tokenizer).pieces
        said = "".join(tokenizer.decode(piece) if isinstance(piece, list) else VISUAL for piece in pieces)
        assert said == bos + VISUAL + wanted

"""Language models of many kinds: which are refused, which share rows, and that greedy decoding is greedy."""

import json
import re
import threading

import pytest
import torch
from llama_tokenizer import write_llama_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from merv import MultiEncoder, VideoLLM, user_message
from merv.errors import PromptError, WeightsError
from merv.models.llm import LoraOptions, add_lora, check_llm, load_llm, load_tokenizer
from merv.testing import tiny_llm

VIDEO = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
QUESTIONS = [user_message("Who is it?", VIDEO), user_message("And what is that, in the corner?", VIDEO)]
ANSWERED = [
    user_message("Who is it?", VIDEO, answer="A cat."),
    user_message("And what is that, in the corner?", VIDEO, answer="No idea"),
]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_llm(kind, **options):
    torch.manual_seed(0)
    common = {
        "vocab_size": 262,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **options)).eval()
    for parameter in llm.parameters():
        if parameter.std() == 0:  # scales that are initialized to 0 would hide what is behind them
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return llm


def video_llm(llm):
    vision = MultiEncoder(["fake"], grid=(1, 2, 2), output_dim=llm.get_input_embeddings().embedding_dim)
    return VideoLLM(llm, tiny_llm()[1], vision).eval()


ALIBI = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
LOCAL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "window_size": 16,
    "attention_types": [[["global", "local"], 1]],
}
PER_LAYER = {"head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 262}
GEMMA_3N = {
    **SMALL,
    **PER_LAYER,
    "num_kv_shared_layers": 0,
    "intermediate_size": [64, 64],
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA_4 = {**SMALL, **PER_LAYER, "num_kv_shared_layers": 0, "global_head_dim": 8}
FALCON_H1 = {
    **SMALL,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}


@pytest.mark.parametrize(
    ("kind", "options", "shares"),
    [
        ("qwen3", {**SMALL, "head_dim": 8}, True),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
        ("mistral", {**SMALL, "sliding_window": 16}, False),
        ("gemma2", {**SMALL, "head_dim": 8, "sliding_window": 16}, False),
        ("gpt_neo", LOCAL, False),
        ("bloom", ALIBI, False),
        (
            "falcon",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
            False,
        ),
    ],
)
def test_rows_are_shared_where_that_is_exact(kind, options, shares):
    model = video_llm(make_llm(kind, **options))
    assert model.supports_shared_prefix == shares
    separate = [model([[conversation]]).loss_sum for conversation in ANSWERED]
    torch.testing.assert_close(model([ANSWERED]).loss_sum, sum(separate))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("falcon_h1", FALCON_H1), ("gemma3n_text", GEMMA_3N), ("gemma4_text", GEMMA_4)],
)
def test_llm_that_cannot_work_is_refused_by_name(kind, options):
    llm = make_llm(kind, **options)
    with pytest.raises(WeightsError, match=type(llm).__name__):
        check_llm(llm)


def test_checking_leaves_the_modes_of_all_modules():
    llm = tiny_llm()[0]
    llm.model.layers[1].train()
    before = [module.training for module in llm.modules()]
    check_llm(llm)
    assert [module.training for module in llm.modules()] == before


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_conversation_longer_than_the_context_is_refused(kind):
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32} if kind == "gpt2" else SMALL
    model = video_llm(make_llm(kind, **{**options, "max_position_embeddings": 32}))
    long = user_message("Who " * 20, VIDEO)
    with pytest.raises(PromptError, match="32"):
        model.generate([long])
    with pytest.raises(PromptError, match="32"):
        model([[[*long, {"role": "assistant", "content": "A cat."}]]])


def test_generation_ends_at_the_context():
    model = video_llm(make_llm("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=32))
    model.generate([user_message("Who?", VIDEO)], max_new_tokens=100)


OWN_CONFIG = {
    "num_beams": 3,
    "no_repeat_ngram_size": 1,
    "num_return_sequences": 2,
    "guidance_scale": 2.0,
    "stop_strings": ["e"],
    "do_sample": True,
    "temperature": 3.0,
    "repetition_penalty": 5.0,
    "min_new_tokens": 9,
}


def test_greedy_decoding_ignores_the_generation_config_of_the_llm():
    model = video_llm(tiny_llm()[0])
    answers = model.generate(QUESTIONS, max_new_tokens=8)
    for name, value in OWN_CONFIG.items():
        setattr(model.llm.generation_config, name, value)
    before = model.llm.generation_config
    assert model.generate(QUESTIONS, max_new_tokens=8) == answers
    assert model.llm.generation_config is before


def test_end_tokens_of_the_llm_end_an_answer():
    model = video_llm(tiny_llm()[0])
    options = {"max_new_tokens": 8, "return_dict_in_generate": True}
    before = model.generate(QUESTIONS[:1], **options).sequences[0].tolist()
    model.llm.generation_config.eos_token_id = [1, before[2]]
    after = model.generate(QUESTIONS[:1], **options).sequences[0].tolist()
    assert after == before[: before.index(before[2]) + 1]


def test_sampling_options_imply_sampling():
    model = video_llm(tiny_llm()[0])
    greedy = model.generate(QUESTIONS[:1], max_new_tokens=8)
    torch.manual_seed(1)
    assert model.generate(QUESTIONS[:1], max_new_tokens=8, temperature=5.0) != greedy
    assert model.generate(QUESTIONS[:1], max_new_tokens=8, temperature=0) == greedy


def test_generating_nothing_gives_nothing():
    assert video_llm(tiny_llm()[0]).generate([]) == []


@pytest.mark.parametrize("copies", [1, 2])
def test_output_of_transformers_has_the_token_ids_and_scores(copies):
    model = video_llm(tiny_llm()[0])
    options = {"max_new_tokens": 4, "num_beams": copies, "num_return_sequences": copies}
    output = model.generate(QUESTIONS, return_dict_in_generate=True, output_scores=True, **options)
    answers = [model.chat.answer_of(row) for row in output.sequences]
    assert answers == model.generate(QUESTIONS, **options)
    assert len(output.scores) == output.sequences.shape[1] == 4


def test_option_that_is_none_has_its_default():
    model = video_llm(tiny_llm()[0])
    nothing = dict.fromkeys(("max_new_tokens", "temperature", "stopping_criteria", "generation_config"))
    assert model.generate(QUESTIONS, **nothing) == model.generate(QUESTIONS)
    assert "".join(model.stream(QUESTIONS[0], **nothing)) == model.generate(QUESTIONS[:1])[0]


@pytest.mark.parametrize("option", ["generation_config", "inputs_embeds", "attention_mask"])
def test_options_that_merv_sets_are_refused(option):
    model = video_llm(tiny_llm()[0])
    with pytest.raises(PromptError, match=option):
        model.generate(QUESTIONS, **{option: 1})
    with pytest.raises(PromptError, match=option):
        list(model.stream(QUESTIONS[0], **{option: 1}))


@pytest.mark.parametrize("option", ["streamer", "return_dict_in_generate"])
def test_options_that_a_stream_cannot_have_are_refused(option):
    with pytest.raises(PromptError, match=option):
        list(video_llm(tiny_llm()[0]).stream(QUESTIONS[0], **{option: True}))


def test_stream_ends_by_a_stopping_criterion():
    model = video_llm(tiny_llm()[0])
    lengths = []

    def after_three(ids, scores, **_):
        lengths.append(ids.shape[1])
        return torch.tensor([ids.shape[1] >= 3])

    list(model.stream(QUESTIONS[0], max_new_tokens=50, min_new_tokens=50, stopping_criteria=[after_three]))
    assert max(lengths) == 3


def test_closing_a_stream_stops_its_thread():
    model = video_llm(tiny_llm()[0])
    before = set(threading.enumerate())
    stream = model.stream(QUESTIONS[0], max_new_tokens=4000, min_new_tokens=4000)
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_dtype_may_have_the_name_of_torch(dtype, tmp_path):
    tiny_llm(tmp_path / "llm")
    assert load_llm(tmp_path / "llm", dtype)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bf17", torch.int8, None])
def test_unknown_dtype_is_refused(dtype, tmp_path):
    with pytest.raises(WeightsError, match=re.escape(repr(dtype))):
        load_llm(tmp_path, dtype)


def test_llm_that_lacks_tensors_is_refused_with_their_names(tmp_path):
    llm, tokenizer = tiny_llm()
    state = {name: tensor for name, tensor in llm.state_dict().items() if "layers.1.mlp.up" not in name}
    llm.save_pretrained(tmp_path, state_dict=state)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_llm(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "no header", "pickle"])
def test_damaged_llm_is_refused_with_its_folder(tmp_path, damage):
    tiny_llm(tmp_path / "llm")
    file = tmp_path / "llm" / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "no header":
        file.write_bytes(b"\xff" * 100)
    else:
        file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(WeightsError, match="llm"):
        load_llm(tmp_path / "llm")


def test_lora_target_that_matches_nothing_is_refused_beside_one_that_matches():
    with pytest.raises(WeightsError, match="qq_proj"):
        add_lora(tiny_llm()[0], LoraOptions(target_modules=["q_proj", "qq_proj"]))


def test_tokenizer_is_as_its_file_describes_it(tmp_path):
    original = write_llama_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    text = "In a</s>In a</s>In"
    expected = original.encode(text, add_special_tokens=False).ids
    loaded = load_tokenizer(tmp_path)
    assert loaded(text, add_special_tokens=False).input_ids == expected
    loaded.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")(text, add_special_tokens=False).input_ids == expected

"""Check that a model generates its training answers and stops, for many chat templates and classes of LLM.

    python benchmarks/models/conversations.py [--write]

A tiny model with random weights is trained for a few steps on one conversation of two turns and on two single
questions, and then asked them again. --write stores the tables in benchmarks/results/conversations.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, __version__

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from chat_templates import SPECIAL, TEMPLATES

from merv import MultiEncoder, VideoLLM, user_message
from merv.testing import tiny_llm

VIDEO = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
ONE = [
    user_message("Who?", VIDEO, answer="A cat."),
    user_message("Where?", VIDEO, answer="In a tree, high up"),
]
SEVERAL = [*ONE[0], *user_message("And then?", answer="It jumps!")]
STEPS, MAX_STEPS, LEARNED = 30, 150, 0.01  # trained in rounds of 30 steps until the loss is below 0.01

COMMON = {"vocab_size": 263 + len(SPECIAL), "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
LLMS: dict[str, dict[str, Any]] = {
    "llama": LAYERS,
    "qwen2": LAYERS,
    "qwen3": {**LAYERS, "head_dim": 16},
    "mistral": {**LAYERS, "sliding_window": 16},
    "gemma": {**LAYERS, "head_dim": 16},
    "gemma2": {**LAYERS, "head_dim": 16, "sliding_window": 16},
    "gemma3_text": {**LAYERS, "head_dim": 16, "sliding_window": 16},
    "phi3": LAYERS,
    "gpt_oss": {**LAYERS, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": LAYERS,
    "granite": LAYERS,
    "smollm3": LAYERS,
    "glm4": {**LAYERS, "head_dim": 16},
    "gpt2": GPT,
    "gpt_neox": LAYERS,
    "opt": {**LAYERS, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
}


def build(kind: str, template: str) -> VideoLLM:
    """A model whose LLM is random, of class `kind`, with a chat template of `TEMPLATES`."""
    torch.manual_seed(0)
    tokenizer = tiny_llm()[1]
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TEMPLATES[template]
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **LLMS[kind]))
    width = llm.get_input_embeddings().embedding_dim
    return VideoLLM(llm, tokenizer, MultiEncoder(["fake"], grid=(1, 1, 1), output_dim=width))


def train(model: VideoLLM, groups: list) -> int:
    """Train the whole LLM until it has learned the answers; returns the number of steps."""
    model.train_only(["projector", "mixer", "llm"])
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for step in range(1, MAX_STEPS + 1):
        optimizer.zero_grad()
        loss = model(groups).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % STEPS == 0 and loss.item() < LEARNED:
            break
    model.eval()
    return step


def ask(model: VideoLLM, conversation: list) -> bool:
    """Whether each answer of a conversation is generated exactly, in a batch and as a stream, and ends."""
    right = True
    for number, turn in enumerate(conversation):
        if turn["role"] == "assistant":
            history = conversation[:number]
            answers = {*model.generate([history, history]), "".join(model.stream(history))}
            right &= answers == {turn["content"]}
    return right


def agrees(model: VideoLLM, conversations: list) -> bool:
    """Whether exact_match says what generate shows, for right and for wrong answers."""
    for conversation in conversations:
        wrong = [*conversation[:-1], {"role": "assistant", "content": conversation[-1]["content"] + " No."}]
        said = model.exact_match([[conversation], [wrong]])
        if said != [[ask(model, conversation)], [False]]:
            return False
    return True


def row(name: str, model: VideoLLM) -> str:
    """Train and ask a model; a row of the table."""
    steps = train(model, [ONE, [SEVERAL]])
    one_turn = all([ask(model, conversation) for conversation in ONE])
    results = [one_turn, ask(model, SEVERAL), agrees(model, [*ONE, SEVERAL])]
    cells = [name, f"`{model.chat.end_token}`", str(len(model.chat.training_prompts(SEVERAL)))]
    cells += ["yes" if model.supports_shared_prefix else "no", str(steps)]
    cells += ["yes" if result else "**no**" for result in results]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="store the tables in benchmarks/results")
    write = parser.parse_args().write
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the models are tiny
    lines = [
        "# Trained answers are generated, and they stop",
        "",
        f"`python benchmarks/models/conversations.py --write`, torch {torch.__version__}, transformers "
        f"{__version__}, {platform.machine()}, one thread. Sequences: the number that a conversation of two "
        "turns is split into. One turn, two turns: the trained answers are generated, in a batch and as a "
        "stream, and nothing follows. Rows shared: two questions about a video share a row. "
        f"Steps: until the mean loss is below {LEARNED}, checked every {STEPS} steps.",
    ]

    def show(*new: str) -> None:
        lines.extend(new)
        print("\n".join(new), flush=True)

    head = "end token | sequences | rows shared | steps | one turn | two turns | exact_match = generate |"
    line = "|---" * 8 + "|"
    show("", "Chat templates, with a Llama:", "")
    show(f"| template | {head}", line)
    for name in TEMPLATES:
        show(row(name, build("llama", name)))
    show("", "Classes of LLM, with the template `chatml`:", "")
    show(f"| class | {head}", line)
    for kind in LLMS:
        show(row(kind, build(kind, "chatml")))
    if write:
        path = Path(__file__).parents[1] / "results" / "conversations.md"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

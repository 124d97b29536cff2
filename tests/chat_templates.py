"""Small chat templates of every kind that today's language models have.

Each is written for these tests, after the shape of a family's template. `SPECIAL` lists the special tokens;
other markers are plain text to the tokenizer.
"""

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
)


def _turns(turn: str, generation: str, before: str = "", after: str = "") -> str:
    return (
        f"{before}{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{generation}{{% else %}}{after}{{% endif %}}"
    )


def _roles(user: str, assistant: str, generation: str, before: str = "", after: str = "") -> str:
    return _turns(
        f"{{% if m.role == 'assistant' %}}{assistant}{{% else %}}{user}{{% endif %}}",
        generation,
        before,
        after,
    )


CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
OPEN = "<|im_start|>assistant\n"
EMPTY_THINKING = "<think>\n\n</think>\n\n"
THINKING_DROPPED = (
    f"{OPEN}{{% if loop.last %}}{EMPTY_THINKING}{{% endif %}}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
)
LLAMA3 = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"

TEMPLATES: dict[str, str | None] = {
    "no template": None,
    # One end token, and the same text in every later turn.
    "chatml": _turns(CHATML, OPEN),
    "chatml, default system": _turns(
        CHATML,
        OPEN,
        before="{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}",
    ),
    "headers": _turns(LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", before="{{ bos_token }}"),
    "headers, dated": _turns(
        LLAMA3,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        before="{{ bos_token }}Today: {{ strftime_now('%d %b %Y') if strftime_now is defined }}\n",
    ),
    "user and model": _roles(
        "<start_of_turn>user\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n",
        before="{{ bos_token }}",
    ),
    "eos after a newline": _turns("<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n", "<|assistant|>\n"),
    "brackets": _roles(
        "[INST] {{ m.content }} [/INST]", " {{ m.content }}{{ eos_token }}", "", "{{ bos_token }}"
    ),
    "space before the end": _roles(
        "[INST] {{ m.content }} [/INST]", " {{ m.content }} {{ eos_token }}", "", "{{ bos_token }}"
    ),
    "plain words": _roles(
        "USER: {{ m.content }} ", "ASSISTANT: {{ m.content }}{{ eos_token }}", "ASSISTANT:", "{{ bos_token }}"
    ),
    # The beginning of the sequence occurs twice.
    "BOS in every turn": _roles(
        "{{ bos_token }}[INST] {{ m.content }} [/INST]", " {{ m.content }} {{ eos_token }}", ""
    ),
    "BOS twice": _turns(CHATML, OPEN, before="{{ bos_token }}{{ bos_token }}"),
    # The system message is part of the first turn of the user.
    "system merged": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}[INST] {{ ns.system + m.content }} [/INST]{% set ns.system = '' %}"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # A token after the end token.
    "end after end": _turns(
        "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n", after="{{ eos_token }}"
    ),
    "end after end, no newline": _turns(
        "<|{{ m.role }}|>{{ m.content }}<|end|>", "<|assistant|>", after="{{ eos_token }}"
    ),
    "another end in the last turn": _roles(
        "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>",
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}",
        "<|start|>assistant",
    ),
    # No token ends an answer: the next role begins.
    "no end": _turns("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>\n"),
    "no end, plain words": _roles(
        "### Instruction:\n{{ m.content }}\n\n", "### Response:\n{{ m.content }}\n\n", "### Response:\n"
    ),
    "end as plain text": _turns("<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n", "<assistant>"),
    # Thinking is dropped from earlier turns.
    "thinking dropped": _roles(
        CHATML,
        THINKING_DROPPED,
        OPEN,
    ),
    "thinking off": _roles(
        CHATML,
        THINKING_DROPPED,
        f"{OPEN}{EMPTY_THINKING}",
    ),
    "thinking off, never in the history": _roles(CHATML, CHATML, f"{OPEN}{EMPTY_THINKING}"),
    # The prompt opens a thinking block.
    "thinking opened": _roles(
        CHATML,
        THINKING_DROPPED,
        f"{OPEN}<think>\n",
    ),
    "thinking opened, never in the history": _roles(
        "<|User|>{{ m.content }}",
        "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}",
        "<|Assistant|><think>\n",
        before="{{ bos_token }}",
    ),
    # Earlier turns change in other ways.
    "turns are counted": _turns(CHATML, OPEN, before="{{ messages | length // 2 }} turns\n"),
    "last turn is marked": _turns(
        "{% if loop.last %}<|im_start|>last {{ m.role }}\n{{ m.content }}<|im_end|>\n{% else %}"
        + CHATML
        + "{% endif %}",
        "<|im_start|>last assistant\n",
    ),
}

"""Tiny parts: a language model and a video.

For tests, documentation and bug reports: everything here is small, offline and the same
on every machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# A tiny language model ----------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_llm(
    folder: str | Path | None = None, *, chat_template: bool = True, bos: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama of 2 layers, 32 wide, and a tokenizer of single bytes; always the same.

    folder: saved there, for everything that wants the folder of a model.
    chat_template: whether the tokenizer has one, with <|system|>, <|user|>, <|assistant|>.
    bos: whether the tokenizer begins texts with <s>, or has no such token.

    >>> llm, tokenizer = tiny_llm()
    >>> tokenizer.decode(tokenizer("a café").input_ids)
    '<s>a café'
    >>> llm.config.hidden_size
    32
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer(chat_template=chat_template, bos=bos)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.2,  # wide enough that answers differ
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model, tokenizer


def _byte_tokenizer(*, chat_template: bool, bos: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", *(["<s>"] if bos else []), "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    if bos:
        bytewise.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    names: dict[str, Any] = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        **({"bos_token": "<s>"} if bos else {}),
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        **names,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# A tiny video -------------------------------------------------------------------------------


def make_video(
    path: str | Path,
    *,
    frames: int = 16,
    fps: int = 8,
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
) -> Path:
    """Write a video of a white square that crosses a blue ground from left to right.

    size: (width, height) in pixels, even numbers. The container is chosen by the suffix of `path`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     make_video(folder + "/square.mp4").name
    'square.mp4'
    """
    import av

    width, height = size
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)  # a VideoStream, if `codec` is one for video
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = _square(width, height, index / max(1, frames - 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def _square(width: int, height: int, place: float) -> Tensor:
    """RGB uint8 [H, W, 3]; place 0 is at the left, 1 at the right."""
    picture = torch.tensor([20, 40, 160], dtype=torch.uint8).repeat(height, width, 1)
    side = min(width, height) // 3
    left, top = round(place * (width - side)), (height - side) // 2
    picture[top : top + side, left : left + side] = 255
    return picture

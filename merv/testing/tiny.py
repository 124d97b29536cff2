"""A tiny language model and a tiny video, for tests, docs and bug reports: offline and reproducible."""

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
    """Create a tiny Llama with random weights and a byte-level tokenizer; every call gives the same ones.

    Args:
        folder: If given, the model and the tokenizer are also saved in this folder.
        chat_template: Whether the tokenizer has a chat template, with <|system|>, <|user|>, <|assistant|>.
        bos: Whether the tokenizer has a <s> token and starts texts with it.

    Returns:
        The model (2 layers, hidden size 32) and its tokenizer.

    Example:
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
        initializer_range=0.2,  # large enough that different prompts get different answers
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

    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", *(["<s>"] if bos else []), "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: index for index, token in enumerate(special + byte_tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    names: dict[str, Any] = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        **({"bos_token": "<s>"} if bos else {}),
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
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
    """Write a video of a white square that moves from left to right on a blue background.

    Args:
        path: The file to write. Its suffix selects the container format.
        frames: Number of frames.
        fps: Frames per second.
        size: (width, height) in pixels, even numbers.
        codec: Name of an FFmpeg video encoder.

    Returns:
        The path of the video.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     make_video(folder + "/square.mp4").name
        'square.mp4'
    """
    import av

    width, height = size
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)  # a VideoStream, as `codec` is a video codec
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = _square(width, height, index / max(1, frames - 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def _square(width: int, height: int, position: float) -> Tensor:
    """One frame, RGB uint8 [H, W, 3]; position: 0 (left) to 1 (right)."""
    picture = torch.tensor([20, 40, 160], dtype=torch.uint8).repeat(height, width, 1)
    side = min(width, height) // 3
    left, top = round(position * (width - side)), (height - side) // 2
    picture[top : top + side, left : left + side] = 255
    return picture

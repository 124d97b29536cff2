"""The conformance suite finds what it is for; the tiny LLM and video are what they say."""

from pathlib import Path

import pytest
import torch
from torch import nn

from merv.encode import Encoder
from merv.encoders.fake import Fake
from merv.registry import find_encoder
from merv.testing import CHECKS, check_encoder, make_video, tiny_llm
from merv.types import Frames, Grid

ROOT = Path(__file__).parent.parent


class RandomEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels) + torch.rand(())


class TrainableEncoder(Fake):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.requires_grad_(True)


class TrainingEncoder(Fake):
    def train(self, mode=True):
        return nn.Module.train(self, mode)


class NarrowEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels)[..., :-1]


class NanEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels).masked_fill(torch.tensor(True), float("nan"))


class BlindEncoder(Fake):
    def encode(self, pixels):
        return super().encode(torch.zeros_like(pixels))


class BatchEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels) + pixels.mean(dim=(0, 2, 3, 4))[:, None, None, None]


class WholeClipEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels) + pixels.mean(dim=(1, 2, 3, 4))[:, None, None, None, None]


class GridEncoder(Fake):
    """Gives another grid than that of its features: `lost` is what it loses."""

    lost: str

    def forward(self, frames: Frames) -> Grid:
        parts = vars(super().forward(frames))
        return Grid(**{**parts, self.lost: torch.zeros_like(parts[self.lost])})


class TimelessEncoder(GridEncoder):
    lost = "times_s"


class MaskedEncoder(GridEncoder):
    lost = "mask"


class ShiftedEncoder(GridEncoder):
    lost = "extent"


class LambdaEncoder(Fake):
    def build(self):
        super().build()
        self.scale = lambda x: 2 * x


class RaisingEncoder(Fake):
    def encode(self, pixels):
        raise RuntimeError("no sun today")


def failed(encoder: type[Encoder] | Encoder) -> dict[str, str]:
    return {finding.name: finding.message for finding in check_encoder(encoder) if not finding.passed}


@pytest.mark.parametrize("name", ["fake/image", "fake/video"])
def test_a_good_encoder_passes(name):
    name, _, variant = name.partition("/")
    assert failed(find_encoder(name)(variant)) == {}


@pytest.mark.parametrize(
    ("encoder", "name", "said"),
    [
        (RandomEncoder, "is deterministic", "draws random numbers"),
        (TrainableEncoder, "is frozen", "net.weight requires a gradient"),
        (TrainingEncoder, "stays in eval mode", "is in training mode after .train()"),
        (NarrowEncoder, "shape is what the spec says", "are [2, 2, 4, 4, 7]; wanted [2, 2, 4, 4, 8]"),
        (NanEncoder, "features are finite", "are NaN or infinite"),
        (BlindEncoder, "features depend on the pixels", "two different clips have equal features"),
        (BatchEncoder, "batch equals one by one", "they differ by"),
        (WholeClipEncoder, "windows are independent", "they differ by"),
        (TimelessEncoder, "times pass through", "leave those of the frames"),
        (MaskedEncoder, "mask passes through", "cells of a clip without padding are masked"),
        (ShiftedEncoder, "extent is carried", "wanted that of the frames"),
        (LambdaEncoder, "pickles", "lambda"),
        (RaisingEncoder, "features are finite", "RuntimeError: no sun today"),
    ],
)
def test_a_fault_is_found_by_its_check(encoder, name, said):
    assert said in failed(encoder)[name]


def test_one_fault_fails_one_check():
    assert list(failed(ShiftedEncoder)) == ["extent is carried"]


def test_a_class_that_cannot_be_created_fails():
    assert (
        "must define build()" in failed(type("Empty", (Encoder,), {"variants": Fake.variants}))["is created"]
    )


def test_a_wrong_number_of_parameters_is_found():
    fake = Fake()
    fake.more = nn.Linear(10, 10).requires_grad_(False)
    assert failed(fake) == {"spec is consistent": "spec.parameters is 392; the encoder has 502"}


def test_findings_read_as_sentences():
    findings = check_encoder(ShiftedEncoder)
    assert len(findings) == len(CHECKS)
    assert str(findings[0]) == "ok    spec is consistent"
    assert str(next(f for f in findings if not f.passed)).startswith("FAIL  extent is carried: extent is [[0")


def test_the_third_partys_example_passes_without_being_packaged(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "third_party_encoder")
    assert failed(find_encoder("colour_histogram:ColourHistogram")) == {}


def test_the_examples_entry_point_leads_to_its_class():
    text = (ROOT / "examples" / "third_party_encoder" / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."merv.encoders"]\ncolour_histogram = "colour_histogram:ColourHistogram"\n'
        in text
    )


def test_the_tiny_llm_is_always_the_same_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first, _ = tiny_llm()
    torch.rand(1)
    second, _ = tiny_llm()
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("text", ["Where is the dog?", "caf\u00e9 \u72d7\n\t x  y ."])
def test_the_tiny_tokenizer_gives_back_every_text(text):
    _, tokenizer = tiny_llm()
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_tiny_chat_template_marks_who_speaks():
    _, tokenizer = tiny_llm()
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s><|user|>Hi</s><|assistant|>Ho</s><|user|>?</s><|assistant|>"


def test_the_tiny_llm_comes_without_bos_and_template():
    _, tokenizer = tiny_llm(chat_template=False, bos=False)
    assert tokenizer.chat_template is None
    assert tokenizer.bos_token_id is None
    assert len(tokenizer("ab").input_ids) == 2


def test_the_tiny_llm_is_read_back_from_its_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm, tokenizer = tiny_llm(tmp_path)
    ids = tokenizer("hello <|user|>", return_tensors="pt").input_ids
    assert torch.equal(
        AutoTokenizer.from_pretrained(tmp_path)("hello <|user|>", return_tensors="pt").input_ids, ids
    )
    with torch.inference_mode():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, llm(ids).logits)


def test_the_tiny_video_has_the_frames_size_and_times_asked_for(tmp_path):
    import av

    with av.open(str(make_video(tmp_path / "square.mp4", frames=5, fps=4, size=(32, 48)))) as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert frames[0].to_ndarray(format="rgb24").shape == (48, 32, 3)


def test_the_square_of_the_tiny_video_moves_right(tmp_path):
    import av

    with av.open(str(make_video(tmp_path / "square.mp4", frames=6))) as container:
        pictures = [frame.to_ndarray(format="gray").astype(float) for frame in container.decode(video=0)]
    columns = [((picture > 150).sum(0) * range(64)).sum() / (picture > 150).sum() for picture in pictures]
    assert columns == sorted(columns)
    assert columns[-1] - columns[0] > 40

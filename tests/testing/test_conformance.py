"""The conformance checks find faulty encoders; the tiny LLM and video are reproducible."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import nn

from merv.encoders.fake import Fake
from merv.encoding.base import Encoder
from merv.encoding.registry import find_encoder
from merv.encoding.weights import by_library
from merv.errors import EncoderError
from merv.testing import check_encoder, make_video, tiny_llm
from merv.testing.encoder_checks import ENCODER_CHECKS
from merv.testing.results import name_of
from merv.types import EncoderSpec, Frames, Grid, Preset

ROOT = Path(__file__).parents[2]


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


class BatchEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels) + pixels.mean(dim=(0, 2, 3, 4))[:, None, None, None]


class WholeClipEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels) + pixels.mean(dim=(1, 2, 3, 4))[:, None, None, None, None]


class GridEncoder(Fake):
    """Sets the attribute `lost` of its grid to zeros."""

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


class GraphEncoder(Fake):
    """Uses a trainable tensor that is not a parameter."""

    def build(self):
        super().build()
        self.scales = [torch.ones((), requires_grad=True)]

    def encode(self, pixels):
        return super().encode(pixels) * self.scales[0]


class PlainTensorEncoder(Fake):
    def build(self):
        super().build()
        self.offset = torch.rand(self.spec.embed_dim)

    def encode(self, pixels):
        return super().encode(pixels) + self.offset.to(pixels.dtype)


class WrongNumFramesEncoder(Fake):
    variants = {"base": replace(Fake.variants["video"], tubelet_size=4)}


class WrongPatchEncoder(Fake):
    variants = {"base": replace(Fake.variants["image"], patch=5)}


class NoVariantsEncoder(Fake):
    variants = {}


class SeedingEncoder(Fake):
    def build(self):
        super().build()
        torch.manual_seed(7)  # as the original TransNetV2 class does


class SwappedEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels).transpose(2, 3)


class SqueezedTimesEncoder(Fake):
    """Its steps have the right order, but all lie in the first half of the clip."""

    def forward(self, frames: Frames) -> Grid:
        grid = super().forward(frames)
        start_s = grid.times_s[:, :1]
        return replace(grid, times_s=start_s + (grid.times_s - start_s) / 2)


class HalfMaskedEncoder(Fake):
    """Loses one step in the middle."""

    variants = {"video": Fake.variants["video"]}

    def forward(self, frames: Frames) -> Grid:
        grid = super().forward(frames)
        return replace(grid, mask=grid.mask.index_fill(1, torch.tensor([1]), False))


class UntranslatedEncoder(Encoder):
    """A class whose files have other names than its state dict, without `rename`."""

    variants = {
        "base": EncoderSpec(
            "untranslated",
            num_frames=2,
            grid=(2, 2, 2),
            embed_dim=8,
            presets={"squash": Preset("squash", (16, 16))},
            patch=8,
        )
    }

    def build(self):
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
        self.net = DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=16, patch_size=8))

    def encode(self, pixels):
        registers = self.net.config.num_register_tokens
        tokens = self.net(rearrange(pixels, "b t c h w -> (b t) c h w")).last_hidden_state
        return rearrange(tokens[:, 1 + registers :], "(b t) (h w) d -> b t h w d", b=len(pixels), h=2)


class TranslatedEncoder(UntranslatedEncoder):
    def rename(self, state):
        return by_library(self.net, state)


class ExitingEncoder(Fake):
    def encode(self, pixels):
        raise SystemExit("out of paint")


class RaisingEncoder(Fake):
    def encode(self, pixels):
        raise RuntimeError("out of paint")


def failed(encoder: type[Encoder] | Encoder) -> dict[str, str]:
    """Name → message of the checks that fail."""
    return {result.name: result.message for result in check_encoder(encoder) if result.status == "FAIL"}


def test_name_may_have_a_variant():
    assert all(result.passed for result in check_encoder("fake/video"))
    with pytest.raises(EncoderError, match=r"'video'.*'image'"):
        check_encoder("fake/video", variant="image")


@pytest.mark.parametrize("name", ["fake/image", "fake/video"])
def test_correct_encoder_passes(name):
    name, _, variant = name.partition("/")
    assert failed(find_encoder(name)(variant)) == {}


FAULTS = [
    (NoVariantsEncoder, "can be created", "variants = {}"),
    (WrongNumFramesEncoder, "spec is consistent", "8 steps of 4 frames"),
    (WrongPatchEncoder, "spec is consistent", "'merv' into (3, 3) cells"),
    (TrainableEncoder, "is frozen", "net.weight"),
    (GraphEncoder, "is frozen", "not a parameter"),
    (TrainingEncoder, "is frozen", ".train()"),
    (NarrowEncoder, "shape matches the spec", "[2, 2, 4, 4, 7]"),
    (NanEncoder, "shape matches the spec", "NaN"),
    (RaisingEncoder, "shape matches the spec", "RuntimeError: out of paint"),
    (ExitingEncoder, "shape matches the spec", "SystemExit: out of paint"),
    (RandomEncoder, "is deterministic", "random numbers"),
    (BatchEncoder, "clips are independent", "standard deviations"),
    (WholeClipEncoder, "windows are independent", "standard deviations"),
    (TimelessEncoder, "times match the frames", "times_s"),
    (SqueezedTimesEncoder, "times match the frames", "step 1"),
    (MaskedEncoder, "mask matches the frames", "step 0"),
    (HalfMaskedEncoder, "mask matches the frames", "step 1"),
    (ShiftedEncoder, "extent is unchanged", "[0.0, 0.0, 0.0, 0.0]"),
    (PlainTensorEncoder, "state dict is complete", "standard deviations"),
    (SwappedEncoder, "cells are at their pixels", "(0, 0, 3)"),
    (UntranslatedEncoder, "loads what its library saves", "layer.0.attention"),
    (SeedingEncoder, "does not seed torch", "seed to 7"),
]


@pytest.mark.parametrize(("encoder", "check", "value"), FAULTS)
def test_one_fault_fails_one_check(encoder, check, value):
    faults = failed(encoder)
    assert list(faults) == [check]
    assert value in faults[check]


def test_every_check_has_a_faulty_encoder():
    assert {check for _, check, _ in FAULTS} == {name_of(check) for check in ENCODER_CHECKS}


def test_encoder_with_trained_weights_passes(tmp_path):
    torch.save(Fake().net.state_dict(), tmp_path / "weights.pth")
    assert failed(Fake(weights=str(tmp_path / "weights.pth"))) == {}


def test_class_without_build_cannot_be_created():
    no_build = type("NoBuild", (Encoder,), {"variants": Fake.variants})
    assert "build()" in failed(no_build)["can be created"]


def test_wrong_number_of_parameters_is_found():
    fake = Fake()
    fake.more = nn.Linear(10, 10).requires_grad_(False)
    message = failed(fake)["spec is consistent"]
    assert "392" in message
    assert "502" in message


class OneWindow(Fake):
    """Takes a whole clip, but defines only tokens()."""

    variants = {"one": replace(Fake.variants["image"], window_size=0)}
    encode = Encoder.encode

    def tokens(self, windows):
        return windows.flatten(1)[:, None, :8]


class KeepsClassToken(Fake):
    encode = Encoder.encode

    def tokens(self, windows):
        return torch.zeros(len(windows), 17, 8)


@pytest.mark.parametrize(
    ("encoder", "text"), [(OneWindow, "define encode"), (KeepsClassToken, "class and register")]
)
def test_mistakes_in_tokens_are_named(encoder, text):
    with pytest.raises(EncoderError, match=text):
        encoder().encode(torch.zeros(1, 4, 3, 16, 16))


def test_findings_are_printed_with_their_status():
    printed = {result.name: str(result) for result in check_encoder(NanEncoder)}
    assert len(printed) == len(ENCODER_CHECKS)
    assert printed["can be created"] == "ok       can be created"
    assert printed["shape matches the spec"].startswith("FAIL     shape matches the spec: ")
    assert printed["is deterministic"] == "not run  is deterministic: needs 'shape matches the spec'"
    assert printed["loads what its library saves"].startswith("skipped  loads what its library saves: ")


def test_check_that_does_not_apply_is_skipped_with_its_reason():
    (result,) = [result for result in check_encoder(Fake) if result.status != "ok"]
    assert (result.status, result.passed) == ("skipped", True)
    assert "Linear" in result.message


def test_encoder_that_translates_names_loads_what_its_library_saves():
    assert [str(result) for result in check_encoder(TranslatedEncoder) if result.status != "ok"] == []


def test_state_dict_is_also_checked_with_weights_from_a_file(tmp_path):
    torch.save(PlainTensorEncoder().net.state_dict(), tmp_path / "weights.pth")
    encoder = PlainTensorEncoder(weights=str(tmp_path / "weights.pth"))
    assert list(failed(encoder)) == ["state dict is complete"]


# The example of a third-party encoder


def test_example_encoder_passes_without_installation(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "third_party_encoder")
    assert failed(find_encoder("color_histogram:ColorHistogram")) == {}


def test_tests_of_the_example_encoder_pass_once_it_is_installed(plant):
    folder = ROOT / "examples" / "third_party_encoder"
    project = (folder / "pyproject.toml").read_text()
    entry_points = dict(re.findall(r'^(\w+) = "(\w+:\w+)"$', project, re.MULTILINE))
    plant("merv-color-histogram", entry_points, color_histogram=(folder / "color_histogram.py").read_text())
    runpy.run_path(str(folder / "tests" / "test_contract.py"))["test_contract"]()


# The tiny LLM and video


def test_tiny_llm_is_reproducible_and_keeps_the_random_state():
    before = torch.get_rng_state()
    first, _ = tiny_llm()
    torch.rand(1)
    second, _ = tiny_llm()
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("text", ["Where is the dog?", "caf\u00e9 \u72d7\n\t x  y ."])
def test_tiny_tokenizer_round_trips_any_text(text):
    _, tokenizer = tiny_llm()
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_tiny_chat_template_marks_the_roles():
    _, tokenizer = tiny_llm()
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s><|user|>Hi</s><|assistant|>Ho</s><|user|>?</s><|assistant|>"


def test_tiny_llm_without_bos_and_chat_template():
    _, tokenizer = tiny_llm(chat_template=False, bos=False)
    assert tokenizer.chat_template is None
    assert tokenizer.bos_token_id is None
    assert len(tokenizer("ab").input_ids) == 2


def test_tiny_llm_loads_from_its_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm, tokenizer = tiny_llm(tmp_path)
    ids = tokenizer("hello <|user|>", return_tensors="pt").input_ids
    assert torch.equal(
        AutoTokenizer.from_pretrained(tmp_path)("hello <|user|>", return_tensors="pt").input_ids, ids
    )
    with torch.inference_mode():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, llm(ids).logits)


def test_tiny_video_has_the_requested_frames_size_and_rate(tmp_path):
    import av

    with av.open(str(make_video(tmp_path / "square.mp4", frames=5, fps=4, size=(32, 48)))) as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert frames[0].to_ndarray(format="rgb24").shape == (48, 32, 3)


def test_square_of_the_tiny_video_moves_right(tmp_path):
    import av

    with av.open(str(make_video(tmp_path / "square.mp4", frames=6))) as container:
        pictures = [frame.to_ndarray(format="gray").astype(float) for frame in container.decode(video=0)]
    columns = [((picture > 150).sum(0) * range(64)).sum() / (picture > 150).sum() for picture in pictures]
    assert columns == sorted(columns)
    assert columns[-1] - columns[0] > 40

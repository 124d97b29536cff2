"""The conformance suite finds what it is for; the tiny LLM and video are what they say."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from merv.encoders.fake import Fake
from merv.encoding.base import Encoder
from merv.encoding.registry import find_encoder
from merv.testing import check_encoder, contract_test, make_video, tiny_llm
from merv.testing.encoder_checks import ENCODER_CHECKS
from merv.types import Frames, Grid

ROOT = Path(__file__).parents[2]

test_the_fake_keeps_the_contract = contract_test("fake")  # as a plug-in's own tests would say it


@pytest.fixture(autouse=True)
def imports(monkeypatch):
    """What importing a module does, as if it had been seen: test_side_effects.py really looks."""
    found = {}
    monkeypatch.setattr("merv.testing.encoder_checks.of_import", lambda module: found.get(module, ()))
    return found


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


class GraphEncoder(Fake):
    """Trains something in secret."""

    def build(self):
        super().build()
        self.scales = [torch.ones((), requires_grad=True)]

    def encode(self, pixels):
        return super().encode(pixels) * self.scales[0]


class GreedyEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels.clamp_(-1, 1))


class PlainTensorEncoder(Fake):
    def build(self):
        super().build()
        self.offset = torch.rand(self.spec.embed_dim)

    def encode(self, pixels):
        return super().encode(pixels) + self.offset.to(pixels.dtype)


class HomeEncoder(Fake):
    def encode(self, pixels):
        values = super().encode(pixels)
        return values + torch.arange(values.shape[-1], dtype=values.dtype)  # on no device in particular


class CpuEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels).cpu()


class LookingEncoder(Fake):
    """Decides by a number, which the fake GPU does not have; a real one does."""

    def encode(self, pixels):
        return super().encode(pixels) * (2 if pixels.max() > 100 else 1)


class FloatEncoder(Fake):
    def encode(self, pixels):
        return super().encode(pixels).float()


class CoarseEncoder(Fake):
    def encode(self, pixels):
        return torch.sin(1e4 * super().encode(pixels))


class TwoStepsEncoder(Fake):
    variants = {"base": replace(Fake.variants["video"], tubelet_size=4)}


class PatchEncoder(Fake):
    variants = {"base": replace(Fake.variants["image"], patch=5)}


class NewEncoder(Fake):
    contract = "2.0"


class ReseedingEncoder(Fake):
    def build(self):
        super().build()
        torch.manual_seed(7)
        torch.use_deterministic_algorithms(True)  # as TransNetV2's own class does


class DoubleEncoder(Fake):
    def encode(self, pixels):
        torch.set_default_dtype(torch.float64)
        return super().encode(pixels)


class RaisingEncoder(Fake):
    def encode(self, pixels):
        raise RuntimeError("no sun today")


def failed(encoder: type[Encoder] | Encoder) -> dict[str, str]:
    return {finding.name: finding.message for finding in check_encoder(encoder) if not finding.passed}


@pytest.mark.parametrize("name", ["fake/image", "fake/video"])
def test_a_good_encoder_passes(name):
    name, _, variant = name.partition("/")
    assert failed(find_encoder(name)(variant)) == {}


FAULTS = [
    (NewEncoder, "is created", "was made for contract 2.0 of encoders; merv "),
    (TwoStepsEncoder, "spec is consistent", "8 steps of 4 frames (tubelet) are not 16 frames"),
    (PatchEncoder, "spec is consistent", "patches of 5 make (3, 3) of preset 'merv'; the grid is (4, 4)"),
    (GraphEncoder, "is frozen", "features require a gradient"),
    (GreedyEncoder, "leaves its frames alone", "changes frames.pixels in place"),
    (PlainTensorEncoder, "moves between devices", "give it to register_buffer()"),
    (PlainTensorEncoder, "state dict holds all", "differ by"),
    (HomeEncoder, "moves between devices", "device=pixels.device"),
    (CpuEncoder, "moves between devices", "features of frames on a GPU are on cpu"),
    (FloatEncoder, "runs in bfloat16", "features of bfloat16 frames are torch.float32"),
    (CoarseEncoder, "runs in bfloat16", "standard deviations on average"),
    (ReseedingEncoder, "leaves the process alone", "torch's deterministic algorithms and torch's seed"),
    (DoubleEncoder, "leaves the process alone", "torch's default dtype"),
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
    (LambdaEncoder, "pickles and copies", "lambda"),
    (RaisingEncoder, "features are finite", "RuntimeError: no sun today"),
]


@pytest.mark.parametrize(("encoder", "name", "said"), FAULTS)
def test_a_fault_is_found_by_its_check(encoder, name, said):
    assert said in failed(encoder)[name]


def test_work_at_import_is_found(imports):
    imports[ShiftedEncoder.__module__] = ("writes a file", "prints 'hello'")
    assert failed(ShiftedEncoder)["import does no work"].endswith("writes a file, prints 'hello'")


def test_every_check_is_shown_to_fail():
    shown = {name for _, name, _ in FAULTS} | {"import does no work"}
    assert shown == {check.__name__.strip("_").replace("_", " ") for check in ENCODER_CHECKS}


def test_the_settings_that_an_encoder_changes_are_put_back():
    check_encoder(ReseedingEncoder)
    check_encoder(DoubleEncoder)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_what_cannot_be_told_here_is_no_fault():
    findings = {finding.name: str(finding) for finding in check_encoder(LookingEncoder)}
    said, _, error = findings["moves between devices"].partition(", ")
    assert said == "ok    moves between devices (skipped: needs a GPU"
    assert ": " in error  # its name, and what it says
    assert failed(LookingEncoder) == {}


def test_an_encoder_with_its_own_forward_moves_with_all_of_its_frames():
    assert "moves between devices" not in failed(ShiftedEncoder)


def test_an_encoder_of_trained_weights_is_not_created_anew(tmp_path):
    torch.save(Fake().net.state_dict(), tmp_path / "weights.pth")
    findings = {f.name: str(f) for f in check_encoder(Fake(weights=str(tmp_path / "weights.pth")))}
    assert "check its class" in findings["state dict holds all"]


def test_a_check_is_a_test_of_pytest():
    case = contract_test(ShiftedEncoder)
    (mark,) = case.pytestmark
    results = {}
    for check in mark.args[1]:
        try:
            results[mark.kwargs["ids"](check)] = case(check)
        except pytest.fail.Exception as failure:
            results[mark.kwargs["ids"](check)] = str(failure)
    assert {name for name, result in results.items() if result} == {"extent is carried"}
    assert "wanted that of the frames" in results["extent is carried"]


def test_one_fault_fails_one_check():
    assert list(failed(ShiftedEncoder)) == ["extent is carried"]


def test_a_class_that_cannot_be_created_fails():
    assert (
        "must define build()" in failed(type("Empty", (Encoder,), {"variants": Fake.variants}))["is created"]
    )


def test_a_wrong_number_of_parameters_is_found():
    fake = Fake()
    fake.more = nn.Linear(10, 10).requires_grad_(False)
    assert failed(fake)["spec is consistent"] == "spec.parameters is 392; the encoder has 502"


def test_findings_read_as_sentences():
    findings = check_encoder(ShiftedEncoder)
    assert len(findings) == len(ENCODER_CHECKS)
    assert str(findings[0]) == "ok    is created"
    assert str(next(f for f in findings if not f.passed)).startswith("FAIL  extent is carried: extent is [[0")


def test_the_third_partys_example_passes_without_being_packaged(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "third_party_encoder")
    assert failed(find_encoder("colour_histogram:ColourHistogram")) == {}


def test_the_examples_own_tests_pass_where_it_is_installed(plant):
    folder = ROOT / "examples" / "third_party_encoder"
    entry = {"colour_histogram": "colour_histogram:ColourHistogram"}
    plant("merv-color-histogram", entry, colour_histogram=(folder / "colour_histogram.py").read_text())
    case = runpy.run_path(str(folder / "tests" / "test_contract.py"))["test_contract"]
    for check in ENCODER_CHECKS:
        case(check)


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

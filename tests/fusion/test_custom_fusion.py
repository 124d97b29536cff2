"""A mixer and a projector of one's own: by name, in a recipe, saved, loaded, planned, tested, asked."""

import re
import sys
from pathlib import Path

import pytest
import torch
from running import QUIET, make_material
from torch import nn

from merv import Fusion, Mixer, MultiEncoder, Projector, WeightingMixer
from merv.cli.main import main
from merv.errors import BrokenPlugin, CheckpointError, EncoderError, PluginError, ShapeError
from merv.features.store import FeatureStore
from merv.fusion.align import Aligner
from merv.fusion.mixers import CrossAttention, Mean, Scalar
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.models.video_llm import VideoLLM
from merv.testing import check_mixer, check_projector, contract_test, make_video

pytestmark = QUIET
EXAMPLE = Path(__file__).parents[2] / "examples/custom_fusion"
MODULES = ("perceiver", "gated")
OWN = """
from merv.fusion.mixers import Mean
from merv.fusion.projectors import Projector

class Own(Mean):
    \"\"\"A mean of one's own.\"\"\"

class OwnProjector(Projector):
    pass
"""


class Loud(CrossAttention):
    """Only the encoder with the largest weight counts."""

    def weigh(self, reads, mask, question=None):
        weights = super().weigh(reads, mask, question)
        kept = weights * (weights == weights.amax(dim=1, keepdim=True))
        return kept / kept.sum(dim=1, keepdim=True).clamp(min=1e-9)


class Twice(WeightingMixer):
    """A weighted sum, and then something more, in a `forward` of its own."""

    def score(self, reads, mask, question=None):
        return torch.zeros((), device=mask.device)

    def forward(self, streams, mask, question=None):
        tokens, real, weights = super().forward(streams, mask, question)
        return tokens.tanh(), real, weights


class Doubled(Projector):
    def forward(self, features):
        return 2 * self.linear(self.before(features))


test_loud_keeps_the_contract = contract_test(Loud)
test_twice_keeps_the_contract = contract_test(Twice)
test_doubled_keeps_the_contract = contract_test(Doubled)
test_the_gate_keeps_the_contract = contract_test("gate", kind="mixer", hidden=8)


def video() -> torch.Tensor:
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)


def build(**options) -> MultiEncoder:
    return MultiEncoder(["fake", "fake/video"], grid=(2, 2, 2), output_dim=8, **options).eval()


@pytest.fixture
def example(monkeypatch):
    """The folder of the example, as the current one."""
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def own(out: Path, material: Path, *more: str) -> list[str]:
    """The example's recipe with tiny parts."""
    return [
        "--config=recipe.yaml",
        f"--model.llm={material / 'llm'}",
        "--model.encoders=[fake, fake/video]",
        f"--data.train={material / 'data.jsonl'}",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        *more,
    ]


def test_a_mixer_and_a_projector_are_trained_by_a_recipe_saved_loaded_planned_and_asked(
    example, tmp_path, capsys
):
    material = make_material(tmp_path)
    arguments = own(tmp_path, material)
    assert main(["plan", *arguments]) == 0
    assert re.search(r"visual, a video +8\b", capsys.readouterr().out)
    trainer = [f"--trainer.default_root_dir={tmp_path / 'out'}", "--trainer.logger=false"]
    assert main(["fit", *arguments, *trainer, "--trainer.enable_progress_bar=false"]) == 0
    model = VideoLLM.from_pretrained(tmp_path / "out/model")
    assert type(model.fusion.mixer).__name__ == "Perceiver"
    assert type(model.fusion.projectors["fake"]).__name__ == "Gated"
    assert model.vision(video()).tokens.shape[1] == 8
    asked = [str(material / "0.mp4"), "Who?", "--model", str(tmp_path / "out/model")]
    for name in MODULES:
        sys.modules.pop(name)
    assert main(["ask", *asked]) == 2
    assert "merv ask --trust perceiver:Perceiver" in capsys.readouterr().err
    assert not set(MODULES) & set(sys.modules)
    trusted = ["--trust", "perceiver:Perceiver", "--trust", "gated:Gated"]
    assert main(["ask", *asked, *trusted, "--weights"]) == 0
    assert "this mixer has none" in capsys.readouterr().out


@pytest.mark.parametrize(
    "typed", [["mixers", "check", "perceiver:Perceiver"], ["projectors", "check", "gated:Gated"]]
)
def test_the_example_keeps_the_contracts(example, typed, capsys):
    assert main(["plugins", *typed]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_a_registered_mixer_goes_by_its_name_and_is_saved_by_its_path(plant, tmp_path):
    plant("sunny", {"own": "sunny_module:Own"}, "merv.mixers", sunny_module=OWN)
    config = build(mixer="own").fusion.config()
    assert config["mixer"] == "sunny_module:Own"
    assert MIXERS.is_trusted("sunny_module:Own")
    assert "own" in {plugin.name for plugin in MIXERS.plugins()}


def test_a_registered_projector_goes_by_its_name(plant):
    plant("sunny", {"own": "sunny_module:OwnProjector"}, "merv.projectors", sunny_module=OWN)
    assert type(build(projector="own").fusion.projectors["fake"]).__name__ == "OwnProjector"
    assert PROJECTORS.path("own") == "sunny_module:OwnProjector"


@pytest.mark.parametrize(("kind", "given"), [("mixer", Projector), ("projector", Mean), ("mixer", int)])
def test_a_class_of_another_kind_is_refused(kind, given):
    with pytest.raises(BrokenPlugin, match="wanted a subclass of"):
        build(**{kind: given})


def test_options_of_a_projector_are_its_own():
    with pytest.raises(PluginError, match="has no option 'hiden'"):
        build(projector="mlp", projector_options={"hiden": 3})


@pytest.mark.parametrize("options", [{"mixer": Twice}, {"projector": Doubled}])
def test_what_is_more_than_a_weighted_sum_of_projections_is_the_same_in_eval_mode(options):
    fusion, clip = build(**options).fusion, video()
    features = build(**options).features(clip)
    plain = fusion.train()(features).tokens
    torch.testing.assert_close(fusion.eval()(features).tokens, plain)


def test_a_mixer_of_ones_own_is_saved_and_loaded(tmp_path):
    vision = MultiEncoder(["fake"], grid=(2, 2, 2), output_dim=8, mixer=Loud, projector=Doubled)
    vision.save_pretrained(tmp_path / "model")
    again = MultiEncoder.from_pretrained(tmp_path / "model")
    assert type(again.fusion.mixer) is Loud
    clip = video()
    assert torch.equal(again.eval()(clip).tokens, vision.eval()(clip).tokens)


def test_a_class_inside_a_function_cannot_be_saved():
    class Inner(Mean):
        pass

    with pytest.raises(CheckpointError, match="Inner could not be found again"):
        build(mixer=Inner).config()


# Put in by hand -------------------------------------------------------------------------------


def with_projector(vision: MultiEncoder) -> None:
    vision.fusion.projectors["fake"] = Projector(8, 8, norm=False)


def with_mixer(vision: MultiEncoder) -> None:
    vision.fusion.mixer = Mean(8, 2)


def with_aligner(vision: MultiEncoder) -> None:
    vision.aligner = Learned((2, 2, 2))


class Learned(Aligner):
    """An aligner with a weight."""

    def __init__(self, grid, scale=1.0):
        super().__init__(grid)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, grid, *spans):
        out = super().forward(grid, *spans)
        return type(out)(out.values * self.scale, out.times_s, out.extent, out.mask)


def with_another_of_its_kind(vision: MultiEncoder) -> None:
    """Options that leave no trace in names and shapes would be lost."""
    vision.fusion.mixer = CrossAttention(8, 2)


def with_a_layer_more(vision: MultiEncoder) -> None:
    vision.fusion.mixer.extra = nn.Linear(2, 2)


BY_HAND = [with_projector, with_mixer, with_aligner, with_another_of_its_kind, with_a_layer_more]


@pytest.mark.parametrize("by_hand", BY_HAND)
def test_what_loading_could_not_make_again_is_not_saved(by_hand, tmp_path):
    vision = build()
    by_hand(vision)
    with pytest.raises(CheckpointError):
        vision.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_aligner_that_is_put_in_by_hand_is_in_the_key_of_the_store():
    vision, clip, store = build(), video(), FeatureStore()
    keys = {vision.key(clip, "fake")}
    before = vision.features(clip, store=store)["fake"].values
    for scale in (1.0, 2.0):
        vision.aligner = Learned((2, 2, 2), scale).requires_grad_(False)
        keys.add(vision.key(clip, "fake"))
    assert len(keys) == 3
    torch.testing.assert_close(vision.features(clip, store=store)["fake"].values, 2 * before)


class Pooled(Aligner):
    """An aligner whose settings are in a submodule, an attribute and a large plain tensor."""

    def __init__(self, size=2, shift=0.0, table=0.0):
        super().__init__((2, 2, 2))
        self.pool = nn.AvgPool3d(size)
        self._shift = shift
        self.table = torch.zeros(2000)
        self.table[1000] = table


def test_all_that_an_aligner_holds_is_in_the_key():
    vision, clip = build(), video()
    keys = []
    for options in ({}, {"size": 4}, {"shift": 1.0}, {"table": 1.0}, {}):
        vision.aligner = Pooled(**options)
        keys.append(vision.key(clip, "fake"))
    assert len(set(keys)) == 4
    assert keys[0] == keys[-1]
    vision.aligner.train()
    assert vision.key(clip, "fake") == keys[0]
    vision.aligner.function = lambda grid: grid
    with pytest.raises(EncoderError, match="holds a function"):
        vision.key(clip, "fake")


def test_what_a_trained_aligner_makes_is_not_kept():
    vision = build()
    with_aligner(vision)
    with pytest.raises(EncoderError, match="make it a mixer"):
        vision.features(video(), store=FeatureStore())


# The suites find what they are for --------------------------------------------------------------


class Wide(Mean):
    """Says that it makes two tokens a cell."""

    def num_tokens(self, cells):
        return 2 * cells


class Nosy(Mixer):
    """Looks at what is masked."""

    def forward(self, streams, mask, question=None):
        tokens = streams.mean(dim=1).flatten(1, 3)
        return tokens, mask.any(dim=1).flatten(1), None


class Idle(Mean):
    """Has a parameter that does nothing."""

    def __init__(self, width, encoders):
        super().__init__(width, encoders)
        self.idle = nn.Parameter(torch.ones(2))


class Unequal(Mean):
    def weigh(self, reads, mask, question=None):
        return 2 * super().weigh(reads, mask, question)


class Undefined(Scalar):
    """Its gradient is no number where nothing is seen."""

    def weigh(self, reads, mask, question=None):
        grown = self.score(reads, mask).exp().expand(mask.shape) * mask
        return torch.where(mask, grown / grown.sum(dim=1, keepdim=True), 0.0)


class Early(Scalar):
    """Returns early where nothing is seen."""

    def weigh(self, reads, mask, question=None):
        return super().weigh(reads, mask, question) if mask.any() else mask.float()


class Silent(Mean):
    """Says that no token is real."""

    def forward(self, streams, mask, question=None):
        tokens, real, weights = super().forward(streams, mask, question)
        return tokens * 1.0, real & False, weights


class Tempered(Mean):
    """Correct, with a parameter that is one number, and a constructor that looks at numbers."""

    def __init__(self, width, encoders):
        super().__init__(width, encoders)
        self.temperature = nn.Parameter(torch.tensor(torch.ones(()).item()))

    def forward(self, streams, mask, question=None):
        tokens, real, weights = super().forward(streams, mask, question)
        return tokens * self.temperature, real, weights


class Unbiased(Projector):
    """Correct, with a last layer that has no bias."""

    def build(self):
        self.hidden = nn.Identity()
        self.linear = nn.Linear(self.features, self.width, bias=False)

    def scale_to(self, rms):
        nn.init.normal_(self.linear.weight, std=rms / self.features**0.5)


class Normless(Projector):
    def __init__(self, features, width):
        super().__init__(features, width)


test_tempered_keeps_the_contract = contract_test(Tempered)
test_unbiased_keeps_the_contract = contract_test(Unbiased)


class Batchy(Projector):
    def forward(self, features):
        out = super().forward(features)
        return out - out.mean(dim=0, keepdim=True)


class Stubborn(Projector):
    def scale_to(self, rms):
        """Stays as it is."""


class Loose(Projector):
    """Keeps a number that is in no state dict."""

    def build(self):
        super().build()
        self.factor = torch.rand(())

    def before(self, features):
        return super().before(features) * self.factor


@pytest.mark.parametrize(
    ("check", "plugin", "found"),
    [
        (check_mixer, Wide, "output shapes are correct"),
        (check_mixer, Nosy, "masked features are ignored"),
        (check_mixer, Idle, "every parameter gets a gradient"),
        (check_mixer, Undefined, "accepts a clip without features"),
        (check_mixer, Early, "accepts a clip without features"),
        (check_mixer, Silent, "output shapes are correct"),
        (check_projector, Normless, "projector can be created"),
        (check_mixer, Unequal, "weights sum to one over present encoders"),
        (check_projector, Batchy, "vectors are independent"),
        (check_projector, Loose, "projector state dict is complete"),
        (check_projector, Stubborn, "scale to sets the scale"),
    ],
)
def test_a_fault_is_found(check, plugin, found):
    failed = {finding.name: finding.message for finding in check(plugin) if not finding.passed}
    assert failed.get(found)


def test_a_mixer_that_is_not_created_fails_one_check():
    findings = check_mixer("gate", hiden=3)
    assert [finding.passed for finding in findings] == [False]


def test_a_fusion_takes_a_mixer_that_is_made_already_and_a_multi_encoder_does_not():
    assert isinstance(Fusion({"a": 8}, 16, Mean(16, 1)).mixer, Mean)
    with pytest.raises(ShapeError, match="by name or class"):
        build(mixer=Mean(8, 2))


def test_a_clip_of_one_frame_has_as_many_tokens_as_the_mixer_says(example, tmp_path):
    from perceiver import Perceiver

    still = make_video(tmp_path / "a.mp4", frames=1)
    assert build(mixer=Perceiver, mixer_options={"tokens": 3})(still).tokens.shape[1] == 3

"""Custom mixers and projectors: by name, in a recipe, saved, loaded, planned, checked, asked."""

import re
import sys
from pathlib import Path

import pytest
import torch
from running import QUIET, make_material
from torch import nn

from merv import Mixer, MultiEncoder, Projector, WeightingMixer
from merv.cli.main import main
from merv.errors import BrokenPlugin, CheckpointError, EncoderError, PluginError
from merv.features.store import FeatureStore
from merv.fusion.align import Aligner
from merv.fusion.mixers import CrossAttention, Mean, Scalar
from merv.fusion.registry import MIXERS, PROJECTORS
from merv.models.video_llm import VideoLLM
from merv.testing import check_mixer, check_projector, make_video
from merv.testing.fusion_checks import MIXER_CHECKS, PROJECTOR_CHECKS
from merv.testing.results import name_of

pytestmark = QUIET
EXAMPLE = Path(__file__).parents[2] / "examples/custom_fusion"
MODULES = ("perceiver", "gated")
PLUGINS = """
from merv.fusion.mixers import Mean
from merv.fusion.projectors import Projector

class CustomMean(Mean):
    pass

class CustomProjector(Projector):
    pass
"""


class Largest(CrossAttention):
    """Only the encoder with the largest weight counts."""

    def weigh(self, score_inputs, mask, question=None):
        weights = super().weigh(score_inputs, mask, question)
        kept = weights * (weights == weights.amax(dim=1, keepdim=True))
        return kept / kept.sum(dim=1, keepdim=True).clamp(min=1e-9)


class Tanh(WeightingMixer):
    """A weighted sum with a nonlinearity in an overridden `forward`."""

    def score(self, score_inputs, mask, question=None):
        return torch.zeros((), device=mask.device)

    def forward(self, streams, mask, question=None):
        tokens, real, weights = super().forward(streams, mask, question)
        return tokens.tanh(), real, weights


class Doubled(Projector):
    def forward(self, features):
        return 2 * self.linear(self.before(features))


def video() -> torch.Tensor:
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)


def build(**options) -> MultiEncoder:
    return MultiEncoder(["fake", "fake/video"], grid=(2, 2, 2), output_dim=8, **options).eval()


@pytest.fixture
def example(monkeypatch):
    """Run in the folder of the example."""
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def recipe_options(material: Path) -> list[str]:
    """Return options that replace the parts of the example's recipe by tiny ones."""
    return [
        "--config=recipe.yaml",
        f"--model.llm={material / 'llm'}",
        "--model.encoders=[fake, fake/video]",
        f"--data.train={material / 'data.jsonl'}",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
    ]


def test_custom_mixer_and_projector_are_planned_trained_saved_loaded_and_asked(example, tmp_path, capsys):
    material = make_material(tmp_path)
    arguments = recipe_options(material)
    assert main(["plan", *arguments]) == 0
    assert re.search(r"per video +8\b", capsys.readouterr().out)
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
    assert main(["ask", *asked, *trusted, "--mix-weights"]) == 0
    assert "weights: none" in capsys.readouterr().out


@pytest.mark.parametrize(
    "typed", [["mixers", "check", "perceiver:Perceiver"], ["projectors", "check", "gated:Gated"]]
)
def test_example_satisfies_the_contracts(example, typed, capsys):
    assert main(["plugins", *typed]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_registered_mixer_is_found_by_name_and_saved_by_path(plant, tmp_path):
    plant("sunny", {"custom": "sunny_module:CustomMean"}, "merv.mixers", sunny_module=PLUGINS)
    config = build(mixer="custom").fusion.config()
    assert config["mixer"] == "sunny_module:CustomMean"
    assert MIXERS.is_trusted("sunny_module:CustomMean")
    assert "custom" in {plugin.name for plugin in MIXERS.plugins()}


def test_registered_projector_is_found_by_name(plant):
    plant("sunny", {"custom": "sunny_module:CustomProjector"}, "merv.projectors", sunny_module=PLUGINS)
    assert type(build(projector="custom").fusion.projectors["fake"]).__name__ == "CustomProjector"
    assert PROJECTORS.path("custom") == "sunny_module:CustomProjector"


@pytest.mark.parametrize(("kind", "plugin"), [("mixer", Projector), ("projector", Mean), ("mixer", int)])
def test_class_of_another_kind_is_rejected(kind, plugin):
    with pytest.raises(BrokenPlugin, match=plugin.__name__):
        build(**{kind: plugin})


def test_unknown_option_of_a_projector_is_rejected():
    with pytest.raises(PluginError, match="hiden"):
        build(projector="mlp", projector_options={"hiden": 3})


@pytest.mark.parametrize("options", [{"mixer": Tanh}, {"projector": Doubled}])
def test_plugins_that_cannot_be_folded_give_the_same_in_eval_mode(options):
    fusion, clip = build(**options).fusion, video()
    features = build(**options).features(clip)
    plain = fusion.train()(features).tokens
    torch.testing.assert_close(fusion.eval()(features).tokens, plain)


def test_custom_mixer_and_projector_are_saved_and_loaded(tmp_path):
    vision = MultiEncoder(["fake"], grid=(2, 2, 2), output_dim=8, mixer=Largest, projector=Doubled)
    vision.save_pretrained(tmp_path / "model")
    again = MultiEncoder.from_pretrained(tmp_path / "model")
    assert type(again.fusion.mixer) is Largest
    clip = video()
    assert torch.equal(again.eval()(clip).tokens, vision.eval()(clip).tokens)


def test_class_inside_a_function_cannot_be_saved():
    class Inner(Mean):
        pass

    with pytest.raises(CheckpointError, match="Inner"):
        build(mixer=Inner).config()


# Replaced parts -------------------------------------------------------------------------------


def replace_projector(vision: MultiEncoder) -> None:
    vision.fusion.projectors["fake"] = Projector(8, 8, norm=False)


def replace_mixer(vision: MultiEncoder) -> None:
    vision.fusion.mixer = Mean(8, 2)


def replace_aligner(vision: MultiEncoder) -> None:
    vision.aligner = Learned((2, 2, 2))


class Learned(Aligner):
    """An aligner with a weight."""

    def __init__(self, grid, scale=1.0):
        super().__init__(grid)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, grid, *spans):
        out = super().forward(grid, *spans)
        return type(out)(out.values * self.scale, out.times_s, out.extent, out.mask)


def replace_mixer_by_same_class(vision: MultiEncoder) -> None:
    """Its options may differ, even where names and shapes are the same."""
    vision.fusion.mixer = CrossAttention(8, 2)


def add_a_layer(vision: MultiEncoder) -> None:
    vision.fusion.mixer.extra = nn.Linear(2, 2)


def replace_a_parameter(vision: MultiEncoder) -> None:
    vision.fusion.mixer.share = nn.Parameter(torch.zeros(3))


CHANGES = [
    replace_projector,
    replace_mixer,
    replace_aligner,
    replace_mixer_by_same_class,
    add_a_layer,
    replace_a_parameter,
]


@pytest.mark.parametrize("change", CHANGES)
def test_model_with_replaced_parts_is_not_saved(change, tmp_path):
    vision = build()
    change(vision)
    with pytest.raises(CheckpointError):
        vision.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("change", [replace_projector, replace_mixer, add_a_layer, replace_a_parameter])
def test_replaced_parts_stay_replaced_when_an_encoder_is_added(change, tmp_path):
    vision = build()
    change(vision)
    vision.add_encoder("more", "fake")
    with pytest.raises(CheckpointError):
        vision.save_pretrained(tmp_path / "model")


def test_features_of_a_custom_aligner_are_not_stored():
    vision = build()
    replace_aligner(vision)
    assert vision.features(video())
    with pytest.raises(EncoderError, match="Learned"):
        vision.features(video(), store=FeatureStore())


# Faults that the checks find --------------------------------------------------------------------


class Wide(Mean):
    """Claims to make two tokens per cell."""

    def num_tokens(self, cells):
        return 2 * cells


class KeepsWeights(Scalar):
    """Keeps its last weights, for plots."""

    def weigh(self, score_inputs, mask, question=None):
        self.last = super().weigh(score_inputs, mask, question)
        return self.last


class GrowsWrong(Mean):
    """Adds an encoder without its parameter."""

    per_encoder_parameters = {}

    def __init__(self, output_dim, num_encoders):
        super().__init__(output_dim, num_encoders)
        self.scale = nn.Parameter(torch.ones(num_encoders))

    def weigh(self, score_inputs, mask, question=None):
        return super().weigh(score_inputs, mask, question) + 0.0 * self.scale.sum()


class IgnoresMask(Mixer):
    """Uses masked features."""

    def forward(self, streams, mask, question=None):
        tokens = streams.mean(dim=1).flatten(1, 3)
        return tokens, mask.any(dim=1).flatten(1), None


class Unused(Mean):
    """Has an unused parameter."""

    def __init__(self, output_dim, num_encoders):
        super().__init__(output_dim, num_encoders)
        self.unused = nn.Parameter(torch.ones(2))


class Unequal(Mean):
    def weigh(self, score_inputs, mask, question=None):
        return 2 * super().weigh(score_inputs, mask, question)


class WeighsAbsent(Mean):
    """Also reports weights at cells that an encoder does not see."""

    def forward(self, streams, mask, question=None):
        tokens, real, weights = super().forward(streams, mask, question)
        return tokens, real, torch.where(mask, weights, 0.1)


class NanTokens(Mean):
    def forward(self, streams, mask, question=None):
        tokens, real, weights = super().forward(streams, mask, question)
        return tokens / 0.0, real, weights


class NanGradient(Scalar):
    """Has NaN gradients if no encoder sees the clip."""

    def weigh(self, score_inputs, mask, question=None):
        exp = self.score(score_inputs, mask).exp().expand(mask.shape) * mask
        return torch.where(mask, exp / exp.sum(dim=1, keepdim=True), 0.0)


class NoGradient(Scalar):
    """Has no gradients if no encoder sees the clip."""

    def weigh(self, score_inputs, mask, question=None):
        return super().weigh(score_inputs, mask, question) if mask.any() else mask.float()


class AllMasked(Mean):
    """Masks all tokens."""

    def forward(self, streams, mask, question=None):
        tokens, real, weights = super().forward(streams, mask, question)
        return tokens * 1.0, real & False, weights


class Tempered(Mean):
    """Correct, with a scalar parameter and a constructor that cannot run on the meta device."""

    def __init__(self, output_dim, num_encoders):
        super().__init__(output_dim, num_encoders)
        self.temperature = nn.Parameter(torch.tensor(torch.ones(()).item()))

    def forward(self, streams, mask, question=None):
        tokens, real, weights = super().forward(streams, mask, question)
        return tokens * self.temperature, real, weights


class Unbiased(Projector):
    """Correct, with a last layer without bias."""

    def build(self):
        self.hidden = nn.Identity()
        self.linear = nn.Linear(self.input_dim, self.output_dim, bias=False)


class Convolution(Projector):
    """Correct, without `linear`."""

    def build(self):
        self.net = nn.Conv1d(self.input_dim, self.output_dim, 1)

    def forward(self, features):
        return self.net(self.norm(features).flatten(0, -2)[..., None]).view(*features.shape[:-1], -1)

    def init_scale(self, rms):
        nn.init.normal_(self.net.weight, std=rms / self.input_dim**0.5)


class NoInitScale(Convolution):
    init_scale = Projector.init_scale


class NoNormOption(Projector):
    def __init__(self, input_dim, output_dim):
        super().__init__(input_dim, output_dim)


class DependsOnBatch(Projector):
    def forward(self, features):
        out = super().forward(features)
        return out - out.mean(dim=0, keepdim=True)


class MissingState(Projector):
    """Has a tensor that is not in its state dict."""

    def build(self):
        super().build()
        self.factor = torch.rand(())

    def before(self, features):
        return super().before(features) * self.factor


class WrongShape(Projector):
    def forward(self, features):
        return super().forward(features)[..., 1:]


class FoldsWrongly(Doubled):
    """Claims that its `forward` is only `linear(before(features))`."""

    foldable = True


def local_mixer() -> type[Mixer]:
    class Local(Mean):
        """Cannot be imported by another process."""

    return Local


FAULTS = [
    (check_mixer, Wide, "output shapes are correct"),
    (check_mixer, IgnoresMask, "masked features are ignored"),
    (check_mixer, Unused, "every parameter gets a gradient"),
    (check_mixer, WeighsAbsent, "weights sum to one over present encoders"),
    (check_mixer, NanTokens, "output shapes are correct"),
    (check_mixer, NanGradient, "accepts a clip without features"),
    (check_mixer, NoGradient, "accepts a clip without features"),
    (check_mixer, AllMasked, "output shapes are correct"),
    (check_projector, NoNormOption, "can be created"),
    (check_projector, NoInitScale, "scale can be initialized"),
    (check_mixer, Unequal, "weights sum to one over present encoders"),
    (check_projector, DependsOnBatch, "clips are independent"),
    (check_projector, MissingState, "state dict is complete"),
    (check_projector, WrongShape, "output shape is correct"),
    (check_projector, FoldsWrongly, "folded form equals the plain one"),
    (check_mixer, local_mixer(), "can be saved"),
    (check_mixer, GrowsWrong, "an added encoder has the shapes of the constructor"),
]


@pytest.mark.parametrize(("check", "plugin", "failed_check"), FAULTS)
def test_checks_find_faults(check, plugin, failed_check):
    failed = [result.name for result in check(plugin) if result.status == "FAIL"]
    assert failed == [failed_check]


def test_every_check_of_mixers_and_projectors_has_a_faulty_plug_in():
    checks = {name_of(check) for check in (*MIXER_CHECKS, *PROJECTOR_CHECKS)}
    assert {check for _, _, check in FAULTS} == checks


@pytest.mark.parametrize(
    ("check", "plugin"),
    [
        (check_mixer, Largest),
        (check_mixer, Tanh),
        (check_mixer, Tempered),
        (check_mixer, KeepsWeights),
        (check_mixer, "gate"),
        (check_projector, Doubled),
        (check_projector, Unbiased),
        (check_projector, Convolution),
    ],
)
def test_correct_plug_in_passes_all_checks(check, plugin):
    assert [str(result) for result in check(plugin) if not result.passed] == []


def test_checks_that_do_not_apply_are_skipped():
    skipped = [result.name for result in check_mixer("concat") if result.status == "skipped"]
    assert skipped == [
        "weights sum to one over present encoders",
        "every parameter gets a gradient",
        "folded form equals the plain one",
    ]


def test_mixer_that_cannot_be_created_fails_one_check():
    statuses = [result.status for result in check_mixer("gate", hiden=3)]
    assert statuses == ["FAIL", *["not run"] * (len(statuses) - 1)]


def test_perceiver_makes_the_same_number_of_tokens_for_a_still(example, tmp_path):
    from perceiver import Perceiver

    still = make_video(tmp_path / "a.mp4", frames=1)
    assert build(mixer=Perceiver, mixer_options={"tokens": 3})(still).tokens.shape[1] == 3

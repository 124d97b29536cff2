import math
import re
from dataclasses import replace

import pytest
import torch

from merv.errors import PluginError, ShapeError, UnknownPlugin
from merv.fusion.fusion import Fusion
from merv.fusion.registry import MIXERS
from merv.types import WHOLE_PICTURE, Grid

NAMES = [plugin.name for plugin in MIXERS.plugins() if plugin.distribution == "merv"]
WEIGHTING = ["gate", "cross_attention", "mean", "scalar"]


def grids_of(embed_dims: dict[str, int], batch=2, t=4, h=3, w=3) -> dict[str, Grid]:
    return {
        name: Grid(
            torch.randn(batch, t, h, w, embed_dim),
            torch.arange(t, dtype=torch.float64).expand(batch, -1),
            torch.tensor(WHOLE_PICTURE).expand(batch, -1),
            torch.ones(batch, t, h, w, dtype=torch.bool),
        )
        for name, embed_dim in embed_dims.items()
    }


def randomized(fusion: Fusion) -> Fusion:
    """Randomize all parameters, because those that start at zero would hide errors."""
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return fusion


@pytest.mark.parametrize("folded", [False, True])
def test_gate_with_projectors_equals_the_released_formula(folded):
    """Against the formula of the released model, including its key bias."""
    embed_dims, output_dim, hidden = {"a": 24, "b": 40, "c": 16}, 48, 32
    fusion = randomized(
        Fusion(embed_dims, output_dim, "gate", norm=False, mixer_options={"hidden": hidden}, folded=folded)
    )
    grids = grids_of(embed_dims, t=4, h=8, w=8)
    out = fusion(grids)

    gate, key_bias = fusion.mixer, torch.randn(hidden)
    projected = []  # x_e [B, N, L]: Linear on the tokens of each encoder, in order (t h w)
    for name in embed_dims:
        linear = fusion.projectors[name].linear
        projected.append(grids[name].values.flatten(1, 3) @ linear.weight.T + linear.bias)
    means = torch.stack([x.mean(dim=1) for x in projected], dim=1)  # x̄_e [B, E, L]
    query = gate.query @ gate.to_query.weight.T + gate.to_query.bias
    keys = means @ gate.to_key.weight.T + key_bias
    a = torch.softmax(query @ keys.mT / math.sqrt(hidden), dim=-1)[:, 0]  # [B, E]
    expected = sum(a[:, e, None, None] * x for e, x in enumerate(projected))

    torch.testing.assert_close(out.mix_weights[:, :, 0, 0, 0], a, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", WEIGHTING)
def test_folded_equals_plain_with_absent_encoders(mixer):
    fusion = randomized(Fusion({"a": 8, "b": 12, "c": 5}, 16, mixer))
    grids = grids_of({"a": 8, "b": 12, "c": 5})
    grids["a"].mask[1] = False
    grids["b"].mask[0, :2] = False
    plain = fusion.train()(grids)
    folded = fusion.eval()(grids)
    torch.testing.assert_close(folded.tokens, plain.tokens, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(folded.mix_weights, plain.mix_weights)


@pytest.mark.parametrize("mixer", WEIGHTING)
def test_absent_encoders_have_no_weight_and_the_others_sum_to_one(mixer):
    fusion = randomized(Fusion({"a": 8, "b": 8, "c": 8}, 16, mixer))
    grids = grids_of({"a": 8, "b": 8, "c": 8})
    grids["a"].mask[0] = False  # differs by sample
    grids["b"].mask[1] = False
    grids["a"].values[0] = 0
    out = fusion(grids)
    assert out.tokens.isfinite().all()
    assert (out.mix_weights[0, 0] == 0).all()
    assert (out.mix_weights[1, 1] == 0).all()
    torch.testing.assert_close(out.mix_weights.sum(dim=1), torch.ones(2, 4, 3, 3))


@pytest.mark.parametrize("mixer", NAMES)
def test_omitted_encoder_counts_as_absent(mixer):
    fusion = randomized(Fusion({"a": 8, "b": 12}, 16, mixer))
    grids = grids_of({"a": 8, "b": 12})
    one = fusion({"b": grids["b"]})
    grids["a"].mask[:] = False
    grids["a"].values[:] = 0
    both = fusion(grids)
    torch.testing.assert_close(one.tokens, both.tokens)
    assert torch.equal(one.mask, both.mask)


@pytest.mark.parametrize("mixer", NAMES)
def test_cell_without_features_is_masked_and_gives_finite_gradients(mixer):
    fusion = randomized(Fusion({"a": 8, "b": 8}, 16, mixer))
    grids = grids_of({"a": 8, "b": 8}, batch=1)
    for grid in grids.values():
        grid.mask[:, 0] = False
    out = fusion.train()(grids)
    assert not out.mask[:, :9].any()
    out.tokens[out.mask].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fusion.parameters())


@pytest.mark.parametrize("mixer", sorted(set(NAMES) - {"mean"}))
def test_every_parameter_of_a_mixer_gets_a_gradient(mixer):
    fusion = randomized(Fusion({"a": 8, "b": 8}, 16, mixer)).train()
    fusion(grids_of({"a": 8, "b": 8})).tokens.square().sum().backward()
    assert [n for n, p in fusion.mixer.named_parameters() if p.grad is None] == []


def test_concat_gives_one_token_per_encoder_and_cell():
    fusion = Fusion({"a": 8, "b": 8}, 16, "concat")
    out = fusion(grids_of({"a": 8, "b": 8}))
    assert out.tokens.shape == (2, 2 * 36, 16)
    assert out.positions.shape == (2, 2 * 36, 3)
    assert out.mix_weights is None


def test_concat_channels_is_a_linear_map_of_all_channels():
    fusion = Fusion({"a": 8, "b": 8}, 16, "concat_channels", norm=False)
    grids = grids_of({"a": 8, "b": 8})
    streams = [fusion.projectors[n](grids[n].values).flatten(1, 3) for n in "ab"]
    torch.testing.assert_close(fusion(grids).tokens, fusion.mixer.linear(torch.cat(streams, dim=-1)))


def test_cross_attention_starts_as_the_mean():
    grids = grids_of({"a": 8, "b": 8})
    fusion = Fusion({"a": 8, "b": 8}, 16, "cross_attention")
    torch.testing.assert_close(fusion(grids).mix_weights, torch.full((2, 2, 4, 3, 3), 0.5))


def test_permuting_time_permutes_the_weights_of_cross_attention():
    fusion = randomized(Fusion({"a": 8, "b": 8}, 16, "cross_attention"))
    grids = grids_of({"a": 8, "b": 8})
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {n: Grid(g.values[:, order], g.times_s, g.extent, g.mask) for n, g in grids.items()}
    torch.testing.assert_close(fusion(shuffled).mix_weights, fusion(grids).mix_weights[:, :, order])


def test_the_question_changes_the_weights_when_conditioned():
    fusion = randomized(Fusion({"a": 8, "b": 8}, 16, "cross_attention", mixer_options={"conditioned": True}))
    grids = grids_of({"a": 8, "b": 8})
    one, other = fusion(grids, torch.randn(2, 16)), fusion(grids, torch.randn(2, 16))
    assert (one.mix_weights - other.mix_weights).abs().max() > 0.01


def test_conditioned_mixer_needs_a_question():
    fusion = Fusion({"a": 8}, 16, "cross_attention", mixer_options={"conditioned": True})
    with pytest.raises(ShapeError, match=r"\[B, 16\]"):
        fusion(grids_of({"a": 8}))


def learn_to_switch(mixer: str, steps: int = 150) -> tuple[float, torch.Tensor]:
    """Train on clips where one encoder is right in the first half and the other in the second half.

    A linear layer that all cells share has to classify which of 4 patterns is shown. In its other half, an
    encoder shows a random pattern. Returns the accuracy on new clips and the mix weights.
    """
    torch.manual_seed(1)
    patterns = torch.randn(4, 12)
    fusion = Fusion({"a": 13, "b": 13}, 16, mixer, norm=False, mixer_options={"hidden": 32})
    classifier = torch.nn.Linear(16, 4)
    optimizer = torch.optim.Adam([*fusion.parameters(), *classifier.parameters()], lr=2e-2)

    def clips(batch: int) -> tuple[dict[str, Grid], torch.Tensor]:
        truth = torch.randint(4, (batch, 8))
        shown = {name: torch.randint(4, (batch, 8)) for name in "ab"}
        shown["a"][:, :4], shown["b"][:, 4:] = truth[:, :4], truth[:, 4:]
        is_right = {"a": (torch.arange(8) < 4).float(), "b": (torch.arange(8) >= 4).float()}
        values = {
            n: torch.cat([patterns[shown[n]], is_right[n].expand(batch, 8)[..., None]], dim=-1) for n in "ab"
        }
        grids = grids_of({"a": 13, "b": 13}, batch, 8, 1, 1)
        return {
            n: Grid(values[n][:, :, None, None], g.times_s, g.extent, g.mask) for n, g in grids.items()
        }, truth

    for _ in range(steps):
        grids, truth = clips(64)
        loss = torch.nn.functional.cross_entropy(
            classifier(fusion(grids).tokens).flatten(0, 1), truth.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    grids, truth = clips(256)
    out = fusion.eval()(grids)
    return (classifier(out.tokens).argmax(dim=-1) == truth).float().mean().item(), out.mix_weights.mean(
        dim=(0, 3, 4)
    )


def test_cross_attention_learns_to_switch_between_encoders_where_gate_cannot():
    accuracy, weights = learn_to_switch("cross_attention")
    gate_accuracy, _ = learn_to_switch("gate")
    assert accuracy > 0.95
    assert gate_accuracy < 0.85
    assert weights[0, :4].min() > 0.8  # the first encoder has most weight in the first half
    assert weights[1, 4:].min() > 0.8


def test_unknown_mixer_suggests_the_nearest_name():
    with pytest.raises(UnknownPlugin, match="gate"):
        MIXERS.create("gat", 8, 2)


def test_unaligned_features_are_rejected():
    fusion = Fusion({"a": 8, "b": 8}, 16)
    grids = {**grids_of({"a": 8}), **grids_of({"b": 8}, t=5)}
    with pytest.raises(ShapeError, match=re.escape("'b': [2, 5, 3, 3]")):
        fusion(grids)


def test_features_of_an_unknown_encoder_are_rejected():
    with pytest.raises(ShapeError, match=r"\bb\b"):
        Fusion({"a": 8}, 16)(grids_of({"b": 8}))


def rms(tokens: torch.Tensor) -> float:
    return tokens.square().mean().sqrt().item()


@pytest.mark.parametrize("folded", [False, True])
def test_tokens_keep_their_scale_when_projectors_grow(folded):
    fusion = Fusion({"a": 512}, 64, "mean", folded=folded)
    fusion.init_scale(0.1)
    fusion.projectors["a"].linear.weight.data *= 100
    assert rms(fusion(grids_of({"a": 512})).tokens) == pytest.approx(0.1, rel=1e-4)


def test_without_norm_tokens_only_start_at_the_scale():
    fusion = Fusion({"a": 512}, 64, "mean", norm=False)
    fusion.init_scale(0.1)
    assert rms(fusion(grids_of({"a": 512})).tokens) == pytest.approx(0.1, rel=0.1)
    fusion.projectors["a"].linear.weight.data *= 100
    assert rms(fusion(grids_of({"a": 512})).tokens) == pytest.approx(10, rel=0.1)


def test_token_of_a_cell_without_features_is_zero():
    fusion = Fusion({"a": 8}, 16, "mean")
    grid = grids_of({"a": 8})["a"]
    masked = replace(grid, mask=torch.zeros_like(grid.mask))
    assert fusion({"a": masked}).tokens.abs().max() == 0


@pytest.mark.parametrize(("name", "option"), [("gate", "hiden"), ("mean", "hidden")])
def test_unknown_option_of_a_mixer_is_rejected(name, option):
    with pytest.raises(PluginError, match=f"'{name}'.*'{option}'"):
        MIXERS.create(name, 8, 2, **{option: 3})


@pytest.mark.parametrize("question", [None, "what?", torch.zeros(1, 7), torch.zeros(8)])
def test_question_of_another_shape_is_rejected(question):
    fusion = Fusion({"a": 4, "b": 4}, 8, "cross_attention", mixer_options={"conditioned": True})
    with pytest.raises(ShapeError, match=r"\[B, 8\]"):
        fusion(grids_of({"a": 4, "b": 4}, batch=1), question)

"""Training steps: losses, gradients, which parts are trained, added encoders, quantized LLMs."""

import pytest
import torch

from merv import create_encoder
from merv.errors import (
    CheckpointError,
    EncoderError,
    MissingDependency,
    ShapeError,
    TrainingError,
    WeightsError,
)
from merv.fusion.mixers import NEW_ENCODER_LOGIT, ConcatChannels
from merv.fusion.registry import MIXERS
from merv.models.chat import user_message
from merv.models.llm import LoraOptions, check_same, identity, load_llm, set_gradient_checkpointing
from merv.models.multi_encoder import MultiEncoder
from merv.models.video_llm import VideoLLM
from merv.testing import tiny_llm
from merv.utils.torch_modules import device_and_dtype


def video(frames: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (frames, 3, 32, 32), dtype=torch.uint8)


def build(mixer: str = "cross_attention", encoders=("fake", "fake/video"), **options) -> VideoLLM:
    llm, tokenizer = tiny_llm()
    vision = MultiEncoder(
        list(encoders), grid=(2, 1, 1), output_dim=llm.config.hidden_size, mixer=mixer, mixer_options=options
    )
    return VideoLLM(llm, tokenizer, vision).train()


def groups() -> list:
    clip, other = video(), video()
    return [
        [user_message("What?", clip, answer="a cat"), user_message("Who is that, then?", clip, answer="b")],
        [user_message("Which?", other, answer="c")],
        [user_message("No video here.", answer="right")],
        [user_message("What is longer than the others by far, and why?", other, answer="this one is")],
    ]


def gradients(model: VideoLLM) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# The loss ----------------------------------------------------------------------------------


def test_losses_of_parts_sum_to_the_loss_of_the_batch():
    model, batch = build(), groups()
    whole = model(batch)
    parts = [model([group]) for group in batch]
    assert whole.num_tokens == sum(part.num_tokens for part in parts)
    assert torch.allclose(whole.loss_sum, sum(part.loss_sum for part in parts), rtol=1e-5)
    assert torch.allclose(whole.loss, whole.loss_sum / whole.num_tokens)


@pytest.mark.parametrize("packed_length", [60, 130, 1000])
def test_samples_packed_in_one_row_do_not_attend_to_each_other(packed_length):
    model, batch = build(), groups()
    apart = model(batch)
    rows = len(model.prepare(model.render(batch))[0].ids)
    packed, _ = model.prepare(model.render(batch), packed_length=packed_length)
    assert len(packed.ids) < rows
    together = model(batch, packed_length=packed_length)
    assert together.num_tokens == apart.num_tokens
    assert torch.allclose(together.loss_sum, apart.loss_sum, rtol=1e-5)


def test_group_longer_than_packed_length_gets_its_own_row():
    model = build()
    assert len(model.prepare(model.render(groups()), packed_length=8)[0].ids) == 4


@pytest.mark.parametrize("batch", [[], [[user_message("Only text.", answer="yes")]]])
@pytest.mark.parametrize("options", [{}, {"conditioned": True}])
@pytest.mark.parametrize("part", ["lora", "llm"])
def test_batch_without_videos_gives_every_trained_parameter_a_gradient(batch, options, part):
    model = build(**options)
    model.add_lora(LoraOptions(r=2))
    model.train_only(["projector", "mixer", part])
    model(batch).loss_sum.backward()
    assert all(gradient is not None for gradient in gradients(model).values())
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_gradient_checkpointing_gives_the_same_gradients_with_less_memory():
    model, batch = build(), groups()
    model(batch).loss_sum.backward()
    before = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    model.llm.eval()
    set_gradient_checkpointing(model.llm, True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = model(batch).loss_sum
    with_checkpointing, saved = sum(saved), []
    loss.backward()
    assert all(
        torch.allclose(before[name], gradient, atol=1e-6) for name, gradient in gradients(model).items()
    )
    set_gradient_checkpointing(model.llm, False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        _ = model(batch).loss_sum
    assert with_checkpointing < sum(saved) / 2
    assert not any(module.training for module in model.llm.modules())


# What is trained ---------------------------------------------------------------------------


def test_encoder_is_trained_by_name():
    model = build()
    model.train_only(["fake", "projector"])
    model([[user_message("What?", video(), answer="a cat")]]).loss_sum.backward()
    learned = {name for name, gradient in gradients(model).items() if gradient.abs().sum() > 0}
    assert any(name.startswith("vision.encoders.fake.") for name in learned)
    assert not any(name.startswith("vision.encoders.fake_video.") for name in learned)


def test_trained_encoder_is_saved(tmp_path):
    llm, tokenizer = tiny_llm(tmp_path / "llm")
    llm, tokenizer = load_llm(tmp_path / "llm")
    model = VideoLLM(
        llm, tokenizer, MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=llm.config.hidden_size)
    )
    model.train_only(["fake"])
    with torch.no_grad():
        for parameter in model.vision.encoder("fake").parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "model")
    again = VideoLLM.from_pretrained(tmp_path / "model")
    state = again.vision.encoder("fake").state_dict()
    assert all(torch.equal(t, state[name]) for name, t in model.vision.encoder("fake").state_dict().items())


def test_part_of_a_trained_part_is_an_error():
    with pytest.raises(TrainingError, match=r"projector\.fake"):
        build().train_only(["projector", "projector.fake"])


def test_weights_trained_in_an_earlier_stage_are_saved_by_the_next(tmp_path):
    tiny_llm(tmp_path / "llm")
    llm, tokenizer = load_llm(tmp_path / "llm")
    model = VideoLLM(
        llm, tokenizer, MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=llm.config.hidden_size)
    )
    model.train_only(["llm"])
    with torch.no_grad():
        llm.model.norm.weight.add_(1.0)
    model.save_pretrained(tmp_path / "one")
    second = VideoLLM.from_pretrained(tmp_path / "one")
    second.train_only(["projector"])
    second.save_pretrained(tmp_path / "two")
    again = VideoLLM.from_pretrained(tmp_path / "two")
    assert torch.equal(again.llm.model.norm.weight, llm.model.norm.weight)


def test_misspelled_part_suggests_the_nearest():
    with pytest.raises(TrainingError, match=r"projecter.*projector\.fake"):
        build().train_only(["projecter.fake"])


# Added encoders ----------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["cross_attention", "scalar", "concat_channels"])
def test_added_encoder_hardly_changes_the_tokens(mixer):
    model, clip = build(mixer).eval(), video()
    before = model.vision(clip).tokens
    model.add_encoder("third", create_encoder("fake"))
    after = model.vision(clip).tokens
    assert (after - before).norm() / before.norm() < 0.1
    if mixer != "concat_channels":
        share = float(torch.tensor(NEW_ENCODER_LOGIT).exp())
        assert model.vision(clip).mix_weights[:, 2].max() < 1.1 * share / 2


def test_only_the_share_of_the_new_encoder_is_trained():
    model = build()
    torch.nn.init.normal_(model.fusion.mixer.gain)
    model.add_encoder("third", create_encoder("fake"))
    model.train_only(["projector.third", "mixer.third"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    for _ in range(3):
        model(groups()).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    moved = {name for name, where in changed.items() if where.any()}
    assert moved == {
        "vision.fusion.projectors.third.linear.weight",
        "vision.fusion.projectors.third.linear.bias",
        "vision.fusion.mixer.key_of_encoder",
        "vision.fusion.mixer.share",
    }
    assert not changed["vision.fusion.mixer.share"][:2].any()
    assert not changed["vision.fusion.mixer.key_of_encoder"][:2].any()


def test_gate_has_no_part_per_encoder_but_accepts_new_encoders():
    model = build("gate", hidden=16)
    model.add_encoder("third", create_encoder("fake"))
    assert model.vision(video()).mix_weights.shape[1] == 3
    with pytest.raises(TrainingError, match=r"mixer\.third"):
        model.train_only(["mixer.third"])


def test_added_encoder_moves_to_the_device_and_keeps_its_dtype():
    model = MultiEncoder(["fake"], grid=(2, 2, 2)).to("meta")
    model.add_encoder("third", create_encoder("fake").bfloat16())
    assert device_and_dtype(model.encoder("third")) == (torch.device("meta"), torch.bfloat16)


def test_mixer_that_cannot_add_an_encoder_is_an_error():
    with pytest.raises(ShapeError, match="ConcatChannels"):
        MIXERS.create("concat_channels", 8, 2, norm=True).add_encoder()
    assert isinstance(MIXERS.create("concat_channels", 8, 2), ConcatChannels)


def test_added_encoder_needs_a_new_name():
    with pytest.raises(EncoderError, match="'fake'"):
        build().add_encoder("fake", create_encoder("fake"))


# Quantized language models -----------------------------------------------------------------


def test_unknown_quantization_is_an_error(tmp_path):
    tiny_llm(tmp_path / "llm")
    with pytest.raises(WeightsError, match="int3"):
        load_llm(tmp_path / "llm", quantize="int3")


def test_missing_bitsandbytes_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("merv.models.llm.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="qlora"):
        load_llm(tmp_path / "llm", quantize="nf4")


def test_quantized_llm_trains_a_lora_and_loads_again(tmp_path):
    tiny_llm(tmp_path / "llm")
    llm, tokenizer = load_llm(tmp_path / "llm", quantize="nf4")
    model = VideoLLM(
        llm, tokenizer, MultiEncoder(["fake"], grid=(2, 1, 1), output_dim=llm.config.hidden_size)
    ).train()
    assert llm.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    model.add_lora(LoraOptions(r=2))
    model.train_only(["projector", "mixer", "lora"])
    model([[user_message("What?", video(), answer="a cat")]]).loss_sum.backward()
    assert all(gradient is not None for gradient in gradients(model).values())
    model.save_pretrained(tmp_path / "model")
    for how in ("nf4", None):
        again = VideoLLM.from_pretrained(tmp_path / "model", quantize=how)
        assert all(
            torch.equal(tensor, again.trainable_state_dict()[name])
            for name, tensor in model.trainable_state_dict().items()
        )


def test_quantized_llm_is_identified_by_its_unquantized_weights(tmp_path):
    llm, _ = tiny_llm()
    saved = {**identity(llm), "quantize": "nf4"}
    check_same(saved, identity(llm), "here")
    with torch.no_grad():
        llm.get_input_embeddings().weight.mul_(2)
    with pytest.raises(CheckpointError, match="here"):
        check_same(saved, identity(llm), "here")

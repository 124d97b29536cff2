"""Helpers for torch modules, and the speed of bfloat16."""

import pytest
import torch
from torch import nn

from merv.utils import torch_modules
from merv.utils.torch_modules import bfloat16_is_slow, without_weights


@pytest.mark.parametrize(("bfloat16_s", "slow"), [(0.03, True), (0.002, False), (0.0005, False)])
def test_bfloat16_is_slow_if_it_takes_many_times_as_long(monkeypatch, bfloat16_s, slow):
    seconds = {torch.float32: 0.001, torch.bfloat16: bfloat16_s}
    monkeypatch.setattr(torch_modules, "_matmul_s", seconds.get)
    assert bfloat16_is_slow() == slow


def test_matmul_is_timed():
    assert torch_modules._matmul_s(torch.float32) > 0


def test_module_that_reads_its_weights_is_built_on_the_cpu():
    state = torch.get_rng_state()
    built = without_weights(lambda: nn.Linear(2, int(torch.ones(()).item()) + 1))
    assert built.weight.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
    assert without_weights(lambda: nn.Linear(2, 2)).weight.is_meta

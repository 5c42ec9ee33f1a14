"""Model FLOPs against torch's own counter and a published speed, and the peak they are compared with."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cayley_interp import CayleyGPT
from tests.training.configs import LEVELS, gpt
from training.flops import (
    bottleneck_flops_per_token,
    datasheet_flops,
    flops_per_token,
    measured_flops,
    peak_flops,
)
from training.recipes import RECIPES


@pytest.mark.parametrize("changes", [{}, {"n_layers": 3, "d_model": 32, "n_ctx": 128, "d_vocab": 300}])
def test_they_are_what_a_step_of_the_vanilla_model_takes(changes):
    config = gpt(**changes)
    model = CayleyGPT(config)
    windows = torch.zeros(2, config.n_ctx + 1, dtype=torch.int64)
    # The plain products of attention: the fused kernel computes one of them a second time on the way back.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(windows).mean().backward()
    assert counter.get_total_flops() == flops_per_token(config) * 2 * config.n_ctx


def test_a_bottleneck_is_no_part_of_them():
    assert flops_per_token(gpt(levels=LEVELS)) == flops_per_token(gpt())
    assert bottleneck_flops_per_token(gpt()) == 0
    # "6,8,0;9,16,32" at d = 64 in 2 layers: a transform, 8 x 8 candidates, 24 active features.
    assert bottleneck_flops_per_token(gpt(levels=LEVELS)) == 2 * 64 * (6 + 2 * 64 + 6 * 24)


def test_the_published_speed_is_a_plausible_share_of_eight_a100():
    config = RECIPES["cayley-small-2L-mlp_in-20B"][1].model
    peak = datasheet_flops("NVIDIA A100-SXM4-80GB", "bf16")
    assert peak == 312e12
    mfu = 572_000 * flops_per_token(config) / (8 * peak)
    assert mfu == pytest.approx(0.313, abs=5e-4)
    without_attention = flops_per_token(replace(config, n_ctx=0)) / flops_per_token(config)
    assert mfu * without_attention == pytest.approx(0.278, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA H200", "fp64", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_the_table_is_looked_up_by_name(name, precision, peak):
    assert datasheet_flops(name, precision) == peak


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_elsewhere_the_peak_is_measured(precision):
    peak = peak_flops(torch.device("cpu"), precision)
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e14


def test_measuring_draws_no_random_number():
    before = torch.get_rng_state()
    measured_flops(torch.device("cpu"), torch.float32)
    assert torch.equal(before, torch.get_rng_state())

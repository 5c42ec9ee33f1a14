"""The schedule at its corners, and which weights go to which optimiser."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cayley_interp import CayleyGPT, CayleyGPTConfig
from training.optim import (
    Schedule,
    cold_stop,
    first_schedule,
    linear_warmdown,
    make_optimizers,
    set_learning_rates,
    warmdown_start,
)
from training.recipes import OptimConfig, RunConfig

PUBLISHED = {"warmup": 200, "peak": 1.2e-2, "minimum": 1.5e-4}
CONFIG = CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=8, d_vocab=32, levels="4,2,0;6,2,4")


def test_published_schedule_at_its_corners():
    def rate(step):
        return linear_warmdown(step, Schedule(warmdown_start(12_716, 0.9), 12_716), **PUBLISHED)

    assert rate(0) == pytest.approx(1.2e-2 / 200)
    assert rate(99) == pytest.approx(0.6e-2)
    assert rate(199) == rate(200) == rate(1270) == rate(1271) == 1.2e-2
    assert rate(1272) < 1.2e-2
    assert (rate(6993) + rate(6994)) / 2 == pytest.approx((1.2e-2 + 1.5e-4) / 2)
    assert rate(12_716) == pytest.approx(1.5e-4)


@given(st.integers(1, 5000), st.integers(0, 300), st.floats(0, 1))
def test_rates_stay_between_zero_and_the_peak_and_fall_at_the_end(total, warmup, frac):
    schedule = Schedule(warmdown_start(total, frac), total)
    rates = [linear_warmdown(s, schedule, warmup=warmup, peak=1.0, minimum=0.1) for s in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    falling = rates[max(warmup, schedule.start) :]
    assert all(a >= b for a, b in pairwise(falling))


def cold(**changes) -> RunConfig:
    optim = OptimConfig(warmup=10, warmdown_frac=0.6)
    return RunConfig("cold", CONFIG, optim=optim, max_steps=500, target_val_loss=3.0, target_margin=0.5, **changes)


def test_a_planned_schedule_hears_nothing_of_the_loss():
    run = RunConfig("planned", CONFIG, max_steps=500)
    assert first_schedule(run) == Schedule(250, 500)
    assert cold_stop(first_schedule(run), run, 400, 0.1) == (Schedule(250, 500), None)


def test_a_cold_stop_is_flat_then_a_warm_down_of_its_share_of_the_whole():
    flat = first_schedule(cold())
    assert linear_warmdown(499, flat, warmup=10, peak=1.0, minimum=0.1) == 1
    assert cold_stop(flat, cold(), 100, 3.51) == (flat, None)
    assert cold_stop(flat, cold(), 5, 3.0) == (flat, None)  # still warming up
    schedule, decision = cold_stop(flat, cold(), 100, 3.5)
    assert schedule == Schedule(100, 250)  # 150 of 250 steps are 0.6
    assert decision
    assert "warm-down to step 250" in decision
    assert linear_warmdown(175, schedule, warmup=10, peak=1.0, minimum=0.1) == pytest.approx(0.55)


def test_a_cold_stop_ends_at_the_target_or_with_its_warm_down():
    schedule = Schedule(100, 250)
    assert cold_stop(schedule, cold(), 150, 3.01) == (schedule, None)
    reached, decision = cold_stop(schedule, cold(), 200, 3.0)
    assert reached == Schedule(100, 200)
    assert "the target 3.0 is reached" in str(decision)
    done, decision = cold_stop(schedule, cold(), 250, 3.25)
    assert done == schedule
    assert "0.2500 above" in str(decision)


def test_a_cold_stop_that_max_steps_overtakes_says_so():
    schedule, decision = cold_stop(first_schedule(cold()), cold(), 400, 3.5)
    assert schedule == Schedule(400, 500)
    assert "cut short" in str(decision)
    for val_loss in (3.6, float("nan")):
        schedule, decision = cold_stop(first_schedule(cold()), cold(), 500, val_loss)
        assert schedule.end == 500
        assert str(decision).startswith("NOT ANNEALED")


def test_muon_has_the_matrices_and_adamw_the_rest():
    model = CayleyGPT(CONFIG)
    muon, adamw = make_optimizers(model, OptimConfig())
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for p in muon.param_groups[0]["params"]}
    in_adamw = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    kinds = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc_in", "mlp.fc_out")
    assert in_muon == {f"layers.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert in_adamw == set(names.values()) - in_muon
    assert {"tok.weight", "wpe.weight", "norm_f.weight", "layers.0.sparse.bias"} <= in_adamw


def test_frozen_biases_are_left_out():
    raw = CayleyGPTConfig(**{**vars(CONFIG), "forward_standardized": False})
    _, adamw = make_optimizers(CayleyGPT(raw), OptimConfig())
    assert all(p.requires_grad for p in adamw.param_groups[0]["params"])


def test_each_group_follows_its_own_rates():
    config = OptimConfig(muon_lr=1.0, muon_min_lr=0.5, adamw_lr=0.1, adamw_min_lr=0.0)
    optimizers = make_optimizers(CayleyGPT(CONFIG), config)
    assert set_learning_rates(optimizers, 0, Schedule(0, 10), 5) == pytest.approx([0.75, 0.05])
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([0.75, 0.05])


def test_a_muon_step_is_nearly_orthogonal():
    # What Muon is for: the update of a full-rank gradient has singular values near 1 (0.5 .. 1.5 by construction).
    weight = torch.nn.Parameter(torch.zeros(32, 64))
    muon = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0)
    weight.grad = torch.randn(32, 64)
    muon.step()
    values = torch.linalg.svdvals(weight.detach())
    assert values.min() > 0.4
    assert values.max() < 1.6

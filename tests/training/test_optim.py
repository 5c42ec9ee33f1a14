"""The schedule at its corners, and which weights go to which optimiser."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cayley_interp import CayleyGPT, CayleyGPTConfig
from training.optim import linear_warmdown, make_optimizers, set_learning_rates, warmdown_start
from training.recipes import OptimConfig

PUBLISHED = {"warmup": 200, "warmdown_frac": 0.9, "peak": 1.2e-2, "minimum": 1.5e-4}
CONFIG = CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=8, d_vocab=32, levels="4,2,0;6,2,4")


def test_published_schedule_at_its_corners():
    def rate(step):
        return linear_warmdown(step, 12_716, **PUBLISHED)

    assert rate(0) == pytest.approx(1.2e-2 / 200)
    assert rate(99) == pytest.approx(0.6e-2)
    assert rate(199) == rate(200) == rate(1270) == rate(1271) == 1.2e-2
    assert rate(1272) < 1.2e-2
    assert (rate(6993) + rate(6994)) / 2 == pytest.approx((1.2e-2 + 1.5e-4) / 2)
    assert rate(12_716) == pytest.approx(1.5e-4)


@given(st.integers(1, 5000), st.integers(0, 300), st.floats(0, 1))
def test_rates_stay_between_zero_and_the_peak_and_fall_at_the_end(total, warmup, frac):
    rates = [linear_warmdown(s, total, warmup=warmup, warmdown_frac=frac, peak=1.0, minimum=0.1) for s in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    falling = rates[max(warmup, warmdown_start(total, frac)) :]
    assert all(a >= b for a, b in pairwise(falling))


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
    config = OptimConfig(muon_lr=1.0, muon_min_lr=0.5, adamw_lr=0.1, adamw_min_lr=0.0, warmup=0, warmdown_frac=1.0)
    optimizers = make_optimizers(CayleyGPT(CONFIG), config)
    assert set_learning_rates(optimizers, config, 5, 10) == pytest.approx([0.75, 0.05])
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

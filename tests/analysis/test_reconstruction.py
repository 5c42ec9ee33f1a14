"""Identities of the reconstruction figures: perfect, mean, scaled, and whatever the batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analysis.reconstruction import ReconstructionMeter


def data(seed: int = 0, n: int = 400, d: int = 6) -> tuple[Tensor, Tensor]:
    """A target with dimensions of very different scale and a mean far from 0, and a poor reconstruction."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 3, d, dtype=torch.float64)
    y = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + 1e4
    return y, y + 0.5 * scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def measured(y: Tensor, recons: Tensor, sizes: tuple[int, ...] = ()) -> ReconstructionMeter:
    meter = ReconstructionMeter(y.shape[1])
    for some_y, some_recons in zip(y.split(sizes or len(y)), recons.split(sizes or len(y)), strict=True):
        meter.add(some_y, some_recons)
    return meter


def test_the_perfect_reconstruction_has_no_error():
    y, _ = data()
    meter = measured(y, y)
    assert (meter.nmse(), meter.fvu(), meter.explained_variance()) == (0.0, 0.0, 1.0)
    assert meter.cosine() == pytest.approx(1)


def test_the_mean_has_an_error_of_one():
    y, _ = data()
    meter = measured(y, y.mean(0).expand_as(y))
    assert meter.nmse() == pytest.approx(1, abs=1e-9)
    assert meter.fvu() == pytest.approx(1, abs=1e-9)


def test_by_their_definitions():
    y, recons = data()
    meter = measured(y, recons)
    mse, variance = (recons - y).square().mean(0), y.var(0, correction=0)
    assert meter.nmse() == pytest.approx((mse / variance).mean().item(), rel=1e-9)
    assert meter.fvu() == pytest.approx((mse.sum() / variance.sum()).item(), rel=1e-9)


def test_nmse_does_not_change_with_the_scale_of_a_dimension_and_fvu_does():
    y, recons = data()
    one_worse = recons.clone()
    one_worse[:, 0] = y[:, 0].mean()
    plain, worse = measured(y, recons), measured(y, one_worse)
    scale = torch.tensor([1e6, 1, 1, 1, 1, 1], dtype=torch.float64)
    scaled = measured(y * scale, one_worse * scale)
    assert scaled.nmse() == pytest.approx(worse.nmse(), rel=1e-9)
    assert worse.fvu() == pytest.approx(plain.fvu(), rel=1e-3)
    assert scaled.fvu() > 2 * worse.fvu()


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8), shuffled=st.booleans())
def test_batches_and_their_order_do_not_matter(sizes, shuffled):
    n = sum(sizes) + 2
    y, recons = data(n=n)
    whole = measured(y, recons)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(n)
    parts = measured(y[order], recons[order], (*sizes, 2))
    for figure in ("nmse", "fvu", "cosine"):
        assert getattr(parts, figure)() == pytest.approx(getattr(whole, figure)(), rel=1e-7)


def test_a_constant_dimension_is_left_out_of_nmse():
    y, recons = data()
    constant = torch.full((len(y), 1), 3.0, dtype=torch.float64)
    with_constant = measured(torch.cat([y, constant], 1), torch.cat([recons, constant + 0.1], 1))
    assert with_constant.nmse() == pytest.approx(measured(y, recons).nmse(), rel=1e-12)


def test_one_token_has_no_variance():
    y, recons = data(n=1)
    with pytest.raises(ValueError, match="2 or more"):
        measured(y, recons).nmse()

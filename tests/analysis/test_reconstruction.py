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


@given(st.integers(0, 1000), st.floats(-3, 3).filter(lambda scale: abs(scale) > 0.01), st.floats(-1, 1))
def test_at_its_best_scale_and_mean_a_reconstruction_is_measured_whatever_they_are(seed, scale, offset):
    y, recons = data(seed)
    y = y - 1e4
    recons = recons - 1e4
    meter = measured(y, scale * recons + offset, (100,) * 4)
    variance = y.var(0, correction=0)
    about_y, about_recons = y - y.mean(0), recons - recons.mean(0)
    best = (about_y * about_recons / variance).sum() / (about_recons.square() / variance).sum()
    expected = ((best * about_recons - about_y).square().mean(0) / variance).mean().item()
    assert meter.affine_nmse() == pytest.approx(expected, rel=1e-5)
    assert meter.affine_nmse() <= meter.nmse() + 1e-9


def test_an_affine_map_of_y_leaves_no_error_and_a_constant_leaves_all():
    y, _ = data()
    y = y - 1e4
    assert measured(y, 3 * y - 0.5).affine_nmse() == pytest.approx(0, abs=1e-5)
    assert measured(y, 0 * y + 7).affine_nmse() == pytest.approx(1, abs=1e-5)
    assert measured(y, y).affine_nmse() == pytest.approx(0, abs=1e-12)


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


@given(scale=st.floats(-2, 3), offset=st.floats(-5, 5))
def test_a_scaled_target_and_a_shifted_one(scale, offset):
    """(1 - s)^2 for y about its mean scaled by s; 1 + offset^2 for the mean moved by so many deviations."""
    y, _ = data()
    centred, deviation = y - y.mean(0), y.std(0, correction=0)
    scaled = measured(y, y.mean(0) + scale * centred)
    assert scaled.nmse() == pytest.approx((1 - scale) ** 2, rel=1e-6, abs=1e-9)
    assert scaled.fvu() == pytest.approx((1 - scale) ** 2, rel=1e-6, abs=1e-9)
    shifted = measured(y, (y.mean(0) + offset * deviation).expand_as(y))
    assert shifted.nmse() == pytest.approx(1 + offset**2, rel=1e-6)
    assert shifted.explained_variance() == pytest.approx(-(offset**2), rel=1e-6, abs=1e-6)


def test_cosine_knows_direction_alone():
    y, _ = data()
    assert measured(y, 3 * y).cosine() == pytest.approx(1)
    assert measured(y, -0.1 * y).cosine() == pytest.approx(-1)
    assert measured(y, torch.zeros_like(y)).cosine() == 0


def test_reconstructions_of_other_tokens_are_worse_than_the_mean():
    y, _ = data(n=4000)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    assert measured(y, y[order]).nmse() == pytest.approx(2, rel=0.1)


def test_what_cannot_be_measured_is_refused_and_changes_nothing():
    y, recons = data()
    meter = measured(y, recons)
    before = (meter.tokens, meter.nmse(), meter.fvu(), meter.cosine())
    with pytest.raises(ValueError, match="not finite at 2 tokens"):
        meter.add(y, torch.where(torch.arange(len(y))[:, None] < 2, torch.nan, recons))
    with pytest.raises(ValueError, match="y has numbers that are not finite at 400 tokens"):
        meter.add(y / 0, recons)
    with pytest.raises(ValueError, match=r"same shape \[..., 6\], got \(400, 5\) and \(400, 5\)"):
        meter.add(y[:, :5], recons[:, :5])
    meter.add(y[:0], recons[:0])
    assert (meter.tokens, meter.nmse(), meter.fvu(), meter.cosine()) == before


def test_a_target_that_never_varies_has_nothing_to_explain():
    y = torch.ones(5, 6, dtype=torch.float64)
    for figure in ("nmse", "fvu", "explained_variance"):
        with pytest.raises(ValueError, match="no variance to explain"):
            getattr(measured(y, y), figure)()


def test_one_token_has_no_variance():
    y, recons = data(n=1)
    with pytest.raises(ValueError, match="1 tokens have been added: a variance needs 2 or more"):
        measured(y, recons).nmse()

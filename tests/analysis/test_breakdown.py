"""Breakdowns of a paired difference: bins by hand, their weighted sum, and error bars against the bootstrap."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.breakdown import by_frequency, by_position, frequency_quantiles
from cayley_interp.losses import paired_difference


def random_losses(seed: int, n: int, pos: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, n, pos, generator=generator, dtype=torch.float64)
    return a + 0.3 * torch.randn(n, 1, generator=generator), b


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 70))
def test_bins_weighted_by_their_tokens_sum_to_the_overall_difference(seed: int, n: int, pos: int):
    a, b = random_losses(seed, n, pos)
    targets = torch.randint(50, (n, pos), generator=torch.Generator().manual_seed(seed))
    counts = torch.arange(60).square()
    overall = paired_difference(a, b)
    for bins in (by_position(a, b), by_frequency(a, b, targets, counts)):
        assert sum(b.difference.n_tokens for b in bins) == overall.n_tokens
        weighted = sum(b.difference.mean * b.difference.n_tokens for b in bins)
        assert weighted / overall.n_tokens == pytest.approx(overall.mean, abs=1e-12)
        for one in bins:
            assert one.loss_a - one.loss_b == pytest.approx(one.difference.mean, abs=1e-12)


def test_positions_are_binned_by_powers_of_two():
    a, b = torch.arange(12.0).double().expand(2, 12), torch.zeros(2, 12).double()
    found = {bin_.label: (bin_.difference.mean, bin_.difference.n_tokens) for bin_ in by_position(a, b)}
    assert found == {"0": (0, 2), "1": (1, 2), "2-3": (2.5, 4), "4-7": (5.5, 8), "8-11": (9.5, 8)}


def test_a_bin_of_positions_is_the_paired_difference_of_its_columns():
    a, b = random_losses(0, 30, 16)
    last = by_position(a, b)[-1]
    assert last.label == "8-15"
    columns = paired_difference(a[:, 8:], b[:, 8:])
    assert last.difference.mean == pytest.approx(columns.mean)
    assert last.difference.standard_error == pytest.approx(columns.standard_error)


def test_quantiles_hold_equal_shares_of_the_text():
    assert frequency_quantiles(torch.tensor([1, 1, 0, 8])).tolist() == [8, 9, 9, 4]
    assert frequency_quantiles(torch.full((100,), 7)).tolist() == [i // 10 for i in range(100)]
    counts = (1e6 / torch.arange(1, 5001)).long()  # Zipf
    shares = torch.zeros(10).scatter_add(0, frequency_quantiles(counts), counts.float()) / counts.sum()
    assert (shares - 0.1).abs().max() < 0.08  # the commonest token alone is a ninth of the text
    assert (shares[3:] - 0.1).abs().max() < 0.01


def test_frequency_bins_by_hand():
    counts = torch.tensor([90, 10, 0])
    targets = torch.tensor([[0, 0, 1], [0, 2, 0]])
    a = torch.tensor([[1.0, 1.0, 4.0], [1.0, 6.0, 1.0]]).double()
    common, rare = by_frequency(a, torch.zeros(2, 3).double(), targets, counts)
    assert (common.label, rare.label) == ("5 (1 tokens)", "10 (1 tokens)")  # the unseen id 2 is not counted, but rare
    assert (common.difference.mean, common.difference.n_tokens) == (1, 4)
    assert (rare.difference.mean, rare.difference.n_tokens) == (5, 2)
    assert common.difference.standard_error == 0


def test_standard_errors_of_uneven_bins_are_those_of_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    n, pos = 300, 20
    a, b = random_losses(1, n, pos)
    # Sequences differ in how many rare tokens they have.
    rare = torch.rand(n, pos, generator=generator) < 0.4 * torch.rand(n, 1, generator=generator)
    bin_ = by_frequency(a, b, rare.long(), torch.tensor([95, 5]))[-1]
    draws = torch.randint(n, (4000, n), generator=generator)
    sums, tokens = ((a - b) * rare).sum(1), rare.sum(1).double()
    bootstrap = (sums[draws].sum(1) / tokens[draws].sum(1)).std().item()
    assert bin_.difference.standard_error == pytest.approx(bootstrap, rel=0.07)


def test_a_bin_within_one_sequence_has_no_standard_error():
    a, b = random_losses(0, 2, 2)
    bins = by_frequency(a, b, torch.tensor([[0, 1], [0, 0]]), torch.tensor([9, 1]))
    assert [math.isnan(bin_.difference.standard_error) for bin_ in bins] == [False, True]
    assert bins[1].difference.n_sequences == 1


def test_counts_that_do_not_fit_are_refused():
    a, b = random_losses(0, 2, 2)
    targets = torch.tensor([[0, 1], [5, 0]])
    with pytest.raises(ValueError, match="counts are all 0"):
        inspect.unwrap(by_frequency)(a, b, targets, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="token id 5 has no count"):
        by_frequency(a, b, targets, torch.ones(5, dtype=torch.int64))

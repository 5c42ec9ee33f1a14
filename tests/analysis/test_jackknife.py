"""Standard errors over sequences: known cases, and the spread that they claim."""

import math

import pytest
import torch

from analysis.jackknife import jackknife_error, leave_one_out, ratio_error, sums_by_sequence


def test_of_a_mean_of_equal_sequences_it_is_the_textbook_error():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = values.std() / 20**0.5
    assert ratio_error(values * 7, torch.full((20,), 7.0)) == pytest.approx(expected.item())
    assert math.isnan(ratio_error(values[:1], torch.ones(1)))


def test_of_a_ratio_it_is_the_spread_over_fresh_samples():
    generator = torch.Generator().manual_seed(1)
    ratios, errors = [], []
    for _ in range(400):
        counts = torch.randint(5, 50, (30,), generator=generator).double()
        level = torch.randn(30, generator=generator, dtype=torch.float64)  # tokens of a sequence go together
        sums = counts * (1 + level)
        ratios.append((sums.sum() / counts.sum()).item())
        errors.append(ratio_error(sums, counts))
    assert torch.tensor(errors).mean().item() == pytest.approx(torch.tensor(ratios).std().item(), rel=0.15)


def test_sums():
    sums = sums_by_sequence(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 3)
    assert sums.tolist() == [1, 0, 6]
    assert leave_one_out(sums).tolist() == [6, 7, 1]
    assert jackknife_error(torch.ones(5)) == 0

"""Matching of units: a permuted copy is found, independent units are at the control's level, batches do not matter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analysis.stability import UnitMatcher
from molt_lens import matched_map


def sparse_acts(n_tokens: int, n_units: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    acts = torch.rand(n_tokens, n_units, generator=generator)
    return acts * (torch.rand(n_tokens, n_units, generator=generator) < 0.1)


def matched(a: Tensor, b: Tensor, batch_size: int = 500) -> UnitMatcher:
    matcher = UnitMatcher()
    for some_a, some_b in zip(a.split(batch_size), b.split(batch_size), strict=True):
        matcher.add(some_a, some_b)
    return matcher


def test_a_permuted_and_rescaled_copy_matches_perfectly():
    a = sparse_acts(2000, 30, seed=0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    matching = matched(a, (a * torch.linspace(0.1, 100, 30) + 3)[:, order]).match()
    assert order[matching.pairs[:, 1]].equal(matching.pairs[:, 0])
    torch.testing.assert_close(matching.correlations, torch.ones(30, dtype=torch.float64))
    assert matching.mean() == pytest.approx(1)
    assert matching.share_above(0.7) == 1
    assert matching.control_mean() < 0.1
    assert matching.control_share_above() == 0


def test_independent_units_match_at_the_level_of_the_control():
    matching = matched(sparse_acts(4000, 40, seed=0), sparse_acts(4000, 40, seed=1)).match()
    assert matching.control_mean() > 0.01  # the best of 40 partners is never at 0
    assert matching.mean() == pytest.approx(matching.control_mean(), rel=0.15)


def test_half_of_the_units_shared():
    a = sparse_acts(4000, 20, seed=0)
    b = torch.cat([a[:, 10:], sparse_acts(4000, 10, seed=1)], 1)
    matching = matched(a, b).match()
    assert matching.share_above(0.7) == 0.5
    assert {tuple(pair) for pair in matching.pairs[:10].tolist()} == {(i + 10, i) for i in range(10)}


def test_correlations_are_those_of_numpy():
    a, b = sparse_acts(300, 5, seed=0) + 1e4, sparse_acts(300, 7, seed=1)
    reference = torch.corrcoef(torch.cat([a, b], 1).double().T)[:5, 5:]
    torch.testing.assert_close(matched(a, b, 64).correlations(), reference)


@given(sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=4))
def test_batches_do_not_matter(sizes):
    n = sum(sizes) + 2
    a, b = sparse_acts(n, 4, seed=0), sparse_acts(n, 6, seed=1)
    parts = UnitMatcher()
    for some_a, some_b in zip(a.split((*sizes, 2)), b.split((*sizes, 2)), strict=True):
        parts.add(some_a, some_b)
    torch.testing.assert_close(parts.correlations(), matched(a, b, n).correlations(), rtol=1e-9, atol=1e-12)


def test_units_that_never_vary_are_left_out_and_the_smaller_map_decides():
    a, b = sparse_acts(500, 6, seed=0), sparse_acts(500, 9, seed=1)
    a[:, 2], b[:, 0], b[:, 4] = 0, 0, 1.5
    matching = matched(a, b).match()
    assert (matching.silent_a, matching.silent_b) == (1, 2)
    assert len(matching.pairs) == 5
    assert 2 not in matching.pairs[:, 0]
    assert not {0, 4} & set(matching.pairs[:, 1].tolist())
    assert matched(a, b).correlations()[2].tolist() == [0] * 9


def test_two_kinds_of_map_on_the_same_tokens():
    torch.manual_seed(0)
    molt, transcoder = (matched_map(kind, 8, 8, n=1, gate="relu") for kind in ("molt", "transcoder"))
    with torch.no_grad():
        transcoder.W_enc[100:131] = molt.W_enc.flip(0)
    matcher = UnitMatcher()
    x = torch.randn(10, 64, 8)  # batch and position
    matcher.add(molt.encode(x), transcoder.encode(x))
    matching = matcher.match()
    assert len(matching.pairs) == 31
    assert {tuple(pair) for pair in matching.pairs.tolist()} == {(i, 130 - i) for i in range(31)}


def test_what_cannot_be_matched_is_refused():
    a, b = sparse_acts(200, 3, seed=0), sparse_acts(200, 4, seed=1)
    with pytest.raises(ValueError, match="0 tokens have been added"):
        UnitMatcher().match()
    with pytest.raises(ValueError, match="0 tokens have been added"):
        UnitMatcher().correlations()
    with pytest.raises(ValueError, match="3 units of a and 0 of b vary"):
        matched(a, torch.zeros_like(b)).match()
    matcher = matched(a, b)
    with pytest.raises(ValueError, match=r"3 and 5 units after some of \(3, 4\)"):
        matcher.add(a, torch.ones(200, 5))
    with pytest.raises(ValueError, match="acts of a are not finite at 200 of 200 tokens"):
        matcher.add(a / 0, b)
    with pytest.raises(ValueError, match="acts of b are not finite at 1 of 200 tokens"):
        matcher.add(a, torch.where(torch.arange(200)[:, None] == 7, torch.nan, b))
    assert matcher.tokens == 200
    assert not math.isnan(matcher.match().mean())

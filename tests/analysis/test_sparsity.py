"""Counts of activity and the definitions built on them, on codes small enough to count by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.dead_features import dead, dense, summarise, zombie
from analysis.sparsity import ActivityCounter
from cayley_interp import CayleySAE, CayleySAEConfig, LevelCodes


def one_level(indices: list[list[int]], values: list[list[float]]) -> tuple[LevelCodes]:
    return (LevelCodes(torch.tensor(indices), torch.tensor(values)),)


def random_codes(n_tokens: int, sizes: list[int], k: int, seed: int) -> tuple[LevelCodes, ...]:
    generator = torch.Generator().manual_seed(seed)
    codes = []
    for size in sizes:
        indices = torch.rand(n_tokens, size, generator=generator).argsort(-1)[:, :k]
        values = torch.randn(n_tokens, k, generator=generator)
        codes.append(LevelCodes(indices, values * (torch.rand(n_tokens, k, generator=generator) < 0.7)))
    return tuple(codes)


def test_counts_by_hand():
    counter = ActivityCounter([4])
    counter.add(one_level([[0, 1], [0, 2]], [[1.0, 0.0], [3.0, -2.0]]))
    assert counter.tokens == 2
    assert counter.selected[0].tolist() == [2, 1, 1, 0]
    assert counter.active[0].tolist() == [2, 0, 1, 0]
    assert counter.contribution[0].tolist() == [4.0, 0.0, 2.0, 0.0]
    assert counter.max_value[0].tolist() == [3.0, 0.0, 2.0, 0.0]
    assert counter.l0(0) == 1.5
    assert counter.frequency(0).tolist() == [1.0, 0.0, 0.5, 0.0]
    assert counter.mean_contribution(0)[:3].tolist() == [2.0, 0.0, 2.0]
    assert math.isnan(counter.mean_contribution(0)[3])


@given(cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 2**32 - 1), shuffle=st.booleans())
def test_counts_do_not_depend_on_the_batches(cuts: list[int], seed: int, shuffle: bool):
    codes = random_codes(40, [8, 32], 3, seed)
    whole, parts = ActivityCounter([8, 32]), ActivityCounter([8, 32])
    whole.add(codes)
    order = torch.randperm(40) if shuffle else torch.arange(40)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        rows = order[start:stop]
        parts.add(tuple(LevelCodes(c.indices[rows], c.values[rows]) for c in codes))
    assert parts.tokens == whole.tokens
    for level in range(2):
        assert parts.selected[level].equal(whole.selected[level])
        assert parts.active[level].equal(whole.active[level])
        assert parts.max_value[level].equal(whole.max_value[level])
        torch.testing.assert_close(parts.contribution[level], whole.contribution[level], rtol=1e-14, atol=0)
        assert parts.l0(level) == whole.l0(level)
        assert parts.frequency(level).equal(whole.frequency(level))


def test_contribution_is_the_norm_of_what_is_written():
    sae = CayleySAE(CayleySAEConfig(d_model=16, levels="4,1,0")).eval()
    codes = sae.encode(torch.randn(5, 16))
    counter = ActivityCounter([16])
    counter.add(codes)
    assert counter.contribution[0].sum().item() == pytest.approx(sae.decode(codes).norm(dim=-1).sum().item(), rel=1e-5)


def test_batch_dimensions_are_flattened():
    counter = ActivityCounter([4])
    counter.add((LevelCodes(torch.zeros(2, 3, 1, dtype=torch.int64), torch.ones(2, 3, 1)),))
    assert counter.tokens == 6
    assert counter.active[0].tolist() == [6, 0, 0, 0]


def test_bad_codes_are_refused_and_not_counted():
    counter = ActivityCounter([4])
    with pytest.raises(IndexError, match=r"level 0 has features 0 to 3, got 1\.\.4"):
        counter.add(one_level([[1, 4]], [[1.0, 1.0]]))
    with pytest.raises(ValueError, match="codes of 1 levels"):
        counter.add((*one_level([[0]], [[1.0]]), *one_level([[0]], [[1.0]])))
    assert counter.tokens == 0
    with pytest.raises(ValueError, match="no tokens have been counted"):
        counter.l0(0)


def test_dead_zombie_dense_by_construction():
    """Of 100 tokens, 0 fires at all, 1 at ten, 2 at eleven; 3 always writes next to nothing, 4 always exactly 0."""
    counter = ActivityCounter([6])
    for token in range(100):
        chosen = [(0, 1.0), (3, 0.001), (4, 0.0), (1, float(token < 10)), (2, float(token < 11))]
        chosen = [(i, value) for i, value in chosen if i in (0, 3, 4) or value]
        counter.add(one_level([[i for i, _ in chosen]], [[value for _, value in chosen]]))
    assert dead(counter, 0).tolist() == [False, False, False, False, True, True]
    assert zombie(counter, 0).tolist() == [False, False, False, True, True, False]
    assert dense(counter, 0).tolist() == [True, False, True, True, False, False]
    summary = summarise(counter, 0)
    assert (summary.n_features, summary.dead, summary.zombie, summary.dense) == (6, 2, 2, 3)
    assert summary.l0 == pytest.approx(2.21)
    assert summary.median_frequency == pytest.approx(0.1)  # the lower of the two middle ones


def test_a_level_that_selected_nothing_has_no_zombies():
    counter = ActivityCounter([4])
    counter.add((LevelCodes(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0)),))
    assert not zombie(counter, 0).any()
    assert dead(counter, 0).all()

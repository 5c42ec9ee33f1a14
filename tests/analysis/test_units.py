"""Counts of open units against counting by hand, from dense acts and from sparse codes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.units import UnitCounter
from cayley_interp import CayleySAE, CayleySAEConfig, LevelCodes

ACTS = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.5, 0.0, 0.0, 0.0], [0.1, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
RANKS = [8, 2, 2, 2]


def counted(*batches: torch.Tensor) -> UnitCounter:
    counter = UnitCounter(RANKS)
    for batch in batches:
        counter.add(batch)
    return counter


def random_codes(n_tokens: int, size: int, k: int, seed: int) -> LevelCodes:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(n_tokens, size, generator=generator).argsort(-1)[:, :k]
    values = torch.randn(n_tokens, k, generator=generator)
    return LevelCodes(indices, values * (torch.rand(n_tokens, k, generator=generator) < 0.7))


def test_by_hand():
    counter = counted(ACTS)
    assert counter.frequency().tolist() == [0.75, 0.25, 0.25, 0.0]
    assert counter.l0() == 1.25
    assert counter.active_rank() == (3 * 8 + 2 + 2) / 4
    assert counter.alive() == 0.75
    assert counter.max_frequency() == 0.75
    assert counter.by_rank() == {
        8: {"units": 1, "l0": 0.75, "mean_frequency": 0.75, "max_frequency": 0.75, "alive": 1.0},
        2: {"units": 3, "l0": 0.5, "mean_frequency": 0.5 / 3, "max_frequency": 0.25, "alive": pytest.approx(2 / 3)},
    }


def test_codes_by_hand():
    counter = UnitCounter([1] * 4, norms=torch.tensor([1.0, 1.0, 10.0, 1.0]))
    counter.add_codes(torch.tensor([[0, 1], [0, 2]]), torch.tensor([[1.0, 0.0], [3.0, -2.0]]))
    assert counter.tokens == 2
    assert counter.selected.tolist() == [2, 1, 1, 0]
    assert counter.opened.tolist() == [2, 0, 1, 0]
    assert counter.magnitude.tolist() == [4.0, 0.0, 2.0, 0.0]
    assert counter.max_act.tolist() == [3.0, 0.0, 2.0, 0.0]
    assert counter.l0() == counter.active_rank() == 1.5
    assert counter.frequency().tolist() == [1.0, 0.0, 0.5, 0.0]
    assert counter.mean_contribution()[:3].tolist() == [2.0, 0.0, 20.0]
    assert math.isnan(counter.mean_contribution()[3])


@given(cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 2**32 - 1), shuffle=st.booleans())
def test_counts_do_not_depend_on_the_batches(cuts: list[int], seed: int, shuffle: bool):
    indices, values = random_codes(40, 32, 3, seed)
    whole, parts = UnitCounter([1] * 32), UnitCounter([1] * 32)
    whole.add_codes(indices, values)
    order = torch.randperm(40) if shuffle else torch.arange(40)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        parts.add_codes(indices[order[start:stop]], values[order[start:stop]])
    assert parts.tokens == whole.tokens
    assert parts.selected.equal(whole.selected)
    assert parts.opened.equal(whole.opened)
    assert parts.max_act.equal(whole.max_act)
    torch.testing.assert_close(parts.magnitude, whole.magnitude, rtol=1e-14, atol=0)
    assert parts.by_rank() == whole.by_rank()


@given(seed=st.integers(0, 2**32 - 1))
def test_dense_acts_and_the_same_acts_as_codes_count_alike(seed: int):
    indices, values = random_codes(20, 16, 4, seed)
    codes, dense = UnitCounter([1] * 16), UnitCounter([1] * 16)
    codes.add_codes(indices, values)
    dense.add(torch.zeros(20, 16).scatter(1, indices, values))
    assert dense.tokens == codes.tokens
    assert dense.opened.equal(codes.opened)
    assert dense.max_act.equal(codes.max_act)
    torch.testing.assert_close(dense.magnitude, codes.magnitude, rtol=1e-14, atol=0)
    assert dense.selected.equal(dense.opened)


def test_contribution_is_the_norm_of_what_is_written():
    sae = CayleySAE(CayleySAEConfig(d_model=16, levels="4,1,0")).eval()
    codes = sae.encode(torch.randn(5, 16))
    counter = UnitCounter([1] * 16)
    counter.add_codes(*codes[0])
    written = (counter.mean_contribution() * counter.selected).nansum().item()
    assert written == pytest.approx(sae.decode(codes).norm(dim=-1).sum().item(), rel=1e-5)


def test_batch_dimensions_are_flattened():
    assert counted(ACTS).by_rank() == counted(ACTS[:1], ACTS[1:].view(1, 3, 4)).by_rank()
    counter = UnitCounter([1] * 4)
    counter.add_codes(torch.zeros(2, 3, 1, dtype=torch.int64), torch.ones(2, 3, 1))
    assert counter.tokens == 6
    assert counter.opened.tolist() == [6, 0, 0, 0]


def test_a_map_without_units():
    counter = UnitCounter([])
    counter.add(torch.zeros(5, 0))
    assert (counter.l0(), counter.active_rank(), counter.alive(), counter.by_rank()) == (0.0, 0.0, 1.0, {})


def test_what_cannot_be_counted_is_refused_and_changes_nothing():
    counter = UnitCounter([1] * 4)
    with pytest.raises(IndexError, match=r"units are 0 to 3, got 1\.\.4"):
        counter.add_codes(torch.tensor([[1, 4]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="acts of 5 units for a counter of 4"):
        counter.add(torch.ones(1, 5))
    with pytest.raises(ValueError, match="1 of 2 acts are not finite"):
        counter.add(torch.tensor([[1.0, math.nan, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="4 ranks and 3 norms"):
        UnitCounter([1] * 4, torch.ones(3))
    assert counter.tokens == 0
    assert not counter.opened.any()
    with pytest.raises(ValueError, match="no tokens have been counted"):
        counter.l0()

"""Counts of open units against counting by hand."""

import pytest
import torch

from analysis.units import UnitCounter

ACTS = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.5, 0.0, 0.0, 0.0], [0.1, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
RANKS = [8, 2, 2, 2]


def counted(*batches: torch.Tensor) -> UnitCounter:
    counter = UnitCounter(RANKS)
    for batch in batches:
        counter.add(batch)
    return counter


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


def test_batches_do_not_matter():
    assert counted(ACTS).by_rank() == counted(ACTS[:1], ACTS[1:].view(1, 3, 4)).by_rank()


def test_a_map_without_units():
    counter = UnitCounter([])
    counter.add(torch.zeros(5, 0))
    assert (counter.l0(), counter.active_rank(), counter.alive(), counter.by_rank()) == (0.0, 0.0, 1.0, {})


def test_nothing_counted():
    with pytest.raises(ValueError, match="add"):
        UnitCounter(RANKS).l0()

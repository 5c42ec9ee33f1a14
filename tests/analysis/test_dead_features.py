"""Dead, zombie and dense by construction, of Cayley codes and of sparse maps."""

import pytest
import torch

from analysis.dead_features import dead, dense, summarise, zombie
from analysis.sparsity import bits_per_token
from analysis.units import UnitCounter
from molt_lens import matched_map


def test_dead_zombie_dense_by_construction():
    """Of 100 tokens, 0 fires at all, 1 at ten, 2 at eleven; 3 always writes next to nothing, 4 always exactly 0."""
    counter = UnitCounter([1] * 6)
    for token in range(100):
        chosen = [(0, 1.0), (3, 0.001), (4, 0.0), (1, float(token < 10)), (2, float(token < 11))]
        chosen = [(i, value) for i, value in chosen if i in (0, 3, 4) or value]
        counter.add_codes(torch.tensor([[i for i, _ in chosen]]), torch.tensor([[value for _, value in chosen]]))
    assert dead(counter).tolist() == [False, False, False, False, True, True]
    assert zombie(counter).tolist() == [False, False, False, True, True, False]
    assert dense(counter).tolist() == [True, False, True, True, False, False]
    summary = summarise(counter)
    assert (summary.n_features, summary.dead, summary.zombie, summary.dense) == (6, 2, 2, 3)
    assert summary.l0 == pytest.approx(2.21)
    assert summary.bits_per_token == pytest.approx(bits_per_token(counter))
    assert summary.median_frequency == pytest.approx(0.1)  # the lower of the two middle ones


@pytest.mark.parametrize("kind", ["molt", "transcoder", "mxd"])
def test_a_unit_of_a_map_is_a_zombie_by_what_it_writes_not_by_its_act(kind):
    sparse_map = matched_map(kind, 8, 8, n=1, gate="relu")
    with torch.no_grad():
        first = {"molt": "U", "transcoder": "W_dec", "mxd": "C"}[kind]
        getattr(sparse_map, first)[: sparse_map.ranks[0] if kind == "molt" else 1] *= 1e-6
    counter = UnitCounter(sparse_map.ranks, sparse_map.norms())
    counter.add(torch.ones(10, sparse_map.n_units))
    assert zombie(counter).nonzero().flatten().tolist() == [0]


def test_a_level_that_selected_nothing_has_no_zombies():
    counter = UnitCounter([1] * 4)
    counter.add_codes(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0))
    assert not zombie(counter).any()
    assert dead(counter).all()


def test_a_map_without_units_has_none_of_them():
    counter = UnitCounter([])
    counter.add(torch.zeros(3, 0))
    assert len(dead(counter)) == len(zombie(counter)) == len(dense(counter)) == 0

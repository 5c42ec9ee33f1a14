"""Events kept in one pass against all of them sorted, whatever the batches."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.dashboards.events import NOWHERE, BestEvents, Events, events_of, priorities, strongest_of_windows
from cayley_interp import LevelCodes

N_TOKENS, N_UNITS, K = 60, 7, 4


def some_acts(seed: int) -> torch.Tensor:
    """Few values, so that there are ties; unit 6 never opens."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randint(-3, 4, (N_TOKENS, N_UNITS), generator=generator).float()
    acts[torch.rand(N_TOKENS, N_UNITS, generator=generator) < 0.5] = 0
    acts[:, 6] = 0
    return acts


@given(st.lists(st.integers(1, 20), max_size=6), st.integers(0, 5))
def test_the_best_of_all_whatever_the_batches(cuts, seed):
    acts, best = some_acts(seed), BestEvents(N_UNITS, K)
    starts = sorted({0, *[c * 3 % N_TOKENS for c in cuts]})
    for start, stop in zip(starts, [*starts[1:], N_TOKENS], strict=True):
        events = events_of(acts[start:stop], start)
        shuffled = torch.randperm(len(events.unit))
        events = Events(*(t[shuffled] for t in events))
        best.add(events, events.act)
    for unit in range(N_UNITS):
        tokens = sorted(acts[:, unit].nonzero().flatten().tolist(), key=lambda t: (-acts[t, unit].item(), t))[:K]
        assert best.token[unit].tolist() == tokens + [NOWHERE] * (K - len(tokens))
        assert best.score[unit, : len(tokens)].tolist() == acts[tokens, unit].tolist()
        assert best.act[unit].tolist() == acts[tokens, unit].tolist() + [0] * (K - len(tokens))


def test_dense_acts_and_the_same_as_a_code_are_the_same_events():
    acts = some_acts(0).view(6, 10, N_UNITS)
    values, indices = acts.abs().topk(N_UNITS, dim=-1)
    values = acts.gather(-1, indices)
    dense, sparse = events_of(acts, 100), events_of(LevelCodes(indices, values), 100)
    assert len(dense.token) == int((acts != 0).sum())
    assert sorted(zip(*(t.tolist() for t in dense), strict=True)) == sorted(
        zip(*(t.tolist() for t in sparse), strict=True)
    )
    assert dense.token.min() >= 100


def test_a_window_has_one_event_of_a_unit():
    acts = some_acts(1)
    found = strongest_of_windows(events_of(acts, 0), n_ctx=10)
    expected = set()
    for unit in range(N_UNITS):
        for window in range(6):
            own = acts[10 * window : 10 * window + 10, unit].abs()
            if own.max() > 0:
                expected.add((10 * window + int(own.argmax()), unit))
    assert set(zip(found.token.tolist(), found.unit.tolist(), strict=True)) == expected
    assert len(found.token) == len(expected)
    assert torch.equal(found.act, acts[found.token, found.unit])


def test_priorities_are_uniform_unlike_by_unit_and_seed_and_know_no_batch():
    token = torch.arange(20_000)
    events = Events(token, torch.zeros_like(token), torch.ones(len(token)))
    p = priorities(events)
    assert (p >= 0).all()
    assert (p < 1).all()
    counts = torch.histc(p.float(), 20, 0, 1)
    assert (counts - 1000).abs().max() < 6 * 1000**0.5
    for other in (priorities(events._replace(unit=events.unit + 1)), priorities(events, seed=1), p.roll(1)):
        assert abs(torch.corrcoef(torch.stack([p, other]))[0, 1]) < 0.03
    assert torch.equal(priorities(Events(token[7:9], events.unit[7:9], events.act[7:9])), p[7:9])


def test_the_events_of_largest_priority_are_a_fair_sample():
    """Each of 40 events of a unit is among its 10 kept about once in four units."""
    n_units, n = 4_000, 40
    unit = torch.arange(n_units).repeat_interleave(n)
    token = torch.arange(n).repeat(n_units)
    best = BestEvents(n_units, 10)
    events = Events(token, unit, torch.ones(len(unit)))
    best.add(events, priorities(events))
    kept = torch.bincount(best.token.flatten(), minlength=n) / n_units
    assert (kept - 0.25).abs().max() < 6 * (0.25 * 0.75 / n_units) ** 0.5

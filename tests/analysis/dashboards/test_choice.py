"""Which units get a page."""

import pytest
import torch

from analysis.dashboards.choice import DEAD, DENSE, ZOMBIE, choose, flags_of, read_features
from analysis.dashboards.events import BestEvents
from analysis.dashboards.sources import Group
from analysis.dashboards.survey import Survey
from analysis.units import UnitCounter


def surveyed(frequencies: list[float], acts: list[float] | None = None) -> Survey:
    """Units open at so many of a thousand tokens."""
    counter = UnitCounter([1] * len(frequencies))
    counter.tokens = 1000
    counter.opened = (torch.tensor(frequencies, dtype=torch.float64) * 1000).round().long()
    counter.selected = counter.opened.clone()
    counter.magnitude = counter.opened * torch.tensor(acts or [1.0] * len(frequencies), dtype=torch.float64)
    return Survey(counter, BestEvents(len(frequencies), 1), BestEvents(len(frequencies), 1), nmse=0.5)


# unit 0 dead, 1 dense, 2 a zombie, the others by rising frequency
SURVEYS = [surveyed([0, 0.5, 0.09, 0.01, 0.02, 0.03, 0.04], [1, 1, 0.001, 1, 1, 1, 1]), surveyed([0.01, 0, 0.02])]
GROUPS = [Group("L0.0", 0, 0, "cayley", [1] * 7), Group("L0.1", 0, 1, "cayley", [1] * 3)]


def chosen(*features: str, seed: int = 0) -> list[list[int]]:
    return choose(GROUPS, SURVEYS, read_features(GROUPS, features), seed)


def test_flags():
    assert flags_of(SURVEYS[0]) == [DEAD, DENSE, ZOMBIE, 0, 0, 0, 0]


def test_top_are_the_most_frequent_of_the_sound_ones():
    assert chosen("top:3") == [[4, 5, 6], [0, 2]]
    assert chosen("top:5")[0] == [3, 4, 5, 6]
    assert chosen("top:6")[0] == [1, 2, 3, 4, 5, 6]  # all that open


def test_random_are_alive_and_follow_the_seed():
    draws = {tuple(chosen("random:3", seed=seed)[0]) for seed in range(20)}
    assert len(draws) > 5
    assert all(len(draw) == 3 and 0 not in draw for draw in draws)
    assert chosen("random:3", seed=4) == chosen("random:3", seed=4)


def test_listed():
    assert chosen("0,2,6") == [[2, 6], [0, 2]]
    assert chosen("L0.0:3", "L0.1:2,0") == [[3], [0, 2]]
    assert chosen("top:1", "L0.0:1") == [[1, 6], [2]]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("best 3", r"expected top:N, random:N, 17,42,1003 or L0\.1:17,42"),
        ("L7.0:3", r"there is no group L7\.0; there are L0\.0, L0\.1"),
        ("L0.0:0", "--features L0.0:0: unit 0 never opens on this text"),
        ("99", "there is no unit 99; they are 0 to 6"),
    ],
)
def test_what_cannot_be_is_refused(features, message):
    with pytest.raises(ValueError, match=message):
        chosen(features)

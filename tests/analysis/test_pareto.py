"""The Pareto front against its definition."""

import torch

from analysis.pareto import pareto_front


def test_by_hand():
    points = [(4.0, 0.2), (1.0, 0.5), (2.0, 0.6), (2.0, 0.3), (4.0, 0.2)]
    assert pareto_front(points, higher_y_is_better=False) == [1, 3, 0]
    assert pareto_front(points, higher_y_is_better=True) == [1, 2]
    assert pareto_front([], higher_y_is_better=True) == []


def test_nothing_beats_a_point_of_the_front_and_something_every_other():
    points = [tuple(p) for p in torch.rand(60, 2, generator=torch.Generator().manual_seed(0)).tolist()]
    front = pareto_front(points, higher_y_is_better=False)
    for i, (x, y) in enumerate(points):
        beaten = any(a <= x and b <= y for j, (a, b) in enumerate(points) if j != i)
        assert beaten == (i not in front)

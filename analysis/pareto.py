"""The Pareto front of points in a plane: those that no other point beats in both figures."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]], *, higher_y_is_better: bool) -> list[int]:
    """Indices of the points that nothing of at most their x has a better y than, in order of x; lower x is better.

    Of equal points the first is kept.
    """
    sign = -1 if higher_y_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1], i))
    front: list[int] = []
    for i in order:
        if not front or sign * points[i][1] < sign * points[front[-1]][1]:
            front.append(i)
    return front

"""Kinds side by side at equal sparsity or equal error, read off between the sparsities that were trained."""

from collections.abc import Sequence
from itertools import pairwise
from math import log, sqrt
from typing import NamedTuple

from analysis.comparison_tables import COLUMNS, Point, title_of
from analysis.tables import Sheet
from molt_lens.hosts import Site

PAIRS = (
    ("molt", "transcoder"),
    ("molt-skip", "skip-transcoder"),
    ("molt-skip", "molt"),
    ("skip-transcoder", "transcoder"),
    ("molt", "mxd"),
)
"""What is held against what, where a comparison has both."""
AXES = ("l0", "active_rank", "bits_per_token", "active_parameters", "nmse")
"""What is made equal."""
READ = ("l0", "active_rank", "bits_per_token", "nmse", "ce_above_host", "jacobian_cosine")
"""What is read off there."""


class AtEqual(NamedTuple):
    """Two kinds where a figure of theirs is equal; `at` is None where their ranges do not meet."""

    pair: tuple[str, str]
    axis: str
    ranges: tuple[tuple[float, float], tuple[float, float]]
    at: float | None
    values: dict[str, tuple[float, float]]
    """Of each figure read, first kind and second."""


def at_equal(points: list[Point]) -> list[AtEqual]:
    """Every pair of kinds on every axis, in the geometric middle of the range that both cover."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        if not point.subject.control and point.value("l0"):  # what never opens is on no curve
            curves.setdefault(point.subject.kind, []).append(point)
    return [
        _meet(pair, axis, curves[pair[0]], curves[pair[1]])
        for pair in PAIRS
        for axis in AXES
        if all(len(curves.get(kind, [])) > 1 for kind in pair)
    ]


def _meet(pair: tuple[str, str], axis: str, a: list[Point], b: list[Point]) -> AtEqual:
    ranges = (_range(a, axis), _range(b, axis))
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if low > high:
        return AtEqual(pair, axis, ranges, None, {})
    at = min(max(sqrt(low * high), low), high)  # not outside by rounding
    values = {
        figure: (read_off(_curve(a, axis, figure), at), read_off(_curve(b, axis, figure), at))
        for figure in READ
        if figure != axis
    }
    return AtEqual(pair, axis, ranges, at, values)


def _range(points: list[Point], axis: str) -> tuple[float, float]:
    values = [float(point.value(axis) or 0) for point in points]
    return min(values), max(values)


def _curve(points: list[Point], x: str, y: str) -> list[tuple[float, float]]:
    return [(float(p.value(x) or 0), float(p.value(y) or 0)) for p in points]


def read_off(curve: Sequence[tuple[float, float]], x: float) -> float:
    """y at x, linear in log x between the points next to it.

    Raises:
        ValueError: x is outside the range of the points: nothing is extrapolated.
    """
    curve = sorted(curve)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * log(x / x0) / log(x1 / x0)
    raise ValueError(f"{x} is outside what was measured, {curve[0][0]} to {curve[-1][0]}")


def sheet_at_equal(points: list[Point], site: Site) -> Sheet:
    """A row for each pair and axis; cells are `first / second`."""
    forms = {figure: (name, form) for name, figure, form in COLUMNS}
    rows = []
    for pair, axis, ranges, at, values in at_equal(points):
        name, form = forms[axis]
        if at is None:
            covered = " / ".join(f"{low:{form}} to {high:{form}}" for low, high in ranges)
            rows.append([" / ".join(pair), f"{name}: never, {covered}", *("—" for _ in READ)])
            continue
        cells = (
            " / ".join(f"{value:{forms[figure][1]}}" for value in values[figure]) if figure in values else "—"
            for figure in READ
        )
        rows.append([" / ".join(pair), f"{name} {at:{form}}", *cells])
    return Sheet(f"{title_of(site)}, at equal …", ["kinds", "equal", *(forms[f][0] for f in READ)], rows)

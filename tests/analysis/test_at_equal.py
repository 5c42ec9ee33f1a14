"""Curves read off between their points, never outside."""

import math

import pytest

from analysis.at_equal import at_equal, read_off, sheet_at_equal
from analysis.comparison import Measured
from analysis.comparison_tables import Point
from analysis.subjects import Subject
from molt_lens.hosts import Site

SITE = Site(3)


def curve(kind: str, l0s: list[float], scale: float, control: bool = False) -> list[Point]:
    """NMSE falls by the logarithm of L0, each unit has rank `scale`."""
    points = []
    for l0 in l0s:
        figures = {
            "l0": l0,
            "active_rank": scale * l0,
            "active_parameters": 1000 * l0,
            "bits_per_token": 10 * l0,
            "nmse": scale * (1 - math.log(l0) / 10) if l0 else scale,
            "ce_above_host": 0.1,
            "jacobian_cosine": math.log(l0) / 10 if l0 else 0.0,
        }
        subject = Subject(f"{kind}-{l0}", kind, SITE, f"{kind}-{l0}", lambda _: None, control=control, parameters=1)
        points.append(Point(subject.name, [Measured(subject, figures)]))
    return points


def test_a_curve_is_read_off_at_its_points_and_between_them():
    points = [(8.0, 0.3), (1.0, 0.6), (2.0, 0.5)]
    assert [read_off(points, x) for x in (1.0, 2.0, 8.0)] == pytest.approx([0.6, 0.5, 0.3])
    assert read_off(points, 4.0) == pytest.approx(0.4)
    for outside in (0.99, 8.01):
        with pytest.raises(ValueError, match=f"{outside} is outside what was measured, 1.0 to 8.0"):
            read_off(points, outside)


def test_kinds_meet_in_the_middle_of_what_both_cover():
    found = {
        m.axis: m for m in at_equal(curve("molt", [1, 2, 4, 8], 1.0) + curve("transcoder", [2, 4, 8, 16, 32], 0.5))
    }
    l0 = found["l0"]
    assert (l0.ranges, l0.at) == (((1, 8), (2, 32)), 4)
    assert l0.values["nmse"] == pytest.approx((1 - math.log(4) / 10, 0.5 * (1 - math.log(4) / 10)))
    assert l0.values["jacobian_cosine"] == pytest.approx((math.log(4) / 10, math.log(4) / 10))
    assert found["active_rank"].at == pytest.approx(math.sqrt(1 * 8))
    assert found["nmse"].at is None  # 0.79 to 1 and 0.33 to 0.47
    assert found["nmse"].values == {}


def test_controls_single_points_and_what_never_opens_are_on_no_curve():
    alone = curve("molt", [1, 2], 1.0) + curve("transcoder", [4], 1.0) + curve("mxd", [1, 2], 1.0, control=True)
    assert at_equal(alone) == []
    closed = at_equal(curve("molt", [0, 1, 2], 1.0) + curve("transcoder", [1, 2], 1.0))
    assert closed[0].ranges == ((1, 2), (1, 2))


def test_the_table_says_where_ranges_never_meet():
    sheet = sheet_at_equal(curve("molt", [1, 2], 1.0) + curve("transcoder", [4, 8], 1.0), SITE)
    assert sheet.rows[0][:2] == ["molt / transcoder", "L0: never, 1.00 to 2.00 / 4.00 to 8.00"]
    rows = {row[1].split(":")[0]: row for row in sheet.rows}
    assert rows["NMSE"][2] == "—"

"""Rank correlations against scipy's, partial ones against their formula, and the table."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from analysis.comparison import Measured
from analysis.comparison_tables import Point
from analysis.predictors import interval, rank_correlation, sheet_of_predictors
from analysis.subjects import Subject
from molt_lens.hosts import Site

SITE = Site(3)


@given(st.integers(0, 10_000))
def test_by_their_definitions(seed):
    a, b, c = np.random.default_rng(seed).integers(0, 6, (3, 12)).astype(float)  # with ties
    if min(len(set(v)) for v in (a, b, c)) < 2:
        return
    ab, ac, bc = (spearmanr(*pair).statistic for pair in ((a, b), (a, c), (b, c)))
    assert rank_correlation(a, b) == pytest.approx(ab)
    if max(abs(ac), abs(bc)) < 0.99:
        expected = (ab - ac * bc) / math.sqrt((1 - ac**2) * (1 - bc**2))
        assert rank_correlation(a, b, c) == pytest.approx(expected, abs=1e-9)


def test_what_says_nothing_more_has_none_at_equal():
    a = np.arange(8.0)
    assert math.isnan(rank_correlation(a**3, a, a))
    assert rank_correlation(np.exp(a), -a) == pytest.approx(-1)
    assert math.isnan(rank_correlation(a, np.ones(8)))


def test_the_interval_holds_the_value_and_narrows():
    noise = np.random.default_rng(0).normal(size=(2, 400))
    widths = []
    for n in (12, 400):
        a = np.linspace(0, 1, n)
        b = a + noise[0, :n]
        low, high = interval(a, b)
        assert low <= rank_correlation(a, b) <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def point(kind: str, control: bool = False, **figures: float | None) -> Point:
    subject = Subject(kind, kind, SITE, kind, lambda _: None, control=control, parameters=1)
    return Point(kind, [Measured(subject, dict(figures))])


def test_the_table_leaves_controls_out_and_figures_that_few_maps_have():
    maps = [point(f"m{i}", l0=2.0 + i, nmse=0.1 * i, kl=0.2 * i + 0.01, fvu=1.0 - i / 10) for i in range(6)]
    floor = point("ridge", control=True, l0=0.0, nmse=9.0, kl=0.0, fvu=0.0)
    sheet = sheet_of_predictors([*maps, floor], SITE)
    assert sheet is not None
    assert [row[:2] for row in sheet.rows] == [["NMSE", "6"], ["FVU", "6"], ["L0", "6"]]
    assert sheet.rows[0][2].startswith("+1.00")
    assert sheet.rows[1][2].startswith("-1.00")
    assert sheet.rows[0][3] == "—"
    assert sheet_of_predictors(maps[:4], SITE) is None

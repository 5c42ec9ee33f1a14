"""Data files: plain ASCII that a browser can run, whatever a token is."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.dashboards.chunks import Strings, short, write_data
from tests.analysis.dashboards.tiny_site import read_data

HOSTILE = [
    "</script><script>alert(1)</script>",
    "\x00",
    "\u2028\u2029",
    "\u202ertl",
    "\ud800",
    "\"'\\`${1}",
    "x" * 10_000,
]


def test_what_is_written_is_read_back(tmp_path):
    (tmp_path / "data").mkdir()
    value = {"strings": HOSTILE, "numbers": [1, 0.5, math.nan, -math.inf], 7: (1, 2)}
    write_data(tmp_path, "units-L3.1-0000", value)
    read = read_data(tmp_path, "units-L3.1-0000")
    assert read == {"strings": HOSTILE, "numbers": [1, 0.5, None, None], "7": [1, 2]}


@pytest.mark.parametrize("key", ["../site", "a/b", "", ".site", 'a"', "a b", "site\n"])
def test_a_key_that_is_no_file_name_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match="names a file of the site"):
        write_data(tmp_path, key, {})


@given(st.floats(-1e300, 1e300))
def test_short_keeps_four_digits(number):
    assert short(number) == pytest.approx(number, rel=5e-4)


def test_short_leaves_what_is_not_finite():
    assert math.isnan(short(math.nan))
    assert short(math.inf) == math.inf
    assert str(short(3.0)) == "3"


def test_each_string_once():
    strings = Strings(["a", "b", "c"])
    assert [strings(t) for t in (2, 0, 2, 2, 0)] == [0, 1, 0, 0, 1]
    assert strings.used() == ["c", "a"]

"""The page of a comparison in a real browser: drawn from file:// without a network, inert, at home on any screen."""

import time

import pytest
from selenium import webdriver

from analysis.comparison_page import write_comparison_page
from tests.analysis.fabricated_comparison import HOSTILE, SITES, make_comparison
from tests.browser.chromium import check_follows_scheme, check_quiet, drawn_plots, open_page, scroll_width

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("comparison") / "index.html"
    write_comparison_page(make_comparison(), path, "run")
    return path.as_uri()


def hovered(browser: webdriver.Chrome, plot: str, kind: str) -> str:
    """What the plot shows while the pointer is on the first point of a kind."""
    x, y = browser.execute_script(
        """
        const plot = document.getElementById(arguments[0]);
        plot.scrollIntoView({ block: "center", behavior: "instant" });
        const traces = [...plot.querySelectorAll(".scatterlayer .trace")];
        const trace = traces.find(trace => trace.__data__[0].trace.name === arguments[1]);
        const point = trace.querySelector(".points path").getBoundingClientRect();
        return [point.x + point.width / 2, point.y + point.height / 2];
        """,
        plot,
        kind,
    )
    label = f"return document.querySelector('#{plot} .hoverlayer').textContent"
    for i in range(50):  # from beside the point to it: plotly waits for the pointer to move, and draws in its own time
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x + i % 2, "y": y})
        if shown := browser.execute_script(label):
            return shown
        time.sleep(0.1)
    return ""


def test_opens_and_draws_without_errors(browser: webdriver.Chrome, page: str):
    open_page(browser, page)
    assert "Comparison · gemma-3-270m" in browser.title
    drawn = drawn_plots(browser)
    assert len(drawn) == 4 * len(SITES)
    assert all(paths > 20 for paths in drawn)
    check_quiet(browser)


@pytest.mark.parametrize("width", [1100, 400])
def test_hover_on_a_point_tells_its_config(browser: webdriver.Chrome, page: str, width: int):
    open_page(browser, page, width=width)
    for plot in ("l0-nmse-0", "nmse-jacobian-1"):
        shown = hovered(browser, plot, "molt")
        for part in ("molt topk:2 N=1 seed 0", "runs/molt-2-0", "NMSE 0.3200 ± 0.0040", "gate topk:2", "revive_after"):
            assert part in shown


def test_a_hostile_name_is_inert_in_the_table_and_under_the_pointer(browser: webdriver.Chrome, page: str):
    open_page(browser, page)
    assert HOSTILE in browser.execute_script("return document.querySelector('table').textContent")
    assert HOSTILE in hovered(browser, "l0-nmse-0", "mxd")
    assert browser.execute_script("return window.__x === undefined")


@pytest.mark.parametrize("width", [320, 400, 768])
def test_narrow_screens_do_not_scroll_sideways(browser: webdriver.Chrome, page: str, width: int):
    open_page(browser, page, width=width)
    assert scroll_width(browser) <= width


def test_colours_follow_the_scheme(browser: webdriver.Chrome, page: str):
    check_follows_scheme(browser, page)

"""Both reports in a real browser: drawn from file:// without a network, inert, and at home on a narrow screen."""

import pytest
from selenium import webdriver

from analysis.molt_report import write_molt_report
from analysis.report import write_report
from tests.analysis.fabricated import evaluate, make_run
from tests.analysis.test_molt_report import evaluated
from tests.analysis.test_molt_report import make_run as make_molt_run
from tests.browser.chromium import check_follows_scheme, check_quiet, drawn_plots, open_page, scroll_width

pytestmark = pytest.mark.browser

LEVELS = "4,2,0;7,4,8"


@pytest.fixture(scope="module", params=["Cayley-GPT", "molt"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def report(kind: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run") / "run"
    if kind == "molt":
        measured = evaluated("molt")
        return write_molt_report(make_molt_run(folder, measured), measured).as_uri()
    evaluation = evaluate(LEVELS)
    return write_report(make_run(folder, LEVELS, evaluation), evaluation).as_uri()


def test_opens_and_draws_without_errors(browser: webdriver.Chrome, report: str, kind: str):
    open_page(browser, report)
    assert f"{kind} run" in browser.title
    drawn = drawn_plots(browser)
    assert len(drawn) == {"Cayley-GPT": 6, "molt": 3}[kind]
    assert all(drawn)
    check_quiet(browser)


def test_hostile_tokens_are_inert(browser: webdriver.Chrome, report: str):
    open_page(browser, report)
    assert "alert(1)" in browser.execute_script("return document.body.innerText")
    # An open alert would have made the line above raise.
    assert browser.execute_script("return window.__x === undefined")
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0


@pytest.mark.parametrize("width", [320, 380, 768])
def test_narrow_screens_do_not_scroll_sideways(browser: webdriver.Chrome, report: str, width: int):
    open_page(browser, report, width=width)
    assert scroll_width(browser) <= width


def test_colours_follow_the_scheme(browser: webdriver.Chrome, report: str):
    check_follows_scheme(browser, report)

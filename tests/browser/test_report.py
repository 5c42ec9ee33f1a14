"""Both reports in a real browser: drawn from file:// without a network, inert, and at home on a narrow screen."""

import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from analysis.molt_report import write_molt_report
from analysis.report import write_report
from tests.analysis.fabricated import evaluate, make_run
from tests.analysis.test_molt_report import evaluated
from tests.analysis.test_molt_report import make_run as make_molt_run

pytestmark = pytest.mark.browser

LEVELS = "4,2,0;7,4,8"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium or its driver is not installed: apt-get install chromium chromium-driver")
    options = Options()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


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


def open_page(browser: webdriver.Chrome, url: str, *, width: int = 1100, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(url)


def test_opens_and_draws_without_errors(browser: webdriver.Chrome, report: str, kind: str):
    open_page(browser, report)
    assert f"{kind} run" in browser.title
    drawn = browser.execute_script("return [...document.querySelectorAll('.plot')].map(p => !!p.querySelector('svg'))")
    assert drawn == [True] * {"Cayley-GPT": 5, "molt": 3}[kind]
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_hostile_tokens_are_inert(browser: webdriver.Chrome, report: str):
    open_page(browser, report)
    assert "alert(1)" in browser.execute_script("return document.body.innerText")
    # An open alert would have made the line above raise.
    assert browser.execute_script("return window.__x === undefined")
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0


@pytest.mark.parametrize("width", [320, 380, 768])
def test_narrow_screens_do_not_scroll_sideways(browser: webdriver.Chrome, report: str, width: int):
    open_page(browser, report, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_colours_follow_the_scheme(browser: webdriver.Chrome, report: str):
    seen = {}
    for scheme in ("light", "dark"):
        open_page(browser, report, scheme=scheme)
        seen[scheme] = browser.execute_script(
            "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, "
            "document.querySelector('.plot').layout.font.color]"
        )
    assert all(light != dark for light, dark in zip(*seen.values(), strict=True))

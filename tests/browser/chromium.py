"""Headless Chromium for tests: started once, with pages opened at any width and in either scheme of colours."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def started(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with a fresh profile; the test is skipped where there is none."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium or its driver is not installed: apt-get install chromium chromium-driver")
    options = Options()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES.split(), f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(browser: webdriver.Chrome, url: str, *, width: int = 1100, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(url)


def drawn_plots(browser: webdriver.Chrome) -> list[int]:
    """Of each plot of the page the number of paths drawn in it."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('svg path').length)"
    )


def check_quiet(browser: webdriver.Chrome) -> None:
    """Nothing was requested but the page, and nothing was said on the console."""
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def scroll_width(browser: webdriver.Chrome) -> int:
    return browser.execute_script("return document.documentElement.scrollWidth")


def colours(browser: webdriver.Chrome) -> list[str]:
    """Of the page, its text and the text of its first plot."""
    return browser.execute_script(
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, "
        "document.querySelector('.plot').layout.font.color]"
    )


def check_follows_scheme(browser: webdriver.Chrome, url: str) -> None:
    """Light and dark have no colour in common."""
    seen = []
    for scheme in ("light", "dark"):
        open_page(browser, url, scheme=scheme)
        seen.append(colours(browser))
    assert all(light != dark for light, dark in zip(*seen, strict=True))

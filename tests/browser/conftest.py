"""One browser for all pages."""

from collections.abc import Iterator

import pytest
from selenium import webdriver

from tests.browser.chromium import started


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with started(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver

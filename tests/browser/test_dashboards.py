"""A site of dashboards in a real browser: from file://, with hostile tokens, tens of thousands of units, keys alone."""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from analysis.dashboards.build import build
from analysis.dashboards.chunks import write_data
from analysis.dashboards.site import ASSETS
from analysis.page import TEMPLATES
from analysis.tables import Sheet
from tests.analysis.dashboards.tiny_site import NAME, ByRule, read_data, tiny_opened
from tests.analysis.fabricated import HOSTILE
from tests.browser.chromium import open_page, scroll_width

pytestmark = pytest.mark.browser

N_LARGE = 34_816


def add_large_group(out: Path) -> None:
    """A group of 34,816 units in the index, without pages."""
    columns = {
        "frequency": [0.5 / (1 + i) for i in range(N_LARGE)],
        "max": [i % 97 / 10 for i in range(N_LARGE)],
        "entropy": [None if i % 100 == 7 else i % 50 / 10 for i in range(N_LARGE)],
        "flags": [1 if i % 100 == 7 else 4 if i < 4 else 0 for i in range(N_LARGE)],
        "page": [-1] * N_LARGE,
        "token": [HOSTILE[i % 8] if i % 2 else f" word{i}" for i in range(N_LARGE)],
    }
    write_data(out, "index-L9.0", columns)
    site = read_data(out, "site")
    group = {"name": "L9.0", "layer": 9, "level": 0, "kind": "cayley", "n_units": N_LARGE, "n_pages": 0, "l0": 3.0}
    group |= {"nmse": 0.5, "dead": 349, "zombie": 0, "dense": 4, "title": "layer 9, level 0", "parent_group": None}
    write_data(out, "site", site | {"groups": [*site["groups"], group | {"child_group": None}]})
    for i in range(len(site["prompts"])):
        prompt = read_data(out, f"prompts-{i}")
        prompt["acts"]["L9.0"], prompt["common"]["L9.0"] = [[] for _ in prompt["tokens"]], {}
        write_data(out, f"prompts-{i}", prompt)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dashboards") / "site"
    build(tiny_opened(), out, features=("random:64",))
    add_large_group(out)
    return out


@pytest.fixture
def at(browser: webdriver.Chrome, site: Path) -> Iterator[Callable[..., None]]:
    """Opens an address of the site; nothing may have been said on the console when the test ends."""
    browser.get_log("browser")

    def open_at(address: str = "", **options: Any) -> None:
        open_page(browser, "about:blank", **options)  # the next is a load, not a jump within the page
        open_page(browser, f"{(site / 'index.html').as_uri()}{address}", **options)
        wait(browser, "document.querySelector('#main h1')")

    yield open_at
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.__x === undefined")


def wait(browser: webdriver.Chrome, condition: str) -> Any:
    """Until a condition holds in the page; returns its value."""
    for _ in range(200):
        if value := browser.execute_script(f"return {condition}"):
            return value
        time.sleep(0.05)
    raise AssertionError(f"never: {condition}")


def press(browser: webdriver.Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def text(browser: webdriver.Chrome, selector: str = "main") -> str:
    """Lone surrogates replaced: the driver's protocol cannot carry them."""
    return browser.execute_script(f"return (document.querySelector({selector!r})?.textContent ?? '').toWellFormed()")


def title_is(browser: webdriver.Chrome, start: str) -> None:
    wait(browser, f"document.title.startsWith({start!r})")


def some_page(site: Path, group: str, i: int = 0) -> int:
    return [unit for unit, page in enumerate(read_data(site, f"index-{group}")["page"]) if page >= 0][i]


def addresses(site: Path) -> list[str]:
    dead = read_data(site, "index-L1.1")["page"].index(-1)
    return [
        "",
        "#/g/L1.1",
        f"#/u/L1.1/{some_page(site, 'L1.1')}",
        f"#/u/L1.1/{dead}",
        "#/p/2",
        "#/g/nowhere",
        "#/u/L1.1/x",
    ]


def test_every_kind_of_page_opens_quietly_and_without_a_network(browser, site, at):
    for address in addresses(site):
        at(address)
        names = "return performance.getEntriesByType('resource').map(entry => entry.name)"
        assert all(name.startswith("file://") for name in browser.execute_script(names))
        assert browser.title


def test_the_same_over_http(browser, site):
    handler = functools.partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        open_page(browser, f"http://127.0.0.1:{server.server_port}/#/u/L1.1/{some_page(site, 'L1.1')}")
        wait(browser, "document.querySelector('.context')")
        assert browser.get_log("browser") == []
        server.shutdown()


def test_the_model_page(browser, at):
    at()
    assert text(browser, "h1") == NAME
    assert browser.execute_script("return document.querySelectorAll('.map td a').length") == 5 * 5
    assert browser.execute_script("return document.querySelectorAll('.lines polyline').length") == 1
    browser.execute_script("document.querySelector('.map td a').click()")
    title_is(browser, "L0.0 · ")


def test_hostile_tokens_are_inert_and_shown(browser, site, at):
    seen = ""
    for unit in [some_page(site, "L1.1", i) for i in range(6)]:
        at(f"#/u/L1.1/{unit}")
        wait(browser, "document.querySelector('.context')")
        seen += text(browser)
        tags = "return [...document.querySelectorAll('main script, img, iframe, main b b, i')].length"
        assert browser.execute_script(tags) == 0
    for part in (
        "<script>alert(1)</script>",
        "<img src=x onerror",
        '" onmouseover="',
        "\\x00",
        "\\u200f\\u202ertl",
        "{{ 7 * 7 }}",
    ):
        assert part in seen
    assert "(10,000 characters)" in seen
    at("#/g/L9.0")
    wait(browser, "document.querySelectorAll('.rows .row').length")
    assert "<script>" in text(browser, ".rows")


def test_hover_on_a_token_tells_its_act(browser, site, at):
    unit = some_page(site, "L1.1")
    at(f"#/u/L1.1/{unit}")
    peak = browser.execute_script(
        "const t = document.querySelector('.context .peak'); t.scrollIntoView({block: 'center'}); return t"
    )
    ActionChains(browser).move_to_element(peak).perform()
    wait(browser, "!document.getElementById('tip').hidden")
    act = browser.execute_script("return document.querySelector('.context .act').textContent")
    assert text(browser, "#tip").endswith(f" · {act}")


def test_search_sort_and_filters_find(browser, at):
    at("#/g/L9.0")
    shown = "document.querySelector('[role=status]').textContent"
    wait(browser, f"{shown} === '34,816 of 34,816 units'")
    assert len(browser.execute_script("return [...document.querySelectorAll('.rows .row')]")) < 60
    press(browser, "/", "word346")
    wait(browser, f"{shown} === '56 of 34,816 units'")  # 346, 3460 to 3469 and 34600 to 34699, the even ones
    press(browser, Keys.ENTER)
    assert browser.execute_script("return document.activeElement.className") == "rows"
    at("#/g/L9.0?q=17")
    wait(browser, "document.querySelector('.rows .row .unit')?.textContent === '17'")  # the number itself comes first
    at("#/g/L9.0?only=dead")
    wait(browser, f"{shown} === '349 of 34,816 units'")
    at("#/g/L9.0?sort=max")
    wait(browser, "document.querySelector('.rows .row .max')?.textContent === '9.6'")
    browser.execute_script("document.querySelectorAll('.heads button')[2].click()")
    wait(browser, "location.hash.endsWith('sort=max-up')")
    wait(browser, "document.querySelector('.rows .row[aria-selected=true] .max').textContent === '0'")


def test_tens_of_thousands_of_rows_scroll_smoothly(browser, at):
    at("#/g/L9.0")
    wait(browser, "document.querySelectorAll('.rows .row').length")
    script = """
      const done = arguments[0], rows = document.querySelector('.rows'), spent = [];
      let n = 0;
      function step() {
        const start = performance.now();
        rows.scrollTop += 1000;
        requestAnimationFrame(() => {
          rows.getBoundingClientRect();
          spent.push(performance.now() - start);
          if (++n < 60) setTimeout(step, 0);
          else done([spent.sort((a, b) => a - b)[30], rows.querySelectorAll('.row').length, rows.scrollTop]);
        });
      }
      step();
    """
    median, n_rows, top = browser.execute_async_script(script)
    assert top >= 50_000
    assert n_rows < 80
    assert median < 50  # ms, the frame's own wait included; the whole list at once takes seconds
    browser.execute_script("document.querySelector('.rows').scrollTop = 1e9")
    wait(browser, "document.getElementById('row-34815') && !document.getElementById('row-34815').hidden")


def test_a_tree_can_be_walked(browser, site, at):
    unit = some_page(site, "L1.0")
    at(f"#/u/L1.0/{unit}")
    children = [unit + 16 * i for i in range(4)]
    shown = browser.execute_script("return [...document.querySelectorAll('.children .chip')].map(c => c.hash)")
    assert sorted(shown) == sorted(f"#/u/L1.1/{child}" for child in children)
    browser.execute_script("document.querySelector('.children .chip').click()")
    title_is(browser, "L1.1 ")
    child = int(browser.execute_script("return location.hash.split('/').pop()"))
    beside = browser.execute_script("return document.querySelector('.siblings > .chip').hash")
    browser.execute_script("document.querySelector('.siblings > .chip').click()")
    wait(browser, f"document.querySelector('h1').textContent.startsWith('L1.1 · {beside.split('/')[-1]} ')")
    assert int(beside.split("/")[-1]) in children
    assert int(beside.split("/")[-1]) != child
    press(browser, "u")
    title_is(browser, f"L1.0 {unit} ")


def test_keys_alone(browser, at):
    at()
    press(browser, "?")
    wait(browser, "document.getElementById('help').open")
    press(browser, Keys.ESCAPE)
    wait(browser, "!document.getElementById('help').open")
    press(browser, "i")
    title_is(browser, "L9.0 ")
    at("#/g/L1.1")
    wait(browser, "document.querySelector('.rows .row[aria-selected=true]')")
    press(browser, "j", "j", "k", Keys.ARROW_DOWN)
    second = wait(browser, "document.querySelector('#row-2[aria-selected=true] .unit')?.textContent")
    press(browser, Keys.ENTER)
    title_is(browser, f"L1.1 {second} ")
    press(browser, "k")
    wait(browser, f"!document.title.startsWith('L1.1 {second} ')")
    press(browser, "j")
    title_is(browser, f"L1.1 {second} ")
    press(browser, "i")
    wait(browser, f"document.querySelector('.rows .row[aria-selected=true] .unit')?.textContent === '{second}'")
    press(browser, "/")
    assert browser.execute_script("return document.activeElement.id") == "search"


def test_focus_is_visible(browser, at):
    at("#/g/L1.1")
    press(browser, Keys.TAB)
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_prompt_shows_open_units_of_every_layer(browser, site, at):
    at("#/p/0")
    data = read_data(site, "prompts-0")
    wait(browser, "document.querySelectorAll('.open').length === 5")
    last = len(data["tokens"]) - 1
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.open')[3].querySelectorAll('.chip b')].map(b => b.textContent)"
    )
    assert shown == [str(unit) for unit, _ in data["acts"]["L1.1"][last]]
    press(browser, "k")
    wait(browser, f"document.querySelectorAll('.text .t')[{last - 1}].getAttribute('aria-pressed') === 'true'")
    browser.execute_script("document.querySelector('.open .chip').click()")
    title_is(browser, "L0.0 ")


def test_what_is_not_there_says_so(browser, site, at):
    at("#/u/L1.1/999999")
    assert "there is no unit 999999 in a group L1.1" in text(browser)
    dead = read_data(site, "index-L1.1")["page"].index(-1)
    at(f"#/u/L1.1/{dead}")
    assert "never opened on the text" in text(browser)


@pytest.mark.parametrize("width", [320, 400, 768])
def test_narrow_screens_do_not_scroll_sideways(browser, site, at, width):
    for address in addresses(site):
        at(address, width=width)
        assert scroll_width(browser) <= width, address


def test_colours_follow_the_scheme(browser, at):
    seen = []
    for scheme in ("light", "dark"):
        at(scheme=scheme)
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        seen.append(browser.execute_script(style))
    assert all(light != dark for light, dark in zip(*seen, strict=True))


def test_the_colours_are_those_of_a_report():
    report = (TEMPLATES / "base.html.j2").read_text()
    site = (ASSETS / "style.css").read_text()
    for start in (":root {\n  --page", "@media (prefers-color-scheme: dark) {"):
        block = report[report.index(start) :].split("}")[0]
        assert block in site


def test_labels_are_text_are_searched_and_come_with_their_score(browser, tmp_path):
    build(tiny_opened(), tmp_path / "site", features=("random:12",), provider=ByRule())
    index = read_data(tmp_path / "site", "index-L1.1")
    unit = next(unit for unit, label in enumerate(index["label"]) if label)
    browser.get_log("browser")
    open_page(browser, f"{(tmp_path / 'site' / 'index.html').as_uri()}#/u/L1.1/{unit}")
    wait(browser, "document.querySelector('.facts')")
    assert index["label"][unit] in text(browser, ".facts")
    assert "contexts right, half by chance; by rules <b>" in text(browser, ".facts")
    open_page(browser, f"{(tmp_path / 'site' / 'index.html').as_uri()}?again#/g/L1.1")
    wait(browser, "document.querySelector('#search')")
    press(browser, "/")
    press(browser, "<i>")
    wait(
        browser,
        f"document.querySelector('[role=status]').textContent.startsWith('{sum(map(bool, index['label']))} of')",
    )
    assert browser.get_log("browser") == []


def test_the_model_page_has_figures_by_level_and_tables(browser, tmp_path):
    sheet = Sheet("Loss <b>", ["model", "loss"], [["<i>plain</i>", "4.1"], ["tiny", "4.2"]])
    build(replace(tiny_opened(), sheets=lambda _: [sheet]), tmp_path / "site", features=("random:1",))
    open_page(browser, (tmp_path / "site" / "index.html").as_uri())
    wait(browser, "document.querySelector('.map')")
    maps = browser.execute_script("return [...document.querySelectorAll('.map b')].map(node => node.textContent)")
    assert maps == ["L0", "NMSE", "Dead", "Zombie", "Dense"]
    groups = read_data(tmp_path / "site", "site")["groups"]
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.map')[1].querySelectorAll('td')].map(node => Number(node.textContent))"
    )
    by_level = sorted(groups, key=lambda group: (group["level"], group["layer"]))
    assert shown == pytest.approx([group["nmse"] for group in by_level], rel=5e-3)
    assert "Loss <b>" in text(browser)
    assert "<i>plain</i>4.1" in text(browser)

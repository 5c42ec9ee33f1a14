"""Contexts in a notebook: whatever a token says is text, and shades follow values."""

import re
from html.parser import HTMLParser

from analysis.context_table import context_table
from analysis.features import Context

STRINGS = ["<script>alert(1)</script>", '" onmouseover="x', "&amp;", " the"]


class Reader(HTMLParser):
    """Tags and text as a browser reads them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_tokens_are_text_whatever_they_say():
    context = Context(tokens=[0, 1, 2, 3], values=[1.0, 0.5, 0.0, 0.0], peak=0)
    read = Reader(context_table([context], STRINGS, caption="<b>leaf</b>"))
    assert read.text == "<b>leaf</b>" + "".join(STRINGS)
    assert set(read.tags) == {"table", "caption", "tbody", "tr", "td", "span"}
    assert read.attributes == {"style", "title"}


def test_shades_are_relative_to_the_largest_value_of_all_rows():
    contexts = [Context([3], [-2.0], 0), Context([3, 3], [1.0, 0.0], 0)]
    page = context_table(contexts, STRINGS)
    assert re.findall(r"0\.\d+(?=\)\")", page) == ["0.80", "0.47"]
    assert page.count("<tr>") == 2
    assert page.count("<span") == 2


def test_no_contexts_and_all_zero_values_are_shown_too():
    assert Reader(context_table([], STRINGS)).text == ""
    assert Reader(context_table([Context([3, 3], [0.0, 0.0], 0)], STRINGS)).text == " the the"

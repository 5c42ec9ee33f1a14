"""Docstrings are plain text with `code`: what reStructuredText would take for other markup is escaped."""

import re

from sphinx.application import Sphinx


def escape(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(
            part if part.startswith("`") else re.sub(r"[*|]|_(?=\W|$)", lambda match: "\\" + match[0], part)
            for part in parts
        )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon reads the sections
    return {"parallel_read_safe": True, "parallel_write_safe": True}

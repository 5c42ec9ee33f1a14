"""Tables: on a terminal, in Markdown, in CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table


class Sheet(NamedTuple):
    """A table of text; the first column is left-aligned, numbers follow."""

    title: str
    header: list[str]
    rows: list[list[str]]


def to_rich(sheet: Sheet) -> Table:
    table = Table(title=sheet.title)
    for i, name in enumerate(sheet.header):
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(escape, row))
    return table


def to_markdown(sheet: Sheet) -> str:
    lines = [sheet.header, ["---", *["---:"] * (len(sheet.header) - 1)], *sheet.rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{sheet.title}:\n\n{table}\n"


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for each record, under the names of the first; what is None is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()

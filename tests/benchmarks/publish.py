"""One experiment's table, printed and written to docs/results/NAME.{json,md} with command, hardware and date."""

import json
import sys
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import hardware

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def publish(name: str, title: str, rows: list[dict], notes: list[str]) -> None:
    """Print the table and write both files."""
    columns = list(rows[0])
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(str(row[c]) for c in columns))
    Console().print(table)
    made = {
        "command": f"python -m tests.benchmarks.{Path(sys.argv[0]).stem}",
        "date": date.today().isoformat(),
        "hardware": hardware("cpu"),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**made, "rows": rows, "notes": notes}, indent=2) + "\n")
    origin = f"`{made['command']}`, {made['hardware']}, {made['date']}."
    text = [f"# {title}", "", origin, "", *markdown(columns, [[row[c] for c in columns] for row in rows]), ""]
    (RESULTS / f"{name}.md").write_text("\n".join([*text, *(f"- {note}" for note in notes)]) + "\n")


def markdown(columns: list[str], rows: list[list]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)]

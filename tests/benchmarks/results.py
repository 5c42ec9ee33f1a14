"""docs/results/bench.{json,md}: all benchmarks, all devices; what a device has not run is listed as not run."""

import json
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

from cayley_interp.files import write_atomically
from tests.benchmarks.measure import Group, described, hardware
from tests.benchmarks.publish import markdown

COLUMNS = [
    "shape",
    "dtype",
    "device",
    "implementation",
    "ms, median (range)",
    "tokens/s",
    "ratio",
    "of the bound",
    "MB",
]

HEAD = """# Benchmarks

Implementations of one operation run interleaved in one process; ms are medians (range) of a call after two to warm up.
*ratio*: how many times as fast as the first implementation of the shape, a token where tokens are given. *of the
bound*: the share of its speed limit that an implementation reaches, the limit being the slower of a memory copy of what
must be read and written and of the arithmetic at the rate of a plain matrix product in that dtype, both measured on the
same device. *MB*: by how much a fresh process (on a GPU: the allocator) peaks above where it began, with parameters.
"""

COMMANDS = {"cpu": "make bench", "cuda": "make bench-gpu"}

Results = dict[str, Any]
"""{"rows": [...]}, each with the hardware, command and date it was measured with, or without figures."""


def read(folder: Path) -> Results:
    path = folder / "bench.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def merged(old: Results, rows: list[dict], device: str, command: str, groups: dict[str, list[Group]]) -> Results:
    """The rows measured now in place of the same ones measured before; rows of groups that are no more are dropped."""
    made = {"hardware": hardware(device), "command": command, "date": date.today().isoformat()}
    new = {_key(row): row | made for row in rows}
    kept = {_key(row): row for row in old["rows"]} | new
    ordered = []
    for name, own in groups.items():
        for group in own:
            for implementation in group.cases:
                empty = {**described(group), "device": name, "implementation": implementation}
                ordered.append(kept.get(_key(empty), empty))
    return {"rows": ordered}


def write(folder: Path, results: Results, notes: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "bench.json", json.dumps(results, indent=1) + "\n")
    write_atomically(folder / "bench.md", page(results["rows"], notes))


def page(rows: list[dict], notes: list[str]) -> str:
    """A table for each operation."""
    lines = [HEAD, *(f"- {line}" for line in [*origins(rows), *notes]), ""]
    by_operation: dict[str, list[dict]] = {}
    for row in rows:
        by_operation.setdefault(row["operation"], []).append(row)
    for operation, own in by_operation.items():
        lines += [f"## {operation}", "", *markdown(COLUMNS, table(own)), ""]
    return "\n".join(lines)


def origins(rows: list[dict]) -> list[str]:
    """Where the rows of each device come from, and how many are still to be run there."""
    lines = []
    for device, group in groupby(sorted(rows, key=lambda row: row["device"]), key=lambda row: row["device"]):
        own = list(group)
        runs = sorted({(row["hardware"], row["command"], row["date"]) for row in own if "hardware" in row})
        lines += [f"{device}: {hardware}, `{command}`, {date}." for hardware, command, date in runs]
        if left := sum("hardware" not in row for row in own):
            command = COMMANDS[device]
            lines.append(f"{device}: **{left} of {len(own)} rows have not been run**; `{command}` runs them.")
    return lines


def table(rows: list[dict]) -> list[list[str]]:
    """The rows of an operation; those of a shape of which nothing has been run become one."""
    lines = []
    for shape, group in groupby(rows, key=lambda row: (row["shape"], row["dtype"], row["device"])):
        own = list(group)
        if any("hardware" in row for row in own):
            lines += [cells(row) for row in own]
        else:
            names = "; ".join(row["implementation"] for row in own)
            lines.append([*shape, names, "**not run**", "", "", "", ""])
    return lines


def cells(row: dict) -> list[str]:
    """A row as text."""
    fixed = [row["shape"], row["dtype"], row["device"], row["implementation"]]
    if "hardware" not in row:
        return [*fixed, "not run", "", "", "", ""]
    if "error" in row:
        return [*fixed, f"failed: {row['error'].replace('|', '/')}", "", "", "", ""]
    low, high = row["ms_range"]
    return [
        *fixed,
        f"{number(row['ms'])} ({number(low)}-{number(high)})",
        f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
        f"{row['ratio']:.2f}x" if "ratio" in row else "",
        f"{100 * row['of_bound']:.3g} % ({row['bound']})" if "of_bound" in row else "",
        f"{row['memory_mb']:,.0f}" if "memory_mb" in row else "",
    ]


def number(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 1_000 else f"{ms:.3g}"


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("operation", "shape", "dtype", "device", "implementation"))

"""Honest timing: interleaved runs, medians, ratios to a named baseline in one process, and peak memory apart."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from training.environment import cpu_model, peak_resident_memory

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other in turn, after one call of each to warm up."""
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def peak_memory_of(module: str, case: str) -> int:
    """Bytes that `python -m MODULE --memory CASE` adds to its resident peak: a fresh process for each case."""
    out = subprocess.run([sys.executable, "-m", module, "--memory", case], capture_output=True, text=True, check=True)
    return int(out.stdout)


def resident_growth(setup: Callable[[], Callable[[], object]]) -> int:
    """Bytes by which the resident peak grows while `setup` builds a case and its call runs twice.

    torch loads 40 MB of Python modules at the first `backward(grad)`, whatever the model: they are loaded before.
    """
    x = torch.randn(8, 8, requires_grad=True)
    (x @ x).backward(torch.ones(8, 8))
    before = peak_resident_memory()
    call = setup()
    call()
    call()
    return peak_resident_memory() - before


def publish(name: str, title: str, rows: list[dict], notes: list[str]) -> None:
    """Print the table and write docs/results/NAME.{json,md} with command, hardware and date."""
    columns = list(rows[0])
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(str(row[c]) for c in columns))
    Console().print(table)
    made = {
        "command": f"python -m tests.benchmarks.{Path(sys.argv[0]).stem}",
        "date": date.today().isoformat(),
        "hardware": f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**made, "rows": rows, "notes": notes}, indent=2) + "\n")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows]
    origin = f"`{made['command']}`, {made['hardware']}, {made['date']}."
    text = [f"# {title}", "", origin, "", *lines, "", *(f"- {note}" for note in notes)]
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n")


def milliseconds(times: list[float]) -> str:
    """Median and range."""
    return f"{1e3 * statistics.median(times):.1f} ({1e3 * min(times):.1f}-{1e3 * max(times):.1f})"

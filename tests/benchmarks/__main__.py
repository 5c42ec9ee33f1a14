"""Time every fast path against its baseline and its bound, and write docs/results/bench.{json,md}.

make bench        # on this processor
make bench-gpu    # on a GPU
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from tests.benchmarks import results
from tests.benchmarks.cases import MODULES, groups_of, notes
from tests.benchmarks.measure import measure
from tests.benchmarks.publish import RESULTS

Benchmark = Literal["walsh", "bottleneck", "training", "molt", "jacobian", "activations", "loading"]


@dataclass
class Bench:
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run; rows of other devices stay as they are."""
    only: list[Benchmark] = field(default_factory=lambda: list(MODULES))
    """Which benchmarks to run; rows of the others stay as they are."""
    rounds: int | None = None
    """Samples of each case; by default as many as its benchmark says."""
    out: Path = RESULTS
    """Folder of bench.json and bench.md."""


def main(bench: Bench) -> int:
    if bench.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False here. `make bench` runs on the processor.", file=sys.stderr)
        return 2
    console, failed = Console(), 0
    command = results.COMMANDS[bench.device]
    groups = {device: groups_of(device) for device in ("cpu", "cuda")}
    for name in bench.only:
        for group in MODULES[name].groups(bench.device):
            start = time.perf_counter()
            rows = measure(group, bench.device, bench.rounds)
            table = Table(*results.COLUMNS[3:], title=f"{group.operation}, {group.shape}, {group.dtype}")
            found = results.merged(results.read(bench.out), rows, bench.device, command, groups)
            results.write(bench.out, found, notes())
            for row in rows:
                table.add_row(*results.cells(row | {"hardware": ""})[3:])
                failed += "error" in row
            console.print(table)
            console.print(f"{time.perf_counter() - start:.0f} s", highlight=False)
    console.print(f"written: {bench.out / 'bench.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Bench, description=__doc__)))

"""A declared sweep of replacements, trained run by run and then compared layer by layer.

    python -m analysis.frontier gemma-270m-L9 --out frontier --dry-run        # the commands, nothing else
    python -m analysis.frontier gemma-270m --layers 9 --kinds molt transcoder --seeds 0 1 2 --out frontier --jobs 2
    python -m analysis.frontier gemma-270m --out frontier -- --host-dtype bfloat16      # flags of every run behind --

Run again after whatever stopped it: finished runs are skipped, others go on from their checkpoints.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis.compare import compare, write_comparison
from analysis.comparison import Settings
from analysis.page import read_metrics
from analysis.sweeps import SWEEPS, Cell, Sweep
from cayley_interp.files import write_atomically
from molt_lens.maps import Kind

ROOT = Path(__file__).parents[1]
"""The checkout, which the training command is a module of."""
TAIL = 8
"""Last lines shown of a run that failed."""
POLL_SECONDS = 0.5


@dataclass
class Frontier:
    """The folder of a sweep: runs/CELL, logs/CELL.log, activations/ that all runs share, and L<layer>/ comparisons."""

    sweep: Sweep
    out: Path
    cells: list[Cell] = field(init=False)

    def __post_init__(self):
        self.cells = list(self.sweep.cells())

    def run_dir(self, cell: Cell) -> Path:
        return self.out / "runs" / cell.name

    def log(self, cell: Cell) -> Path:
        return self.out / "logs" / f"{cell.name}.log"

    def is_done(self, cell: Cell) -> bool:
        return (self.run_dir(cell) / "report.html").is_file()

    def command(self, cell: Cell) -> list[str]:
        return self.sweep.command(cell, self.run_dir(cell), self.out / "activations")

    def start(self) -> None:
        """Make the folders.

        Raises:
            ValueError: they are of a sweep with other settings than a cell's name says.
        """
        file, asked = self.out / "sweep.json", self.sweep.shared()
        if file.is_file():
            there = json.loads(file.read_text())
            if differing := [name for name in asked if there.get(name) != asked[name]]:
                listed = "; ".join(f"{name} {there.get(name)} and not {asked[name]}" for name in differing)
                raise ValueError(f"{self.out} holds runs with {listed}: give another --out, or the same settings")
        for name in ("runs", "logs"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asked, indent=2) + "\n")

    def share_done(self, cell: Cell) -> float:
        """Of a cell's steps, by its log."""
        try:
            config: dict[str, Any] = json.loads((self.run_dir(cell) / "config.json").read_text())
            steps = config["tokens"] // config["batch_size"] * config["epochs"]
            records = read_metrics(self.run_dir(cell) / "metrics.jsonl")
        except (OSError, ValueError):  # not there yet, or a line half written
            return 0.0
        return min(1.0, max((record["step"] for record in records), default=0) / steps)


def train_all(frontier: Frontier, jobs: int, console: Console) -> list[Cell]:
    """Run what is not done, `jobs` at a time; returns the cells that failed, the others are not stopped by them.

    Whatever ends it, KeyboardInterrupt included, ends the runs; they go on from their checkpoints next time.
    """
    waiting = [cell for cell in frontier.cells if not frontier.is_done(cell)]
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    done, failed = len(frontier.cells) - len(waiting), list[Cell]()
    with _bar(console) as bar:
        task = bar.add_task("", total=len(frontier.cells), completed=done)
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    running[cell] = _start(frontier, cell, jobs)
                for cell, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[cell]
                    done += 1
                    if process.returncode or not frontier.is_done(cell):
                        failed.append(cell)
                    word = "failed" if cell in failed else "done"
                    bar.console.print(f"{word}: {cell.name} ({done} of {len(frontier.cells)})", markup=False)
                shares = sum(frontier.share_done(cell) for cell in running)
                bar.update(task, completed=done + shares, description=", ".join(cell.name for cell in running))
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.terminate()  # a run can be killed at any moment
            for process in running.values():
                process.wait()
    return failed


def _start(frontier: Frontier, cell: Cell, jobs: int) -> subprocess.Popen[bytes]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // jobs))),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with frontier.log(cell).open("ab") as log:
        return subprocess.Popen(frontier.command(cell), stdout=log, stderr=subprocess.STDOUT, env=environment)


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
        speed_estimate_period=1_800,
    ) as bar:
        yield bar


def compare_layers(frontier: Frontier, settings: Settings, console: Console, device: str = "cpu") -> list[Path]:
    """One comparison a layer, of what is done; returns their pages."""
    pages = []
    for layer in frontier.sweep.layers:
        runs = [str(frontier.run_dir(c)) for c in frontier.cells if c.layer == layer and frontier.is_done(c)]
        if not runs:
            continue
        console.print(f"comparing {len(runs)} runs of layer {layer}", markup=False)
        out = frontier.out / f"L{layer}"
        command = shlex.join(["python", "-m", "analysis.frontier", *sys.argv[1:]])
        comparison = compare(runs, settings, out, device=device, command=command, console=console)
        write_comparison(comparison, out, "config")
        pages.append(out / "index.html")
    return pages


@dataclass(frozen=True)
class Options:
    """Train a declared sweep of replacements and compare them; flags of every run may follow behind --."""

    sweep: tyro.conf.Positional[str]
    """One of the sweeps of analysis/sweeps.py."""
    out: Path
    """Folder of the sweep; found again, it goes on."""
    layers: tuple[int, ...] = ()
    """These layers instead of the sweep's."""
    kinds: tuple[Kind, ...] = ()
    """Only these kinds of the sweep."""
    seeds: tuple[int, ...] = ()
    """These seeds instead of the sweep's."""
    n: int | None = None
    """Another size."""
    tokens: int | None = None
    """Other training tokens in an epoch."""
    epochs: int | None = None
    """Another number of epochs."""
    jobs: int = 1
    """Runs at once; they share the cores."""
    dry_run: bool = False
    """Print the commands and leave it at that."""
    device: str = "cpu"
    """Device that the comparisons measure on; runs choose their own, or are told behind --."""
    compare: Settings = field(default_factory=Settings)
    """What the comparisons measure."""


def chosen(options: Options, arguments: tuple[str, ...]) -> Sweep:
    """The sweep with what the options say in place of its own.

    Raises:
        ValueError: no such sweep, or a kind that it does not have.
    """
    if options.sweep not in SWEEPS:
        raise ValueError(f"no sweep is called {options.sweep!r}: the sweeps are {', '.join(SWEEPS)}")
    sweep = SWEEPS[options.sweep]
    if absent := [kind for kind in options.kinds if kind not in sweep.gates]:
        raise ValueError(f"{options.sweep} has no kind {absent[0]}: it has {', '.join(sweep.gates)}")
    given = {name: getattr(options, name) for name in ("layers", "seeds", "n", "tokens", "epochs")}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value not in ((), None)}
    gates = {kind: gates for kind, gates in sweep.gates.items() if not options.kinds or kind in options.kinds}
    return replace(sweep, gates=gates, arguments=(*sweep.arguments, *arguments), **changes)


def run(options: Options, arguments: tuple[str, ...]) -> int:
    """Train and compare; 1 where a run failed, which the others do not mind.

    Raises:
        ValueError: options that do not fit the sweep or what the folder holds, or what `compare` raises.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    frontier = Frontier(chosen(options, arguments), options.out.resolve())
    if options.dry_run:
        for cell in frontier.cells:
            print(f"# {cell.name} is done" if frontier.is_done(cell) else shlex.join(frontier.command(cell)))
        return 0
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: expected 1 or more")
    frontier.start()
    failed = train_all(frontier, options.jobs, console)
    pages = compare_layers(frontier, options.compare, console, options.device)
    for cell in failed:
        lines = frontier.log(cell).read_text(errors="replace").splitlines()[-TAIL:]
        said = "".join(f"\n    {line}" for line in lines)
        console.print(f"failed: {cell.name}, whose log {frontier.log(cell)} ends with{said}", markup=False)
    for page in pages:
        print(f"comparison: {page}")
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    """Exit status: 1 where a run failed, 2 with one line for what was wrong, 130 when interrupted."""
    end = argv.index("--") if "--" in argv else len(argv)
    try:
        return run(tyro.cli(Options, args=argv[:end], prog="python -m analysis.frontier"), tuple(argv[end + 1 :]))
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

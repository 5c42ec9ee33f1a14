"""A declared sweep of replacements, trained run by run and then compared layer by layer.

    python -m analysis.frontier gemma-270m-L9 --out frontier --dry-run        # the commands, nothing else
    python -m analysis.frontier gemma-270m --layers 9 --kinds molt transcoder --seeds 0 1 2 --out frontier --jobs 2
    python -m analysis.frontier gemma-270m --out frontier -- --host-dtype bfloat16      # flags of every run behind --

Run again after whatever stopped it: finished runs are skipped, others go on from their checkpoints.
"""

import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from analysis.command_line import run_queue
from analysis.compare import compare, write_comparison
from analysis.comparison import Settings
from analysis.jobs import Job, check_at_once, claim_folder, run_jobs, say_what_failed
from analysis.sweeps import SWEEPS, Cell, Sweep
from molt_lens.maps import Kind


@dataclass
class Frontier:
    """The folder of a sweep: runs/CELL, logs/CELL.log, activations/ that all runs share, and L<layer>/ comparisons."""

    sweep: Sweep
    out: Path
    jobs: dict[Cell, Job] = field(init=False)

    def __post_init__(self):
        self.jobs = {cell: self._job(cell) for cell in self.sweep.cells()}

    def start(self) -> None:
        """Make the folders.

        Raises:
            ValueError: they are of a sweep with other settings than a cell's name says.
        """
        claim_folder(self.out, "sweep.json", self.sweep.shared())

    def _job(self, cell: Cell) -> Job:
        arguments = self.sweep.arguments_of(cell, self.out / "activations")
        run_dir, log = self.out / "runs" / cell.name, self.out / "logs" / f"{cell.name}.log"
        return Job(cell.name, "training.train_molt", arguments, run_dir, log)


def compare_layers(frontier: Frontier, settings: Settings, console: Console, device: str = "cpu") -> list[Path]:
    """One comparison a layer, of what is done; returns their pages."""
    pages = []
    for layer in frontier.sweep.layers:
        runs = [str(job.run_dir) for cell, job in frontier.jobs.items() if cell.layer == layer and job.is_done()]
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
        for job in frontier.jobs.values():
            print(f"# {job.name} is done" if job.is_done() else shlex.join(job.command()))
        return 0
    check_at_once(options.jobs)
    frontier.start()
    failed = run_jobs(list(frontier.jobs.values()), options.jobs, console)
    pages = compare_layers(frontier, options.compare, console, options.device)
    say_what_failed(failed, console)
    for page in pages:
        print(f"comparison: {page}")
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    """Exit status: 1 where a run failed, 2 with one line for what was wrong, 130 when interrupted."""
    return run_queue(Options, run, "analysis.frontier", argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

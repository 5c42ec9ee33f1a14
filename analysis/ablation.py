"""A tiny Cayley-GPT against its declared variants: trained with the same batches, compared seed by seed.

    python -m analysis.ablation --out ablation --dry-run                  # the commands, nothing else
    python -m analysis.ablation --out ablation --jobs 2                   # eleven variants, three seeds, 500 steps
    python -m analysis.ablation --out ablation --variants signed parents --seeds 0 -- --data shards --precision bf16

Flags of every run follow behind --; token shards (--data FOLDER) save each run its tokenising. Run again after whatever
stopped it: finished runs are skipped, others go on from their checkpoints, and what was measured is found again.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from analysis.ablation_page import write_ablation_page
from analysis.ablation_results import Place, ProbeSeeds, Results, measure
from analysis.ablation_tables import about, loss_sheet, records, sheets, short
from analysis.command_line import run_queue
from analysis.comparison import Kept
from analysis.jobs import Job, check_at_once, claim_folder, run_jobs, say_what_failed
from analysis.matched import read_config, validations
from analysis.tables import to_csv, to_markdown, to_rich
from analysis.variants import Variant, choose
from cayley_interp.files import write_atomically

CURVE_POINTS = 10
"""Validations of a run; a cold stop, which ends at one, has them twice as often."""


@dataclass(frozen=True)
class Ablation:
    """The folder of an ablation: runs/VARIANT-sSEED, logs/, measured/, the tables and the page."""

    out: Path
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    max_steps: int = 500
    arguments: tuple[str, ...] = ()
    """Further flags of every run."""

    def start(self) -> None:
        """Make the folders.

        Raises:
            ValueError: flags that the ablation sets itself, or a folder with runs of other settings.
        """
        own = {f for v in self.variants for f in self._flags(v, 0, None) if f.startswith("--")} | {"--out"}
        given = [argument.split("=")[0].replace("_", "-") for argument in self.arguments]
        if twice := [name for name in given if name in own]:
            raise ValueError(
                f"{twice[0]} behind -- is set by the ablation or by one of its variants: choose others with "
                "--variants, or declare one in analysis/variants.py"
            )
        declared = {f"variant {v.name}": [v.recipe, *v.flags] for v in self.variants}
        shared = {"max_steps": self.max_steps, "arguments": list(self.arguments)}
        claim_folder(self.out, "settings.json", shared | declared)

    def places(self) -> list[Place]:
        """Every run, seed by seed, so that an ablation that is stopped has whole pairs."""
        return [Place(v, seed, self._run_dir(v.name, seed)) for seed in self.seeds for v in self.variants]

    def jobs(self, *, cold_stops: bool) -> Iterator[Job]:
        """The runs of as many steps, or those that end at the loss of one, where that is done."""
        for place in self.places():
            if bool(place.variant.cold_stop) != cold_stops:
                continue
            target = self._target(place.variant, place.seed)
            if cold_stops and target is None:
                continue
            arguments = (place.variant.recipe, *self._flags(place.variant, place.seed, target), *self.arguments)
            log = self.out / "logs" / f"{place.name}.log"
            yield Job(place.name, "training.train_cayley", arguments, place.run_dir, log)

    def _flags(self, variant: Variant, seed: int, target: tuple[float, float] | None) -> tuple[str, ...]:
        flags = [flag.replace("{seed}", str(seed)) for flag in variant.flags]
        flags += ["--seed", str(seed), "--checkpoint-every", "100", "--keep-checkpoints", "1"]
        every = max(1, self.max_steps // CURVE_POINTS)
        if not variant.cold_stop:
            return (*flags, "--max-steps", str(self.max_steps), "--eval-every", str(every))
        flags += ["--max-steps", str(2 * self.max_steps), "--eval-every", str(max(1, every // 2))]
        loss, margin = target or (float("nan"), float("nan"))
        return (*flags, "--target-val-loss", f"{loss:.4f}", "--target-margin", f"{margin:.4f}")

    def _target(self, variant: Variant, seed: int) -> tuple[float, float] | None:
        """The loss to end at and the margin to begin the warm-down at; None until the runs that say so are done.

        The margin is what its warm-down brought the variant that is not stopped: begun with it, a warm-down ends near
        the target. Shorter runs gain rather more, so the target is met before the end of the warm-down, not missed.
        """
        if not (variant.base and variant.cold_stop):
            return None
        base, whole = (self._run_dir(name, seed) for name in (variant.base, variant.cold_stop))
        if not all((run / "report.html").is_file() for run in (base, whole)):
            return None
        curve = validations(whole)
        start = curve[-1].step * (1 - read_config(whole)["optim"]["warmdown_frac"])
        before = min(curve, key=lambda v: abs(v.step - start))
        return validations(base)[-1].val_loss, max(0.0, before.val_loss - curve[-1].val_loss)

    def _run_dir(self, variant: str, seed: int) -> Path:
        return self.out / "runs" / f"{variant}-s{seed}"


@dataclass(frozen=True)
class Options:
    """Train a tiny Cayley-GPT and its variants and compare them; flags of every run may follow behind --."""

    out: Path
    """Folder of the ablation; found again, it goes on."""
    variants: tuple[str, ...] = ()
    """Of analysis/variants.py, with what they are compared with; by default all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial weights, order of batches and random signs."""
    max_steps: int = 500
    """Steps of every run that is not stopped at a loss."""
    jobs: int = 1
    """Runs at once; they share the cores."""
    probe: ProbeSeeds = "one"
    """Probe the first seed's runs, every seed's, or none: minutes a run."""
    device: str = "cpu"
    """Device to measure on; runs choose their own, or are told behind --."""
    dry_run: bool = False
    """Print the commands and leave it at that."""


def run(options: Options, arguments: tuple[str, ...]) -> int:
    """Train and compare; 1 where a run failed, which the others do not mind.

    Raises:
        ValueError: options that do not fit the variants or what the folder holds, or runs that cannot be compared.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not options.seeds or len(set(options.seeds)) < len(options.seeds) or options.max_steps < 1:
        raise ValueError(
            f"--seeds {options.seeds} --max-steps {options.max_steps}: expected distinct seeds, 1 step or more"
        )
    chosen = choose(options.variants)
    ablation = Ablation(options.out.resolve(), chosen, options.seeds, options.max_steps, arguments)
    if len(ablation.places()) < 2:
        raise ValueError(f"{chosen[0].name} of one seed is nothing to compare: ask for more --variants or --seeds")
    if options.dry_run:
        print_commands(ablation)
        return 0
    check_at_once(options.jobs)
    ablation.start()
    failed = run_jobs(list(ablation.jobs(cold_stops=False)), options.jobs, console)
    failed += run_jobs(list(ablation.jobs(cold_stops=True)), options.jobs, console)
    done = [place for place in ablation.places() if (place.run_dir / "report.html").is_file()]
    if len(done) > 1:
        results = measure(chosen, done, Kept(ablation.out / "measured"), options.probe, options.device, console)
        page = write_results(results, ablation)
        Console().print(to_rich(short(loss_sheet(results))))
        print(f"ablation: {page}")
    say_what_failed(failed, console)
    return 1 if failed else 0


def print_commands(ablation: Ablation) -> None:
    jobs = [*ablation.jobs(cold_stops=False), *ablation.jobs(cold_stops=True)]
    for job in jobs:
        print(f"# {job.name} is done" if job.is_done() else shlex.join(job.command()))
    for place in ablation.places():
        if place.name not in {job.name for job in jobs}:
            print(f"# {place.name} ends at the loss of {place.variant.base}-s{place.seed}, which is not known yet")


def write_results(results: Results, ablation: Ablation) -> Path:
    """ablation.csv with a row a run, ablation.json with everything, ablation.md with the tables; returns the page."""
    settings = {
        "max_steps": ablation.max_steps,
        "seeds": list(ablation.seeds),
        "arguments": shlex.join(ablation.arguments),
        "validation_tokens": results.n_tokens,
        "validation_sequences": results.n_sequences,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["python", "-m", "analysis.ablation", *sys.argv[1:]]),
    }
    missing = [p.name for p in ablation.places() if p.name not in {run.place.name for run in results.runs}]
    write_atomically(ablation.out / "ablation.csv", to_csv(records(results)))
    content = {"settings": settings, "missing": missing, **about(results)}
    write_atomically(ablation.out / "ablation.json", json.dumps(content, indent=2) + "\n")
    write_atomically(ablation.out / "ablation.md", "\n".join(map(to_markdown, sheets(results))))
    write_ablation_page(results, settings, missing, ablation.out / "index.html")
    return ablation.out / "index.html"


def main(argv: list[str]) -> int:
    """Exit status: 1 where a run failed, 2 with one line for what was wrong, 130 when interrupted."""
    return run_queue(Options, run, "analysis.ablation", argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

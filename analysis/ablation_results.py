"""What an ablation measures: losses on the same tokens, paired by seed, units, the token tax, probes.

Runs of one seed see the same batches in the same order, so their losses are compared sequence by sequence. The error of
one seed says how well this difference of two models is known; that over seeds, how well that of two recipes is.
"""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float64
from rich.console import Console
from scipy.stats import t as student
from torch import Tensor, float64, tensor

from analysis.comparison import Figures, Kept
from analysis.hosts import open_host
from analysis.matched import TokenTax, Validation, token_tax, validations
from analysis.page import RunFiles
from analysis.parity import Subject, common_shards, open_subject
from analysis.probing import PER_SPEECH, WORDS, ProbeRow, ProbeScore, probe_host
from analysis.progress import make_progress
from analysis.shards import TokenShards, read_windows
from analysis.speeches import cut_passages, read_speeches
from analysis.variants import Variant
from cayley_interp.losses import PairedDifference, paired_difference, window_losses
from molt_lens.fingerprint import fingerprint_of_module

DEFINITIONS = 1
"""Raised when a figure changes its meaning, so that older ones are not found again."""
BATCH_SIZE = 16
ALL_TOKENS = 1 << 40

ProbeSeeds = Literal["none", "one", "all"]


@dataclass(frozen=True)
class Place:
    """A run's place in the ablation."""

    variant: Variant
    seed: int
    run_dir: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name}-s{self.seed}"


@dataclass(frozen=True)
class Run:
    """A finished run with its figures."""

    place: Place
    losses: Float64[Tensor, "sequence 1"]
    """Mean loss of each validation sequence, nats per token."""
    curve: list[Validation]
    final: Figures
    """Of its metrics.jsonl: what `Evaluation.scalars` has."""
    probes: list[ProbeRow]
    """Empty where it was not probed."""

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def tokens(self) -> int:
        return self.curve[-1].tokens

    def levels(self) -> list[dict[str, int | float]]:
        """For each level, sums over layers of features, dead, zombie and dense ones, and the mean L0 of a layer."""
        by_level: dict[int, list[dict[str, Any]]] = {}
        for record in self.final["levels"]:
            by_level.setdefault(record["level"], []).append(record)
        counts = {"features": "n_features", "dead": "dead", "zombie": "zombie", "dense": "dense"}
        return [
            {name: sum(layer[key] for layer in layers) for name, key in counts.items()}
            | {"l0": statistics.fmean(layer["l0"] for layer in layers)}
            for _, layers in sorted(by_level.items())
        ]

    def least_mlp(self) -> float:
        """Nats that the loss rises by without the MLP that matters least: near 0, one has gone silent."""
        return min(worth["nats"] for worth in self.final["mlp_worth"])


@dataclass(frozen=True)
class OverSeeds:
    """A figure of every seed, and what they say together."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def standard_error(self) -> float:
        """Over seeds; nan for one."""
        n = len(self.values)
        return statistics.stdev(self.values) / n**0.5 if n > 1 else float("nan")

    @property
    def half_interval(self) -> float:
        """Half the 95 % interval, by Student's t: of three seeds 4.3 standard errors; nan for one."""
        n = len(self.values)
        return float(student.ppf(0.975, n - 1)) * self.standard_error if n > 1 else float("nan")


@dataclass(frozen=True)
class Difference:
    """Loss of a variant less that of its base, nats per token; the standard errors of a seed are over sequences."""

    variant: Variant
    by_seed: dict[int, PairedDifference]

    @property
    def over_seeds(self) -> OverSeeds:
        return OverSeeds(tuple(difference.mean for difference in self.by_seed.values()))


@dataclass(frozen=True)
class Tax:
    """The base's tokens over those of a run that was stopped at its loss."""

    run: Run
    tax: TokenTax | None
    why_not: str
    """Why there is none."""


@dataclass(frozen=True)
class Results:
    declared: tuple[Variant, ...]
    """Whether or not they have a run."""
    runs: list[Run]
    n_tokens: int
    n_sequences: int

    def of(self, variant: str) -> list[Run]:
        return [run for run in self.runs if run.place.variant.name == variant]

    def variants(self) -> list[Variant]:
        """That have a run, in the order they are declared in."""
        return [variant for variant in self.declared if self.of(variant.name)]

    def differences(self) -> list[Difference]:
        """Of the variants that have a base, on the seeds that both have."""
        found = []
        for variant in self.variants():
            bases = {run.place.seed: run for run in self.of(variant.base or "")}
            pairs = [(run, bases[run.place.seed]) for run in self.of(variant.name) if run.place.seed in bases]
            if pairs:
                by_seed = {run.place.seed: paired_difference(run.losses, base.losses) for run, base in pairs}
                found.append(Difference(variant, by_seed))
        return found

    def taxes(self) -> list[Tax]:
        """Of the runs that were stopped at the loss of their base."""
        found = []
        for run in (r for r in self.runs if r.place.variant.cold_stop):
            bases = [base for base in self.of(run.place.variant.base or "") if base.place.seed == run.place.seed]
            if not bases:
                continue
            try:
                found.append(Tax(run, token_tax(bases[0].place.run_dir, run.place.run_dir), ""))
            except ValueError as error:  # it never came near the loss
                found.append(Tax(run, None, str(error)))
        return found


def measure(
    declared: tuple[Variant, ...], places: list[Place], kept: Kept, probe: ProbeSeeds, device: str, console: Console
) -> Results:
    """Losses of all these runs on every validation window, and probes of what is declared to be probed.

    Raises:
        ValueError: fewer than two runs, or two that differ in validation text, tokenizer or n_ctx.
    """
    subjects = [open_subject(str(place.run_dir), device) for place in places]
    shards = common_shards(subjects)
    runs = []
    with make_progress(console=console) as bar:
        task = bar.add_task("", total=len(places))
        for place, subject in zip(places, subjects, strict=True):
            bar.update(task, description=f"loss of {place.name}")
            key = {
                "definitions": DEFINITIONS,
                "model": fingerprint_of_module(subject.model),
                "config": asdict(subject.model.config),
                "tokenizer": shards.tokenizer.to_str(),
            }
            losses = _losses(subject, shards, kept, key)
            probes = []
            if place.variant.probed and (probe == "all" or (probe == "one" and place.seed == places[0].seed)):
                bar.update(task, description=f"probing {place.name}")
                probes = _probes(place, kept, key, device)
            files = RunFiles(place.run_dir)
            runs.append(Run(place, losses, validations(place.run_dir), files.final(), probes))
            bar.advance(task)
    n_ctx = subjects[0].model.config.n_ctx
    return Results(declared, runs, len(runs[0].losses) * n_ctx, len(runs[0].losses))


def _losses(subject: Subject, shards: TokenShards, kept: Kept, key: Figures) -> Float64[Tensor, "sequence 1"]:
    key = key | {"part": "losses", "text": shards.val_sums}
    if (found := kept.find(key)) is None:
        windows = read_windows(shards, subject.model.config.n_ctx, ALL_TOKENS)
        found = {"by_sequence": window_losses(subject.model, windows, BATCH_SIZE).mean(1).tolist()}
        kept.keep(key, found)
    # One column: all windows are of one length, so that means of sequences are all that a paired difference needs.
    return tensor(found["by_sequence"], dtype=float64)[:, None]


def _probes(place: Place, kept: Kept, key: Figures, device: str) -> list[ProbeRow]:
    key = key | {"part": "probes", "words": WORDS, "per_speech": PER_SPEECH}
    if (found := kept.find(key)) is None:
        host = open_host(str(place.run_dir), device)
        passages = cut_passages(read_speeches(), WORDS, PER_SPEECH)
        rows = probe_host(place.name, host, host.n_layers // 2, passages)
        found = {"rows": [asdict(row) for row in rows]}
        kept.keep(key, found)
    return [ProbeRow(**(row | {"model": place.name, "score": ProbeScore(**row["score"])})) for row in found["rows"]]

"""An ablation as tables and records."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from analysis.ablation_results import Difference, OverSeeds, Results, Run
from analysis.parity import show
from analysis.probing import ProbeRow, show_k
from analysis.probing import records as probe_records
from analysis.speeches import LABELS, Label
from analysis.tables import Sheet

DIFFERENCE, INTERVAL = "difference ± SE over seeds", "95 %"

ProbeKey = tuple[str, str, str, Label, int | None]
"""Variant, source, pooling, label, k."""


def sheets(results: Results) -> Iterator[Sheet]:
    """Losses, units, token tax, probes: those that there is anything to say in."""
    yield loss_sheet(results)
    for sheet in (unit_sheet(results), tax_sheet(results), *probe_sheets(results)):
        if sheet.rows:
            yield sheet


def loss_sheet(results: Results) -> Sheet:
    """A line a variant: its loss and its difference from the base, over seeds and seed by seed."""
    seeds = sorted({run.place.seed for run in results.runs})
    differences = {difference.variant.name: difference for difference in results.differences()}
    header = ["variant", "against", "loss", DIFFERENCE, INTERVAL, *(f"seed {seed}" for seed in seeds)]
    rows = []
    for variant in results.variants():
        runs = results.of(variant.name)
        cells = difference_cells(differences.get(variant.name), seeds)
        loss, tokens = (statistics.fmean(figures) for figures in ([r.loss for r in runs], [r.tokens for r in runs]))
        row = [variant.name, variant.base or "—", f"{loss:.4f}", *cells]
        rows.append([*row, str(len(runs)), f"{tokens:,.0f}", variant.says])
    title = (
        f"Validation loss in nats per token on {results.n_tokens:,} tokens in {results.n_sequences:,} sequences; of "
        "one seed ± the standard error over sequences"
    )
    return Sheet(title, [*header, "runs", "tokens", "differs by"], rows)


def short(sheet: Sheet) -> Sheet:
    """What a terminal has room for of the losses."""
    kept = [i for i, name in enumerate(sheet.header) if name in ("variant", "loss", DIFFERENCE, INTERVAL)]
    return Sheet(sheet.title, [sheet.header[i] for i in kept], [[row[i] for i in kept] for row in sheet.rows])


def difference_cells(difference: Difference | None, seeds: list[int]) -> list[str]:
    if difference is None:
        return ["—"] * (2 + len(seeds))
    over = difference.over_seeds
    interval = "—"
    if not math.isnan(over.half_interval):
        interval = f"{over.mean - over.half_interval:+.4f} to {over.mean + over.half_interval:+.4f}"
    return [
        plus_minus(over, "+.4f"),
        interval,
        *(show(difference.by_seed[seed]) if seed in difference.by_seed else "—" for seed in seeds),
    ]


def unit_sheet(results: Results) -> Sheet:
    """A line a variant and level, means over seeds; a vanilla model has no level."""
    header = ["variant", "level", "features", "L0 a layer", "dead", "zombie", "dense", "least MLP worth"]
    rows = []
    for variant in results.variants():
        runs = results.of(variant.name)
        worth = f"{statistics.fmean(run.least_mlp() for run in runs):.3f}"
        levels = list(zip(*(run.levels() for run in runs), strict=True))
        for level, of_runs in enumerate(levels):
            means = {name: statistics.fmean(own[name] for own in of_runs) for name in of_runs[0]}
            counts = [f"{means[name]:,.1f}" for name in ("dead", "zombie", "dense")]
            name, least = (variant.name, worth) if level == 0 else ("", "")
            rows.append([name, str(level), f"{means['features']:,.0f}", f"{means['l0']:.2f}", *counts, least])
        if not levels:
            rows.append([variant.name, *["—"] * 6, worth])
    return Sheet(
        "Features, summed over layers, and nats that the least of a run's MLPs is worth; means over seeds", header, rows
    )


def tax_sheet(results: Results) -> Sheet:
    """A line a seed; by the nearest validation, and by where the line between two validations crosses the loss."""
    header = ["run", "ends at", "base's loss", "base's tokens", "its tokens", "token tax", "by the crossing"]
    rows, ratios, crossings = [], [], []
    for tax in results.taxes():
        if tax.tax is None:
            rows.append([f"{tax.run.place.name}: {tax.why_not}", *["—"] * 6])
            continue
        run, matched = tax.tax.run, tax.tax.matched
        ratios.append(tax.tax.ratio)
        crossing = "—"
        if tax.tax.crossing_ratio is not None:
            crossings.append(tax.tax.crossing_ratio)
            crossing = f"{tax.tax.crossing_ratio:.2f}x"
        losses = [f"{matched.val_loss:.4f}", f"{run.val_loss:.4f}"]
        tokens = [f"{run.tokens:,}", f"{matched.tokens:,}"]
        rows.append([tax.run.place.name, *losses, *tokens, f"{tax.tax.ratio:.2f}x", crossing])
    if len(ratios) > 1:
        means = [plus_minus(OverSeeds(tuple(v)), ".2f") + "x" if len(v) > 1 else "—" for v in (ratios, crossings)]
        rows.append(["mean ± SE over seeds", *["—"] * 4, *means])
    return Sheet("Token tax at equal loss: the base's training tokens over the vanilla run's", header, rows)


def probe_scores(results: Results) -> dict[ProbeKey, OverSeeds | ProbeRow]:
    """Of each thing probed its row, or the scores of its seeds where there are several."""
    found: dict[ProbeKey, list[ProbeRow]] = {}
    for run in results.runs:
        for row in run.probes:
            key = (run.place.variant.name, row.source, row.pooling, row.label, row.score.k)
            found.setdefault(key, []).append(row)
    return {
        key: rows[0] if len(rows) == 1 else OverSeeds(tuple(row.score.accuracy for row in rows))
        for key, rows in found.items()
    }


def accuracy_and_error(score: OverSeeds | ProbeRow) -> tuple[float, float]:
    """Balanced accuracy and its standard error: over seeds, or of one run over folds."""
    if isinstance(score, ProbeRow):
        return score.score.accuracy, score.score.standard_error
    return score.mean, score.standard_error


def probe_sheets(results: Results) -> list[Sheet]:
    """A table a label: a line for each thing probed, the columns are k."""
    scores = probe_scores(results)
    ks = list(dict.fromkeys(k for *_, k in scores))
    made = []
    for label in LABELS:
        rows = []
        for what in dict.fromkeys(key[:3] for key in scores if key[3] == label):
            cells = [accuracy_and_error(scores[(*what, label, k)]) for k in ks]
            rows.append([f"{what[0]}: {what[1]}, {what[2]}", *(f"{a:.3f} ± {error:.3f}" for a, error in cells)])
        title = f"{label.capitalize()}: balanced accuracy on held-out presidents, ± SE over seeds or, of one run, folds"
        made.append(Sheet(title, ["probed", *map(show_k, ks)], rows))
    return made


def plus_minus(over: OverSeeds, form: str) -> str:
    mean = format(over.mean, form)
    return mean if math.isnan(over.standard_error) else f"{mean} ± {over.standard_error:{form.lstrip('+')}}"


# ---- As records ----


def records(results: Results) -> list[dict[str, Any]]:
    """One a run, flat: what has no value is None."""
    differences = {(d.variant.name, seed): pair for d in results.differences() for seed, pair in d.by_seed.items()}
    taxes = {tax.run.place.name: tax.tax for tax in results.taxes()}
    n_levels = max(len(run.levels()) for run in results.runs)
    return [_record(run, differences, taxes.get(run.place.name), n_levels) for run in results.runs]


def _record(run: Run, differences: dict[tuple[str, int], Any], tax: Any, n_levels: int) -> dict[str, Any]:
    variant, seed = run.place.variant, run.place.seed
    difference = differences.get((variant.name, seed))
    record = {
        "variant": variant.name,
        "seed": seed,
        "base": variant.base,
        "recipe": variant.recipe,
        "flags": " ".join(variant.flags),
        "tokens": run.tokens,
        "parameters": run.final["n_parameters"],
        "val_loss": run.loss,
        "difference": difference and difference.mean,
        "difference_se": difference and difference.standard_error,
        "token_tax": tax and tax.ratio,
        "token_tax_crossing": tax and tax.crossing_ratio,
        "least_mlp_worth": run.least_mlp(),
    }
    levels = run.levels()
    for i in range(n_levels):
        level = levels[i] if i < len(levels) else {}
        record |= {f"level_{i}_{name}": level.get(name) for name in ("features", "l0", "dead", "zombie", "dense")}
    return record


def about(results: Results) -> dict[str, Any]:
    """Everything, as JSON has it; what is nan, an error of a single seed, is None."""
    differences = []
    for difference in results.differences():
        over = difference.over_seeds
        figures = {"mean": over.mean, "standard_error": over.standard_error, "half_interval_95": over.half_interval}
        by_seed = {str(seed): asdict(pair) for seed, pair in difference.by_seed.items()}
        known = {name: None if math.isnan(value) else value for name, value in figures.items()}
        base = difference.variant.base
        differences.append({"variant": difference.variant.name, "base": base, **known, "by_seed": by_seed})
    return {
        "variants": [asdict(variant) for variant in results.variants()],
        "runs": records(results),
        "curves": {run.place.name: [[v.tokens, v.val_loss] for v in run.curve] for run in results.runs},
        "differences": differences,
        "token_tax": [
            {"run": tax.run.place.name, "why_not": tax.why_not, **(asdict(tax.tax) if tax.tax else {})}
            for tax in results.taxes()
        ],
        "probes": [record for run in results.runs for record in probe_records(run.probes)],
    }

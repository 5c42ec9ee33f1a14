"""Sparse probing: how well the k best features of a layer tell what a text is, against dense activations and controls.

    python -m analysis.probing cayley-tiny-2L-sotu vanilla-tiny-sotu --out probing

After Gurnee et al. 2023 (arXiv:2305.01610): features are chosen by the difference of their means between the classes,
and a logistic regression reads the chosen ones. Text and labels are those of `analysis.speeches`. The folds are whole
presidents: no speech, and no speaker, is on both sides.

The packaged models were trained on most of these speeches, though on none of the labels; all sources share that.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Bool, Float, Int
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold

from analysis.command_line import run_command
from analysis.hosts import open_host
from analysis.pooled import pooled_activations, sources_of
from analysis.progress import make_progress
from analysis.speeches import LABELS, Label, Passage, cut_passages, read_speeches
from analysis.tables import Sheet, to_csv, to_markdown, to_rich
from cayley_interp.files import write_atomically
from molt_lens.hosts import Host

KS: tuple[int | None, ...] = (1, 2, 5, 16, None)
"""Features a probe may read; None is all."""

PENALTIES = (0.001, 0.01, 0.1, 1.0)
"""Values of scikit-learn's C, chosen within the training split."""

FOLDS = 5

WORDS, PER_SPEECH = 100, 4
"""Words of a probed passage, and most passages of a speech."""


@dataclass(frozen=True)
class ProbeScore:
    """Balanced accuracy (the mean of the classes' recalls, 0.5 by chance) on held-out groups."""

    k: int | None
    accuracy: float
    """Mean over folds."""
    standard_error: float
    """Over folds, whose training splits overlap: a guide, not a test."""
    n_features: int
    n_texts: int


@dataclass(frozen=True)
class ProbeRow:
    """A score with what was probed."""

    model: str
    layer: int
    source: str
    pooling: str
    label: Label
    score: ProbeScore


def probe(
    features: Float[np.ndarray, "text feature"],
    labels: Bool[np.ndarray, " text"],
    groups: Int[np.ndarray, " text"],
    ks: tuple[int | None, ...] = KS,
    seed: int = 0,
) -> list[ProbeScore]:
    """Held-out accuracy of k-sparse probes, one score for each k.

    In every fold all is learned from its training split: the mean and deviation that features are standardised by, the
    k features with the largest difference of standardised means, the penalty (on one inner fold of whole groups), and
    the weights. Folds are stratified by class as far as whole groups allow.

    Raises:
        ValueError: shapes that disagree, features that are not finite, or fewer groups of a class than folds.
    """
    if features.ndim != 2 or not len(features) == len(labels) == len(groups):
        raise ValueError(f"expected one label and group a row, got {features.shape}, {labels.shape}, {groups.shape}")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(1).sum())
        raise ValueError(f"features of {bad} of {len(features)} texts are not finite: look for nan in the activations")
    for value in (False, True):
        if (n := len(np.unique(groups[labels == value]))) < FOLDS:
            raise ValueError(f"{n} groups have a text of class {value}, and {FOLDS} folds need as many each")
    scores: dict[int | None, list[float]] = {k: [] for k in ks}
    for train, test in _split(features, labels, groups, seed):
        x, y, g = features[train], labels[train], groups[train]
        mean, std = x.mean(0), x.std(0)
        scale = np.where(std > 0, 1 / np.where(std > 0, std, 1), 0)  # a constant feature tells nothing
        x, x_test = (x - mean) * scale, (features[test] - mean) * scale
        order = np.argsort(-np.abs(x[y].mean(0) - x[~y].mean(0)), kind="stable")
        for k in ks:
            chosen = order[:k]
            fitted = _fit(x[:, chosen], y, g, seed)
            scores[k].append(float(balanced_accuracy_score(labels[test], fitted.predict(x_test[:, chosen]))))
    return [
        ProbeScore(k, float(np.mean(s)), float(np.std(s, ddof=1) / len(s) ** 0.5), features.shape[1], len(features))
        for k, s in scores.items()
    ]


def _fit(
    x: Float[np.ndarray, "text chosen"], y: Bool[np.ndarray, " text"], groups: Int[np.ndarray, " text"], seed: int
) -> LogisticRegression:
    """A regression whose penalty did best on groups left out of a first fit."""
    train, held_out = _split(x, y, groups, seed)[0]
    accuracies = [
        balanced_accuracy_score(y[held_out], _regression(c).fit(x[train], y[train]).predict(x[held_out]))
        for c in PENALTIES
    ]
    return _regression(PENALTIES[int(np.argmax(accuracies))]).fit(x, y)


def _regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, class_weight="balanced", tol=1e-3, max_iter=1000)


def _split(x: np.ndarray, y: np.ndarray, groups: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, held-out rows) of each fold."""
    return list(StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(x, y, groups))


def probe_host(
    name: str,
    host: Host,
    layer: int,
    passages: list[Passage],
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> list[ProbeRow]:
    """Every source of a host at one layer, pooled both ways, every label, every k.

    Args:
        progress: is told the share that is done.

    Raises:
        ValueError: what `pooled_activations` and `probe` raise.
    """
    texts = [passage.text for passage in passages]
    presidents = sorted({passage.speech.president for passage in passages})
    groups = np.array([presidents.index(passage.speech.president) for passage in passages])
    rows, sources = [], sources_of(host)
    for i, source in enumerate(sources):
        pooled = pooled_activations(host, texts, layer, source)
        for j, ((pooling, features), (label, ask)) in enumerate(product(pooled.items(), LABELS.items())):
            answers = [ask(passage.speech) for passage in passages]
            asked = np.array([answer is not None for answer in answers])
            labels = np.array([answer is True for answer in answers])
            for score in probe(features[asked], labels[asked], groups[asked], seed=seed):
                rows.append(ProbeRow(name, layer, source, pooling, label, score))
            progress((i + (j + 1) / (len(pooled) * len(LABELS))) / len(sources))
    return rows


# ---- How it is shown ----


def to_sheets(rows: list[ProbeRow]) -> list[Sheet]:
    """A table for each label: a line for each thing probed, the columns are k."""
    tables: dict[Label, dict[str, list[str]]] = {label: {} for label in LABELS}
    for row in rows:
        what = f"{row.model}, layer {row.layer}: {row.source}, {row.pooling} ({row.score.n_features:,})"
        score = f"{row.score.accuracy:.3f} ± {row.score.standard_error:.3f}"
        tables[row.label].setdefault(what, []).append(score)
    title = f"balanced accuracy on held-out presidents, {FOLDS} folds ± standard error, by features a probe may read"
    header = ["probed (features)", *map(show_k, KS)]
    return [
        Sheet(f"{label.capitalize()}: {title}", header, [[what, *scores] for what, scores in lines.items()])
        for label, lines in tables.items()
        if lines
    ]


def show_k(k: int | None) -> str:
    return "all" if k is None else f"k = {k}"


def records(rows: list[ProbeRow]) -> list[dict[str, Any]]:
    """One for each score; k is None where a probe reads all features."""
    return [{name: v for name, v in asdict(row).items() if name != "score"} | asdict(row.score) for row in rows]


def main(
    models: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    layers: tuple[int, ...] = (),
    words: int = WORDS,
    per_speech: int = PER_SPEECH,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Probe what models know of a passage's party, century and delivery, from k features of a layer.

    Args:
        models: Bundled models' names, run or model folders, gemma-3-270m, or hosts' folders or Hub ids.
        out: Folder for probing.csv, probing.json and probing.md.
        layers: Layers to probe; by default the middle one.
        words: Words in a passage.
        per_speech: Most passages of a speech.
        seed: Of the folds.
        device: Device to run the models on.
    """
    if not models:
        raise ValueError("name at least one model to probe")
    passages = cut_passages(read_speeches(), words, per_speech)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[ProbeRow] = []
    with make_progress() as bar:
        for name in models:
            host = open_host(name, device)
            for layer in layers or (host.n_layers // 2,):
                task = bar.add_task(f"{name}, layer {layer}", total=1)
                rows += probe_host(
                    name, host, layer, passages, seed, lambda share, task=task: bar.update(task, completed=share)
                )
    console, sheets = Console(), to_sheets(rows)
    for sheet in sheets:
        console.print(to_rich(sheet))
    write_atomically(out / "probing.csv", to_csv(records(rows)))
    write_atomically(out / "probing.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    write_atomically(out / "probing.md", "\n".join(map(to_markdown, sheets)))


if __name__ == "__main__":
    run_command(main, "analysis.probing")

"""CE-Bench's scores of features from contrasting pairs of texts, at equal width and beside a shuffled control.

    python -m analysis.ce_bench cayley-tiny-2L-sotu vanilla-tiny-sotu --out ce_bench

CE-Bench (Gulko, Peng and Kumar 2025, arXiv:2509.00691) asks of a pair of texts on one subject that contrast in one
respect whether some feature stands out: per pair, each feature's distance between the two texts (contrast) and between
the pair and the data set (independence), z-scored over features, the largest z. Three things differ here:

- The mean over the data set is taken. In the published code (48176fa) it stays 0, so that independence rewards the
  feature that is always on.
- The largest of m z-scores is at most sqrt(m - 1) and grows with m, so widths are matched: every source is cut to the
  same number of features, drawn at random, several times over.
- Beside each score stands the same score after each feature's values have been shuffled over the texts: what features
  of these frequencies and sizes score while they say nothing of the text. The excess over it is what counts.

The published stories are on the Hub only. The pairs here are passages of State of the Union speeches that contrast in
their century, party or delivery, matched in subject by their words (tf-idf): real text, with another contrast, so that
figures compare sources with one another and not with the published ones.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float, Int
from rich.console import Console
from scipy.optimize import linear_sum_assignment
from sklearn.feature_extraction.text import TfidfVectorizer

from analysis.command_line import run_command
from analysis.hosts import open_host
from analysis.pooled import Source, pooled_activations, sources_of
from analysis.progress import make_progress
from analysis.speeches import LABELS, Label, Passage, cut_passages, read_speeches
from analysis.tables import Sheet, to_markdown, to_rich
from cayley_interp.files import write_atomically


@dataclass(frozen=True)
class Distinction:
    """Means over pairs of the largest z-score over features."""

    contrast: float
    independence: float
    interpretability: float
    """Of the sum of both distances."""


@dataclass(frozen=True)
class WidthMatched:
    """Scores of `width` features, means over draws with the deviation between draws, and those of the control."""

    width: int
    n_pairs: int
    score: Distinction
    deviation: Distinction
    """Over draws of the features; 0 where all are taken."""
    shuffled: Distinction
    """The control, over the same draws."""


@dataclass(frozen=True)
class SourceScore:
    model: str
    layer: int
    source: str
    scores: WidthMatched


def distinction(first: Float[np.ndarray, "pair feature"], second: Float[np.ndarray, "pair feature"]) -> Distinction:
    """The scores of features whose mean activations over each text of the pairs are given.

    Raises:
        ValueError: other shapes, fewer than two pairs or features.
    """
    if first.shape != second.shape or first.ndim != 2 or min(first.shape) < 2:
        raise ValueError(f"expected two arrays [pair, feature] of 2 or more each, got {first.shape}, {second.shape}")
    contrast = np.abs(first - second)
    pair_mean = (first + second) / 2
    independence = np.abs(pair_mean - pair_mean.mean(0))
    return Distinction(
        *(float(_z(distance).max(1).mean()) for distance in (contrast, independence, contrast + independence))
    )


def _z(distance: Float[np.ndarray, "pair feature"]) -> Float[np.ndarray, "pair feature"]:
    """Standardised over features; 0 where all are alike."""
    distance = distance.astype(np.float64)
    std = distance.std(1, keepdims=True)
    return (distance - distance.mean(1, keepdims=True)) / np.where(std > 0, std, 1)


def width_matched(
    first: Float[np.ndarray, "pair feature"],
    second: Float[np.ndarray, "pair feature"],
    width: int,
    n_draws: int = 20,
    seed: int = 0,
) -> WidthMatched:
    """Scores of `width` features drawn at random, and of the same ones shuffled over the texts.

    Features that are constant over all texts are drawn like others: a dead feature is part of a dictionary's width.

    Raises:
        ValueError: a width below 2 or above the number of features, no draw, or what `distinction` raises.
    """
    n_features = first.shape[-1]
    if not 2 <= width <= n_features:
        raise ValueError(f"width must be from 2 to the {n_features} features, got {width}")
    if n_draws < 1:
        raise ValueError(f"n_draws must be 1 or more, got {n_draws}")
    generator = np.random.default_rng(seed)
    scores, controls = [], []
    for _ in range(n_draws):
        drawn = generator.permutation(n_features)[:width]
        a, b = first[:, drawn], second[:, drawn]
        scores.append(distinction(a, b))
        shuffled = generator.permuted(np.concatenate((a, b)), axis=0)  # each column by itself
        controls.append(distinction(shuffled[: len(a)], shuffled[len(a) :]))
    mean, deviation = _summary(scores)
    return WidthMatched(width, len(first), mean, deviation, _summary(controls)[0])


def _summary(scores: list[Distinction]) -> tuple[Distinction, Distinction]:
    """Mean and standard deviation over draws."""
    values = np.array([list(asdict(score).values()) for score in scores])
    return Distinction(*values.mean(0).tolist()), Distinction(*values.std(0).tolist())


def match_pairs(
    first: list[str], second: list[str], n_pairs: int
) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]:
    """Texts of two classes paired by their words, most alike first, none used twice: indices into both lists.

    The pairing is the one whose summed tf-idf cosine is largest.

    Raises:
        ValueError: n_pairs below 2, or more than the smaller class has texts.
    """
    if not 2 <= n_pairs <= min(len(first), len(second)):
        raise ValueError(f"n_pairs must be from 2 to the {min(len(first), len(second))} texts of a class")
    vectoriser = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit([*first, *second])
    similarity = np.asarray((vectoriser.transform(first) @ vectoriser.transform(second).T).todense())
    rows, columns = linear_sum_assignment(-similarity)
    best = np.argsort(-similarity[rows, columns], kind="stable")[:n_pairs]
    return rows[best], columns[best]


def contrasting_pairs(passages: list[Passage], label: Label, n_pairs: int) -> tuple[list[str], list[str]]:
    """Passages of which the label holds and others of which it does not, on the same subjects.

    Raises:
        ValueError: what `match_pairs` raises.
    """
    ask = LABELS[label]
    yes, no = ([p.text for p in passages if ask(p.speech) is value] for value in (True, False))
    rows, columns = match_pairs(yes, no, n_pairs)
    return [yes[i] for i in rows], [no[i] for i in columns]


def to_sheet(results: list[SourceScore]) -> Sheet:
    rows = []
    for result in results:
        s = result.scores
        figures = [
            f"{value:.2f} ± {spread:.2f} ({control:.2f})"
            for value, spread, control in zip(
                *(asdict(d).values() for d in (s.score, s.deviation, s.shuffled)), strict=True
            )
        ]
        rows.append([result.model, f"{result.layer}", result.source, *figures])
    scores = results[0].scores
    title = (
        f"CE-Bench scores of {scores.width:,} features, {scores.n_pairs} pairs: mean ± deviation over draws of the "
        "features (shuffled control)"
    )
    return Sheet(title, ["model", "layer", "source", "contrast", "independence", "interpretability"], rows)


def main(
    models: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    label: Label = "century",
    layer: int | None = None,
    pairs: int = 200,
    draws: int = 20,
    words: int = 100,
    per_speech: int = 4,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Score codes, their random control and dense activations on pairs of passages, all at the smallest width.

    Args:
        models: Bundled models' names, run or model folders, gemma-3-270m, or hosts' folders or Hub ids.
        out: Folder for ce_bench.json and ce_bench.md.
        label: In what the texts of a pair contrast.
        layer: Layer to score; by default the middle one.
        pairs: Pairs of passages.
        draws: Draws of the features.
        words: Words in a passage.
        per_speech: Most passages of a speech.
        seed: Of the draws.
        device: Device to run the models on.
    """
    if not models:
        raise ValueError("name at least one model to score")
    first, second = contrasting_pairs(cut_passages(read_speeches(), words, per_speech), label, pairs)
    out.mkdir(parents=True, exist_ok=True)
    activations: dict[tuple[str, int, Source], np.ndarray] = {}
    with make_progress() as bar:
        task = bar.add_task("", total=len(models))
        for name in models:
            host = open_host(name, device)
            where = host.n_layers // 2 if layer is None else layer
            sources = sources_of(host)
            for source in sources:
                bar.update(task, description=f"{name}, layer {where}: {source}")
                activations[name, where, source] = pooled_activations(host, first + second, where, source)["mean"]
                bar.advance(task, 1 / len(sources))
    width = min(acts.shape[1] for acts in activations.values())
    results = [
        SourceScore(*what, width_matched(acts[: len(first)], acts[len(first) :], width, draws, seed))
        for what, acts in activations.items()
    ]
    sheet = to_sheet(results)
    Console().print(to_rich(sheet))
    write_atomically(out / "ce_bench.json", json.dumps([asdict(result) for result in results], indent=2) + "\n")
    write_atomically(out / "ce_bench.md", to_markdown(sheet))


if __name__ == "__main__":
    run_command(main, "analysis.ce_bench")

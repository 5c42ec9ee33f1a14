"""Sparse probes on features whose answer is known, and what keeps a text from leaking into its own test."""

import csv
import io
import json

import numpy as np
import pytest

from analysis.probing import FOLDS, KS, ProbeRow, ProbeScore, _split, main, probe, records, to_sheets
from analysis.speeches import LABELS
from analysis.tables import to_csv

N = 300
GROUPS = np.arange(N) // 10
"""Thirty groups of ten texts, of both classes."""


def labels_and_noise(n_features: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.random(N) < 0.5, generator.normal(size=(N, n_features)).astype(np.float32)


def accuracies(features: np.ndarray, labels: np.ndarray, groups: np.ndarray = GROUPS) -> dict[int | None, float]:
    return {score.k: score.accuracy for score in probe(features, labels, groups)}


def test_one_feature_that_is_the_label_is_found():
    labels, features = labels_and_noise()
    features[:, 17] = 3 * labels
    found = accuracies(features, labels)
    assert found[1] == 1
    assert min(found.values()) > 0.95


def test_k_features_are_needed_where_the_label_is_spread_over_k():
    labels, features = labels_and_noise()
    features[:, 3:8] += 1.2 * labels[:, None]
    found = accuracies(features, labels)
    assert found[5] > found[1] + 0.1
    assert found[5] > 0.85


def test_noise_tells_nothing():
    """Selection on the held-out texts would make the best of 2,000 features look like a find."""
    labels, features = labels_and_noise(2000)
    found = accuracies(features, labels)
    assert all(abs(accuracy - 0.5) < 0.1 for accuracy in found.values())


def test_what_only_names_the_group_tells_nothing():
    """Each group has one class and a feature of its own: split by text it would be perfect, by group it is chance."""
    labels = GROUPS % 2 == 0
    _, features = labels_and_noise(30)
    features[:, :30] += 10 * (GROUPS[:, None] == np.arange(30))
    assert abs(accuracies(features, labels)[None] - 0.5) < 0.25
    assert accuracies(features, labels, np.arange(N))[None] > 0.95


def test_folds_are_whole_groups_and_cover_every_text_once():
    labels, features = labels_and_noise()
    folds = _split(features, labels, GROUPS, seed=3)
    assert len(folds) == FOLDS
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(N))
    for train, test in folds:
        assert not set(GROUPS[train]) & set(GROUPS[test])


def test_scale_and_constant_features_do_not_matter():
    labels, features = labels_and_noise()
    features[:, 5] += labels
    scaled = np.hstack((features * np.float32(1000), np.full((N, 1), 7, np.float32)))
    assert accuracies(scaled, labels)[1] == pytest.approx(accuracies(features, labels)[1])


def test_bad_input():
    labels, features = labels_and_noise()
    features[0, 0] = np.nan
    with pytest.raises(ValueError, match=f"features of 1 of {N} texts are not finite"):
        probe(features, labels, GROUPS)
    with pytest.raises(ValueError, match="0 groups have a text of class False, and 5 folds"):
        probe(np.zeros((0, 3), np.float32), labels[:0], GROUPS[:0])
    with pytest.raises(ValueError, match="4 groups have a text of class True"):
        probe(np.zeros((N, 3), np.float32), (np.arange(N) < 40) & labels, GROUPS)


def test_one_table_three_ways():
    scores = [ProbeScore(k, 0.5 + i / 100, 0.01, 4224, 90) for i, k in enumerate(KS)]
    rows = [ProbeRow("m", 3, "codes", "mean", label, score) for label in LABELS for score in scores]
    sheets = to_sheets(rows)
    assert [sheet.title.split(":")[0].lower() for sheet in sheets] == list(LABELS)
    assert sheets[0].rows == [["m, layer 3: codes, mean (4,224)", *(f"{s.accuracy:.3f} ± 0.010" for s in scores)]]
    lines = list(csv.DictReader(io.StringIO(to_csv(records(rows)))))
    assert [line["k"] for line in lines[:5]] == ["1", "2", "5", "16", ""]
    assert [float(line["accuracy"]) for line in lines] == [row.score.accuracy for row in rows]


@pytest.mark.slow
def test_the_command_probes_a_packaged_model(tmp_path):
    main(("vanilla-tiny-sotu",), tmp_path, words=30, per_speech=1)
    rows = json.loads((tmp_path / "probing.json").read_text())
    # Two sources, pooled two ways, three labels, five k.
    assert len(rows) == 2 * 2 * len(LABELS) * len(KS)
    assert {row["source"] for row in rows} == {"mlp_in", "resid"}
    assert f"{rows[0]['score']['accuracy']:.3f} ± " in (tmp_path / "probing.md").read_text()
    assert (tmp_path / "probing.csv").read_text().count("\n") == len(rows) + 1
    century = [row["score"]["accuracy"] for row in rows if row["label"] == "century" and row["score"]["k"] == 16]
    assert min(century) > 0.7

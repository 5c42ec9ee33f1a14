"""CE-Bench's scores against their definition, their bound, and what width and shuffling do to them."""

import json

import numpy as np
import pytest

from analysis.ce_bench import distinction, main, match_pairs, width_matched


def by_definition(first: np.ndarray, second: np.ndarray) -> list[float]:
    data_set = np.concatenate((first, second)).mean(0)
    scores = []
    for a, b in zip(first, second, strict=True):
        contrast, independence = abs(a - b), abs((a + b) / 2 - data_set)
        scores.append([((d - d.mean()) / d.std()).max() for d in (contrast, independence, contrast + independence)])
    return np.mean(scores, axis=0).tolist()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_scores_are_their_definition():
    first, second = noise(7, 30), noise(7, 30, seed=1) ** 2
    got = distinction(first, second)
    want = by_definition(first, second)
    assert [got.contrast, got.independence, got.interpretability] == pytest.approx(want, rel=1e-12)


def test_one_feature_that_tells_the_texts_apart_reaches_the_bound():
    first = np.zeros((5, 50))
    second = first.copy()
    second[:, 3] = 1
    assert distinction(first, second).contrast == pytest.approx(49**0.5)


def test_a_feature_that_is_always_on_is_not_independent():
    """Where the data set's mean is left at 0, as published, it alone would reach the bound."""
    first, second = 0.01 * noise(6, 50), 0.01 * noise(6, 50, seed=1)
    first[:, 3] += 10
    second[:, 3] += 10
    assert distinction(first, second).independence < 0.7 * 49**0.5


def test_wider_noise_scores_higher_and_matching_widths_undoes_it():
    wide = noise(40, 2000), noise(40, 2000, seed=1)
    narrow = noise(40, 50, seed=2), noise(40, 50, seed=3)
    assert distinction(*wide).contrast > distinction(*narrow).contrast + 0.8
    matched, own = width_matched(*wide, width=50), width_matched(*narrow, width=50)
    assert matched.score.contrast == pytest.approx(own.score.contrast, abs=0.15)
    assert own.deviation.contrast == pytest.approx(0)


def test_shuffling_takes_away_what_the_features_say_and_nothing_else():
    first, second = np.abs(noise(60, 40)), np.abs(noise(60, 40, seed=1))
    nothing = width_matched(first, second, width=40)
    assert nothing.score.interpretability == pytest.approx(nothing.shuffled.interpretability, abs=0.15)
    second[:, 7] += 4  # tells the second text of every pair from the first
    something = width_matched(first, second, width=40)
    assert something.score.contrast > something.shuffled.contrast + 0.5


def test_pairs_are_of_one_subject_and_no_text_is_used_twice():
    first = ["war and armies", "wheat and corn harvest", "railways and canals"]
    second = ["canals for railways", "harvest of wheat", "nothing alike whatever"]
    rows, columns = match_pairs(first, second, 2)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(1, 1), (2, 0)]


def test_bad_input():
    with pytest.raises(ValueError, match=r"two arrays \[pair, feature\]"):
        distinction(noise(1, 4), noise(1, 4))
    with pytest.raises(ValueError, match="width must be from 2 to the 4"):
        width_matched(noise(3, 4), noise(3, 4), width=5)
    with pytest.raises(ValueError, match="n_pairs must be from 2 to the 1"):
        match_pairs(["a"], ["b"], 2)


def test_the_command_scores_every_source_at_one_width(tmp_path):
    main(("vanilla-tiny-sotu",), tmp_path, pairs=10, draws=2, words=30, per_speech=1)
    results = json.loads((tmp_path / "ce_bench.json").read_text())
    assert [(r["source"], r["scores"]["width"], r["scores"]["n_pairs"]) for r in results] == [
        ("mlp_in", 128, 10),
        ("resid", 128, 10),
    ]
    assert "shuffled control" in (tmp_path / "ce_bench.md").read_text()

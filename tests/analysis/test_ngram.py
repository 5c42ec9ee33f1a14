"""The count models against their formulas, and against a slow count."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.ngram import NgramBaselines

D_VOCAB = 5
tokens = st.lists(st.integers(0, D_VOCAB - 1), min_size=1, max_size=60)


@given(tokens)
def test_probabilities_sum_to_one(ids: list[int]):
    model = NgramBaselines(np.array(ids), D_VOCAB)
    every = np.arange(D_VOCAB)
    assert model.unigram(every).sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(model.bigram(every[:, None], every[None]).sum(1), 1, atol=1e-12)


@given(tokens)
def test_bigram_is_the_formula(ids: list[int]):
    model = NgramBaselines(np.array(ids), D_VOCAB)
    pairs = list(itertools.pairwise(ids))
    for a in range(D_VOCAB):
        successors = [y for x, y in pairs if x == a]
        for b in range(D_VOCAB):
            unigram = (ids.count(b) + 1) / (len(ids) + D_VOCAB)
            distinct = len(set(successors))
            expected = unigram
            if successors:
                expected = (successors.count(b) + distinct * unigram) / (len(successors) + distinct)
            assert model.bigram(np.array(a), np.array(b)).item() == pytest.approx(expected, rel=1e-12)


def test_hand_computed():
    """0 1 0 1 0 2: p(1) = 3/9; after 0 came 1, 1, 2, so p(1|0) = (2 + 2 * 3/9) / (3 + 2)."""
    model = NgramBaselines(torch.tensor([0, 1, 0, 1, 0, 2]), 3)
    assert model.unigram(torch.tensor([0, 1, 2])).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9])
    assert model.bigram(torch.tensor(0), torch.tensor(1)).item() == pytest.approx((2 + 2 * 3 / 9) / 5)
    assert model.bigram(torch.tensor(2), torch.tensor(1)).item() == pytest.approx(3 / 9)  # 2 has no successor
    unigram, bigram = model.loss(torch.tensor([[0, 1, 0]]))
    assert unigram == pytest.approx(-(math.log(3 / 9) + math.log(4 / 9)) / 2)
    # After 1 came 0 twice.
    assert bigram == pytest.approx(-(math.log((2 + 2 * 3 / 9) / 5) + math.log((2 + 4 / 9) / 3)) / 2)


def test_unigram_of_a_uniform_corpus_is_log_vocabulary():
    unigram, _ = NgramBaselines(np.tile(np.arange(16), 10), 16).loss(np.arange(16)[None])
    assert unigram == pytest.approx(math.log(16), abs=1e-12)


def test_loss_does_not_depend_on_how_windows_are_cut():
    generator = np.random.default_rng(0)
    model = NgramBaselines(generator.integers(0, 50, 3000).astype(np.uint16), 50)
    windows = generator.integers(0, 50, (12, 9))
    halves = np.array([model.loss(windows[:6]), model.loss(windows[6:])])
    np.testing.assert_allclose(model.loss(windows), halves.mean(0), rtol=1e-13)


def test_only_the_first_tokens_are_counted():
    capped = NgramBaselines(np.array([0, 1, 1, 2, 2, 2]), 3, max_tokens=3)
    assert capped.loss(np.array([[0, 1]])) == NgramBaselines(np.array([0, 1, 1]), 3).loss(np.array([[0, 1]]))


def test_uint16_ids_do_not_overflow():
    model = NgramBaselines(np.array([60_000, 60_001] * 4, dtype=np.uint16), 65_536)
    assert model.bigram(np.array(60_000), np.array(60_001)).item() > 0.7


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([], dtype=np.int64), "one non-empty sequence"),
        (np.array([[0, 1]]), "one non-empty sequence"),
        (np.array([0.5]), "expected token ids as integers"),
        (np.array([0, 9]), "token ids run from 0 to d_vocab - 1 = 4"),
        (np.array([-1]), "token ids run from 0"),
    ],
)
def test_bad_tokens_are_refused(bad: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        NgramBaselines(bad, D_VOCAB)


def test_bad_windows_are_refused():
    with pytest.raises(ValueError, match="expected windows of shape"):
        NgramBaselines(np.array([0, 1]), 2).loss(np.array([[0], [1]]))

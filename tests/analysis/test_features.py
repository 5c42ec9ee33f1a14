"""Features and their contexts, and the display of tokens."""

from itertools import chain

import pytest
import torch

from analysis.features import choose_features, collect_features, top_contexts
from analysis.tokens import token_strings, visible
from analysis.units import UnitCounter
from tests.analysis.fabricated import HOSTILE, SPECIAL, make_model, make_tokenizer, make_windows

LEVELS = "4,2,0;7,4,8"


def test_counts_and_contexts_do_not_depend_on_the_batch_size():
    model, windows = make_model(LEVELS).eval(), make_windows()[:, :-1]
    a, b = (collect_features(model, windows, batch_size=size, seed=1) for size in (5, 12))
    for x, y in zip(chain(*a.counters), chain(*b.counters), strict=True):
        assert x.tokens == y.tokens == windows.numel()
        assert x.opened.equal(y.opened)
    assert [(f.layer, f.level, f.index) for f in a.features] == [(f.layer, f.level, f.index) for f in b.features]


def test_contexts_hold_the_values_of_the_codes():
    model, windows = make_model(LEVELS).eval(), make_windows()[:, :-1]
    report = collect_features(model, windows, batch_size=12, n_features=8, context=3)
    codes = model.codes(windows)
    assert {(f.layer, f.level) for f in report.features} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert len(report.features) == 8
    for f in report.features:
        indices, values = codes[f.layer][f.level]
        dense = torch.where(indices == f.index, values, 0).sum(-1)
        assert f.frequency == pytest.approx((dense != 0).double().mean().item())
        assert f.max_value == pytest.approx(dense.max().item())
        top = f.contexts[0]
        row, position = divmod(int(dense.argmax()), windows.shape[1])
        assert top.values[top.peak] == dense.max()
        assert top.tokens[top.peak] == windows[row, position]
        assert len(top.tokens) <= 7
        peaks = [context.values[context.peak] for context in f.contexts]
        assert peaks == sorted(peaks, reverse=True)
        assert min(peaks) > 0


def test_top_contexts_are_cut_at_the_ends_of_a_window():
    windows = torch.arange(10).view(2, 5)
    values = torch.tensor([[0.0, 0, 0, 0, 2], [-3.0, 0, 0, 1, 0]])
    first, second = top_contexts(windows, values, n_contexts=5, context=1)
    assert (first.tokens, first.values, first.peak) == ([5, 6], [-3.0, 0.0], 0)
    assert (second.tokens, second.values, second.peak) == ([3, 4], [0.0, 2.0], 1)
    assert top_contexts(windows, torch.zeros(2, 5), 5, 1) == []


def test_features_shown_are_neither_dense_nor_rare_where_there_is_a_choice():
    counter = UnitCounter([1] * 3)
    for token in range(100):
        counter.add(torch.tensor([[1.0, token < 5, token < 1]]))
    assert choose_features([[counter]], 1, min_active=4, seed=0) == [(0, 0, 1)]
    assert len(choose_features([[counter]], 9, min_active=4, seed=0)) == 3


def test_a_vanilla_model_has_no_features_to_collect():
    with pytest.raises(ValueError, match="levels=None"):
        collect_features(make_model(None), make_windows(), batch_size=4)


def test_tokens_are_shown_by_bytes():
    tokenizer = make_tokenizer()
    strings = token_strings(tokenizer, 280)
    shown = {text: strings[tokenizer.encode(text).ids[0]] for text in ("a", " ", "\n", "\x01")}
    assert shown == {"a": "a", " ": " ", "\n": "↵", "\x01": "\\x01"}
    assert strings[tokenizer.encode("é").ids[0]] == "\\xc3"  # half a character
    assert strings[tokenizer.token_to_id(SPECIAL)] == SPECIAL
    assert strings[tokenizer.token_to_id(HOSTILE[-1])] == "x" * 80 + "… (10,000 characters)"
    assert strings[279] == "<unused 279>"


def test_what_cannot_be_seen_is_escaped():
    assert visible("a\x00b\u200f\u202e\u00a0\t") == "a\\x00b\\u200f\\u202e\\xa0⇥"
    assert visible("שלום é 日") == "שלום é 日"

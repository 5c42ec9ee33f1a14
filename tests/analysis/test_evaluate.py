"""The evaluation as a whole: its figures are those of the definitions, and it leaves the model as it was."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.evaluate import evaluate_run
from analysis.mlp_worth import mlp_worths
from cayley_interp import CayleyGPT
from cayley_interp.losses import window_losses
from tests.analysis.fabricated import evaluate, make_model, make_tokenizer, make_windows

LEVELS = "4,2,0;7,4,8"


def test_evaluation_is_consistent_and_json():
    model, windows = make_model(LEVELS).train(), make_windows()
    evaluation = evaluate(LEVELS)
    assert evaluation.val_loss == pytest.approx(window_losses(model, windows, 12).mean().item(), rel=1e-6)
    assert evaluation.val_tokens == 12 * 16
    scalars = json.loads(json.dumps(evaluation.scalars()))
    assert [(row["layer"], row["level"]) for row in scalars["levels"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [row["n_features"] for row in scalars["levels"]] == [16, 128, 16, 128]
    assert scalars["levels"][0]["l0"] <= 2
    assert all(8 * row["l0"] < row["bits_per_token"] < 8 * row["l0"] + row["n_features"] for row in scalars["levels"])
    assert evaluation.sample.prompt == windows[0, :16].tolist()
    assert len(evaluation.sample.continuation) == 120
    assert evaluate.__wrapped__(LEVELS).sample == evaluation.sample


def test_evaluation_restores_the_mode_and_reports_progress():
    model, seen = make_model(LEVELS).train(), []
    windows = make_windows()
    evaluate_run(
        model,
        make_tokenizer(),
        np.arange(280),
        windows,
        batch_size=4,
        progress=lambda what, share: seen.append((what, share)),
    )
    assert model.training
    assert ("worth of each MLP", 1.0) in seen
    assert seen[-1] == ("collecting contexts", 1.0)


def test_a_vanilla_evaluation_has_no_features():
    evaluation = evaluate(None)
    assert evaluation.levels == evaluation.histograms == evaluation.features == []
    assert evaluation.scalars()["levels"] == []


@pytest.mark.parametrize("levels", [LEVELS, None])
def test_the_worth_of_every_mlp_is_in_the_figures(levels: str | None):
    evaluation, windows = evaluate(levels), make_windows()
    model = make_model(levels).eval()
    expected = mlp_worths(model, windows, window_losses(model, windows, 12), 12)
    rows = json.loads(json.dumps(evaluation.scalars()))["mlp_worth"]
    assert [row["layer"] for row in rows] == [0, 1]
    for row, worth in zip(rows, expected, strict=True):
        assert [row["nats"], row["standard_error"]] == pytest.approx([worth.mean, worth.standard_error], abs=1e-6)
        assert row["tokens"] == 12 * 16


@pytest.mark.parametrize("shape", [(0, 17), (2, 1), (2, 18)])
def test_bad_windows_are_refused(shape: tuple[int, int]):
    with pytest.raises(ValueError, match="expected val_windows of shape"):
        evaluate_run(
            make_model(None), make_tokenizer(), np.arange(9), torch.zeros(shape, dtype=torch.int64), batch_size=4
        )


def test_errors_name_what_disagrees():
    model, windows = make_model(None), make_windows()
    narrow = CayleyGPT(replace(model.config, d_vocab=200))
    broken, sparse = make_model(None), make_model(LEVELS)
    with torch.no_grad():
        broken.norm_f.weight.fill_(torch.nan)
        sparse.blocks()[1].norm2.weight.fill_(torch.nan)
    for given, tokens, ids, message in (
        (narrow, np.arange(9), windows % 200, "a tokenizer of 266 tokens for a model of d_vocab = 200"),
        (model, np.arange(999), windows, r"d_vocab - 1 = 279, got 0\.\.998"),
        (model, np.arange(9), windows + 300, r"d_vocab - 1 = 279, got \d+\.\.\d+"),
        (model, np.arange(0), windows, r"training tokens as one non-empty sequence, got shape \(0,\)"),
        (broken, np.arange(9), windows, "loss is not finite at 192 of 192 tokens"),
        (sparse, np.arange(9), windows, r"loss is not finite at \d+ of 192 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_run(given, make_tokenizer(), tokens, ids, batch_size=4)

"""The checkpoint at a given loss, the token tax, and what has no match."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from tokenizers import Tokenizer, models

from analysis.matched import (
    Validation,
    crossing,
    find_matched,
    load_checkpoint,
    match,
    token_tax,
    validations,
)
from cayley_interp import CayleyGPT, CayleyGPTConfig
from cayley_interp.pretrained import load_pretrained

MODEL = CayleyGPTConfig(n_layers=1, n_heads=2, d_model=16, n_ctx=8, d_vocab=32)
TOKENS_A_STEP = 2 * 3 * 8
TOKENIZER = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


def make_run(folder: Path, losses: dict[int, float | None], kept: tuple[int, ...] = ()) -> Path:
    """A run that logged these validation losses, with checkpoints whose weights are their step."""
    folder.mkdir()
    config = {"name": "vanilla", "model": asdict(MODEL), "data": {"data": "sotu"}, "batch_size": 2, "grad_accum": 3}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps({"step": step, "train_loss": 1.0, "tokens": 1}) for step in losses]
    lines += [json.dumps({"step": step, "val_loss": loss}) for step, loss in losses.items()]
    lines.append(json.dumps({"step": max(losses), "final": {"val_loss": 0.0}}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "data").mkdir()
    (folder / "data" / "tokenizer.json").write_text(TOKENIZER.to_str(pretty=True))
    for step in kept:
        checkpoint = folder / "checkpoints" / f"step-{step:07d}"
        checkpoint.mkdir(parents=True)
        model = CayleyGPT(MODEL)
        torch.nn.init.constant_(model.tok.weight, step)
        save_model(model, str(checkpoint / "model.safetensors"))
    return folder


LOSSES: dict[int, float | None] = {10: 5.0, 20: 4.5, 30: 4.21, 40: 4.19, 50: 4.0}


def test_the_nearest_kept_checkpoint_is_found(tmp_path: Path):
    run = make_run(tmp_path / "run", LOSSES, kept=(10, 20, 25, 30, 50))
    (run / "checkpoints" / ".tmp-step-0000040").mkdir()
    found = find_matched(run, 4.195)
    assert (found.step, found.val_loss, found.tokens) == (30, 4.21, 30 * TOKENS_A_STEP)  # 40 was nearer, and not kept
    assert found.folder == run / "checkpoints" / "step-0000030"
    assert find_matched(run, 4.015).step == 50  # below all, within the tolerance


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (3.9, "all above: the lowest is 4.0000. In the run to match, train longer"),
        (5.1, "all below: the highest is 5.0000"),
        (4.7, "on both sides, but none near: 4.5000 is nearest. In the run to match, validate more often"),
    ],
)
def test_a_loss_without_a_match_is_refused(tmp_path: Path, loss: float, message: str):
    run = make_run(tmp_path / "run", LOSSES, kept=(10, 20, 50))
    with pytest.raises(ValueError, match=message):
        find_matched(run, loss)
    assert find_matched(run, loss, tolerance=0.25)


def test_checkpoints_between_validations_are_no_match(tmp_path: Path):
    run = make_run(tmp_path / "run", LOSSES, kept=(15, 25))
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints .* --eval-every equal to --checkpoint-every"):
        find_matched(run, 4.2)


def test_a_checkpoint_becomes_a_model(tmp_path: Path):
    cayley = make_run(tmp_path / "cayley", {100: 4.19})
    vanilla = make_run(tmp_path / "vanilla", LOSSES, kept=(10, 20, 30, 40, 50))
    model = load_checkpoint(vanilla, find_matched(vanilla, 4.5))
    assert (model.head.weight == 20).all()
    assert not model.training
    match(cayley, vanilla, out=tmp_path / "model")
    saved = load_pretrained(tmp_path / "model", wrap=None)
    assert (saved.tok.weight == 40).all()
    assert saved.tokenizer.to_str() == TOKENIZER.to_str()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    run = make_run(tmp_path / "run", LOSSES, kept=(20,))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"d_model": 32}}))
    with pytest.raises(ValueError, match="does not fit"):
        load_checkpoint(run, find_matched(run, 4.5))


def test_the_token_tax_is_the_ratio_of_tokens_at_equal_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cayley = make_run(tmp_path / "cayley", {50: 5.0, 100: 4.195})
    vanilla = make_run(tmp_path / "vanilla", LOSSES)
    tax = token_tax(cayley, vanilla)
    assert (tax.run.step, tax.matched.step) == (100, 40)
    assert tax.ratio == 2.5
    assert tax.crossing_tokens == pytest.approx(37.5 * TOKENS_A_STEP)  # 4.195 is three quarters from 4.21 to 4.19
    assert tax.crossing_ratio == pytest.approx(100 / 37.5)
    assert token_tax(vanilla, vanilla).ratio == 1
    match(cayley, vanilla)
    out = capsys.readouterr().out
    assert "2.50x" in out
    assert "2.67x" in out


def test_runs_that_validated_on_different_tokens_are_refused(tmp_path: Path):
    runs = [make_run(tmp_path / name, {10: 4.0}) for name in "ab"]
    config = json.loads((runs[0] / "config.json").read_text())
    (runs[0] / "config.json").write_text(json.dumps(config | {"data": {"data": "sotu", "val_tokens": 512}}))
    with pytest.raises(ValueError, match="val_tokens 512"):
        token_tax(runs[0], runs[1])


def test_a_curve_crosses_where_it_first_falls_to_the_loss():
    curve = [Validation(i, 100 * i, loss) for i, loss in enumerate([5.0, 4.0, 4.5, 3.5])]
    assert crossing(curve, 4.25) == 75
    assert crossing(curve, 4.0) == 100
    assert crossing(curve, 3.0) is None
    assert crossing(curve, 6.0) is None


def test_losses_that_were_not_finite_are_left_out(tmp_path: Path):
    assert [v.step for v in validations(make_run(tmp_path / "run", {10: None, 20: 4.0}))] == [20]


def test_folders_that_are_no_runs_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        find_matched(tmp_path, 4.0)
    run = make_run(tmp_path / "run", {10: None})
    with pytest.raises(ValueError, match="no validation loss"):
        token_tax(run, run)
    (run / "metrics.jsonl").write_text('{"step": 1, "val')
    with pytest.raises(ValueError, match="is not the folder of a run"):
        validations(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        validations(run)

"""What an MLP is worth, against the same ablation by hand, and of MLPs whose worth is known."""

import pytest
import torch

from analysis import mlp_worth
from analysis.mlp_worth import mlp_worths, worth_nothing
from cayley_interp import CayleyGPT
from cayley_interp.losses import PairedDifference, window_losses
from tests.analysis.fabricated import make_model, make_windows

LEVELS = "4,2,0;7,4,8"


@pytest.fixture(params=[LEVELS, None], ids=["cayley", "vanilla"])
def model(request: pytest.FixtureRequest) -> CayleyGPT:
    """With MLPs that write enough to be noticed."""
    model = make_model(request.param)
    with torch.no_grad():
        for block in model.blocks():
            block.mlp.fc_out.weight.mul_(20)
    return model.eval()


def measured(model: CayleyGPT, windows: torch.Tensor, batch_size: int = 5) -> list[PairedDifference]:
    return mlp_worths(model, windows, window_losses(model, windows, batch_size), batch_size)


def test_it_is_the_loss_without_what_the_mlp_writes(model: CayleyGPT):
    windows = make_windows()
    found = measured(model, windows)
    for block, worth in zip(model.blocks(), found, strict=True):
        before = window_losses(model, windows, 12)
        kept = block.mlp.fc_out.weight.detach().clone()
        with torch.no_grad():
            block.mlp.fc_out.weight.zero_()
        by_sequence = (window_losses(model, windows, 12) - before).mean(1)
        with torch.no_grad():
            block.mlp.fc_out.weight.copy_(kept)
        assert worth.mean == pytest.approx(by_sequence.mean().item(), abs=1e-6)
        assert worth.standard_error == pytest.approx(by_sequence.std().item() / 12**0.5, abs=1e-6)
        assert worth.standard_error > 1e-3  # large enough for the equalities to say something
        assert (worth.n_sequences, worth.n_tokens) == (12, 12 * 16)


def test_an_mlp_that_writes_nothing_is_found_and_the_model_comes_back(model: CayleyGPT):
    windows = make_windows()
    with torch.no_grad():
        model.blocks()[1].mlp.fc_out.weight.zero_()
        logits = model(windows[:, :-1])
        found = measured(model.train(), windows)
        assert model.training
        assert torch.equal(model.eval()(windows[:, :-1]), logits)
    assert (found[1].mean, found[1].standard_error) == (0, 0)
    assert worth_nothing(found[1])


def test_an_mlp_that_lowers_the_loss_is_worth_something():
    """One that reads the last token and writes the right next one, since the same tokens always follow each other."""
    model = make_model(None)
    windows = torch.arange(17)[None] + torch.arange(12)[:, None]
    optim = torch.optim.AdamW([*model.blocks()[0].mlp.parameters(), *model.tok.parameters()], lr=0.02)
    for _ in range(40):
        optim.zero_grad()
        model.loss(windows).mean().backward()
        optim.step()
    first, second = measured(model, windows)
    assert first.mean > 0.5
    assert not worth_nothing(first)
    assert second.mean < first.mean / 10


def test_tokens_are_bounded_and_spread_over_all_windows(model: CayleyGPT, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mlp_worth, "WORTH_TOKENS", 4 * 16 + 15)
    windows = make_windows()
    some = windows[[0, 3, 6, 9]]
    for found, expected in zip(measured(model, windows), measured(model, some), strict=True):
        assert found.n_tokens == 4 * 16
        assert found.mean == pytest.approx(expected.mean, abs=1e-6)
    monkeypatch.setattr(mlp_worth, "WORTH_TOKENS", 3)
    assert measured(model, windows)[0].n_sequences == 1


def test_batches_do_not_matter(model: CayleyGPT):
    windows = make_windows()
    for a, b in zip(measured(model, windows, 1), measured(model, windows, 12), strict=True):
        assert (a.mean, a.standard_error) == pytest.approx((b.mean, b.standard_error), abs=1e-5)


def test_three_standard_errors_decide():
    assert worth_nothing(PairedDifference(0.029, 0.01, 10, 160))
    assert worth_nothing(PairedDifference(-0.2, 0.01, 10, 160))
    assert not worth_nothing(PairedDifference(0.031, 0.01, 10, 160))
    assert not worth_nothing(PairedDifference(0.0, float("nan"), 1, 16))


def test_losses_of_other_windows_are_refused(model: CayleyGPT):
    windows = make_windows()
    with pytest.raises(ValueError, match=r"windows of shape \(12, 17\) and losses of \(12, 9\)"):
        mlp_worths(model, windows, window_losses(model, windows[:, :10], 5), 5)
    with pytest.raises(ValueError, match=r"windows of shape \(0, 17\) and losses of \(0, 16\)"):
        mlp_worths(model, windows[:0], torch.zeros(0, 16, dtype=torch.float64), 5)

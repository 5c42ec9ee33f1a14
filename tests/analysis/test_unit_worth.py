"""What a transform is worth, against maps that are edited and measured."""

import copy

import pytest
import torch

from analysis.replacements import measure_fit
from analysis.unit_worth import transform_worth
from molt_lens import Molt, Replacement, Transcoder

D, LADDER = 12, ((6, 1), (3, 2), (1, 3))


@pytest.fixture(scope="module")
def case():
    """A MOLT with a skip, standardised, and a target that it misses by some."""
    torch.manual_seed(0)
    replacement = Replacement(Molt(D, D, gate="topk:2", ladder=LADDER, skip=True)).eval()
    with torch.no_grad():
        for tensor in replacement.map.parameters():
            tensor.copy_(torch.randn_like(tensor) / 3)
    replacement.input.set(torch.randn(D), torch.rand(D) + 0.5)
    replacement.output.set(torch.randn(D), torch.rand(D) + 0.5)
    x = torch.randn(600, D)
    with torch.no_grad():
        y = replacement(x) + 0.4 * torch.randn(600, D)
    return replacement, x, y


@torch.no_grad()
def error_of(replacement, x, y, acts) -> float:
    """NMSE by its definition, with edited acts."""
    y, recons = y.double(), replacement.decode(acts, x).double()
    return ((y - recons).square().mean(0) / y.var(0, correction=0)).mean().item()


def test_without_and_always_on_are_what_editing_the_gates_gives(case):
    replacement, x, y = case
    worth = transform_worth(replacement, x, y)
    assert worth.nmse == pytest.approx(measure_fit(replacement, x, y).nmse, rel=1e-6)
    assert worth.tokens == 600
    acts = replacement.encode(x).detach()
    assert worth.nmse_bare == pytest.approx(error_of(replacement, x, y, torch.zeros_like(acts)), rel=1e-5)
    for transform in worth.transforms:
        edited = acts.clone()
        edited[:, transform.unit] = 0
        assert transform.nmse_without == pytest.approx(error_of(replacement, x, y, edited), rel=1e-5)
        by_constant = []
        for constant in (-1.0, 0.0, 1.0):
            edited[:, transform.unit] = constant
            by_constant.append(error_of(replacement, x, y, edited))
        left, middle, right = by_constant  # a parabola, whose lowest point three of its points tell
        lowest = middle - (right - left) ** 2 / (8 * (left - 2 * middle + right))
        assert transform.nmse_always == pytest.approx(lowest, rel=1e-5)
        assert transform.rank == replacement.map.ranks[transform.unit]
        assert transform.frequency == pytest.approx((acts[:, transform.unit] != 0).float().mean().item())


def test_all_gates_constant_is_the_best_of_all_constants(case):
    replacement, x, y = case
    worth = transform_worth(replacement, x, y)
    constants = torch.full((replacement.map.n_units,), 0.1, requires_grad=True)  # at 0 decode gives no gradient
    optimiser = torch.optim.LBFGS([constants], max_iter=200, line_search_fn="strong_wolfe")
    var = y.var(0, correction=0)

    def step() -> torch.Tensor:
        optimiser.zero_grad()
        error = ((y - replacement.decode(constants.expand(len(x), -1), x)).square().mean(0) / var).mean()
        error.backward()
        return error

    optimiser.step(step)
    assert worth.nmse_constant == pytest.approx(step().item(), rel=1e-4)
    assert worth.nmse < worth.nmse_constant <= min(t.nmse_without for t in worth.transforms) + worth.nmse_bare


def test_a_skip_in_disguise_has_no_share_and_a_transform_of_two_signs_is_all_gate(case):
    replacement, x, _ = copy.deepcopy(case)
    with torch.no_grad():
        replacement.map.W_enc.zero_()
        replacement.map.b_enc.fill_(-1.0)
        replacement.map.b_enc[:2] = 1.0  # two transforms open at every token, at a constant gate
        worth = transform_worth(replacement, x, replacement(x) + 0.1 * torch.randn(600, D))
    assert worth.transforms[0].frequency == 1
    assert abs(worth.transforms[0].gate_share) < 0.01
    assert all(t.gate_share is None for t in worth.transforms[2:])
    acts = torch.zeros(600, replacement.map.n_units)
    acts[:, 0] = torch.tensor([1.0, -1.0]).repeat(300)
    y = replacement.decode(acts, x).detach()
    replacement.encode = lambda x: acts[: len(x)]
    signs = transform_worth(replacement, x, y).transforms[0]
    assert signs.gate_share > 0.95


def test_what_does_not_fit_is_refused(case):
    replacement, x, y = case
    with pytest.raises(ValueError, match="transforms are a MOLT's, and this is a transcoder"):
        transform_worth(Replacement(Transcoder(D, D, n_features=20, gate="topk:2")), x, y)
    with pytest.raises(ValueError, match=r"x \(600, 12\) and y \(600, 11\) do not fit"):
        transform_worth(replacement, x, y[:, 1:])
    with pytest.raises(ValueError, match="2 tokens or more"):
        transform_worth(replacement, x[:1], y[:1])
    with pytest.raises(ValueError, match="not finite"):
        transform_worth(replacement, x, y.clone().fill_(torch.nan))

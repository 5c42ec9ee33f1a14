"""Norms that a penalty has computed every few steps only: what it costs, its gradients, their mean; in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molt_lens import Molt, SparseMap, Transcoder
from molt_lens.penalties import Penalty, norms_at, penalty_of

EVERY = 3
PENALTIES = [Penalty("tanh", norms_every=EVERY), Penalty("l1", norms_every=EVERY)]


def a_map(kind: str) -> SparseMap:
    torch.manual_seed(0)
    if kind == "molt":
        return Molt(12, 10, gate="relu", ladder=((6, 1), (3, 2))).double()
    return Transcoder(12, 10, n_features=5, gate="relu").double()


def at_step(penalty: Penalty, made: SparseMap, step: int, held: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The penalty and its gradients; the same batch at every step."""
    x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pre = made.pre_acts(x)
    value = penalty_of(penalty, made, pre, made.gate(pre), norms_at(penalty, made, step, held))
    return value.detach(), gradients(value, made)


def exact(penalty: Penalty, made: SparseMap) -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pre = made.pre_acts(x)
    value = penalty_of(penalty, made, pre, made.gate(pre))
    return value.detach(), gradients(value, made)


def gradients(value: Tensor, made: SparseMap) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(made.parameters()), allow_unused=True, materialize_grads=True)
    return dict(zip(dict(made.named_parameters()), found, strict=True))


def no_norms(made: SparseMap) -> Tensor:
    return torch.zeros(made.n_units, dtype=torch.float64)


def written(made: SparseMap) -> set[str]:
    """Parameters that norms depend on; the penalty's other gradients go through the gates."""
    return {"U", "V"} if isinstance(made, Molt) else {"W_dec"}


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_at_every_step_are_the_maps_own_to_the_last_bit(penalty, dtype):
    made = a_map("molt").to(dtype)
    held = no_norms(made).to(dtype)
    norms = norms_at(replace(penalty, norms_every=1), made, 5, held)
    upstream = torch.randn(made.n_units, dtype=dtype)
    assert torch.equal(norms, made.norms())
    assert torch.equal(held, norms)
    for found, expected in zip(
        torch.autograd.grad(norms, [made.U, made.V], upstream),
        torch.autograd.grad(made.norms(), [made.U, made.V], upstream),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["molt", "transcoder"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.kind)
def test_the_mean_over_steps_is_the_exact_gradient(penalty, kind):
    made = a_map(kind)
    value, expected = exact(penalty, made)
    held = no_norms(made)
    steps = [at_step(penalty, made, step, held) for step in range(2 * EVERY)]
    for step, (found_value, found) in enumerate(steps):
        torch.testing.assert_close(found_value, value)
        for name, gradient in expected.items():
            share = (EVERY if step % EVERY == 0 else 0) if name in written(made) else 1
            torch.testing.assert_close(found[name], share * gradient, msg=f"{name} at step {step}")
    for name in (*written(made), "W_enc", "b_enc"):
        assert expected[name].count_nonzero() > 0
        torch.testing.assert_close(torch.stack([found[name] for _, found in steps]).mean(0), expected[name])


def test_held_norms_are_those_of_the_last_exact_step():
    made = a_map("molt")
    held = no_norms(made)
    first = norms_at(PENALTIES[0], made, 0, held).detach().clone()
    made.U.data *= 2
    for step in (1, 2):
        assert torch.equal(norms_at(PENALTIES[0], made, step, held), first)
    torch.testing.assert_close(norms_at(PENALTIES[0], made, 3, held), 2 * first)
    torch.testing.assert_close(held, 2 * first)


@pytest.mark.parametrize(
    ("penalty", "steps"),
    [
        (PENALTIES[0], [0, 3, 6]),
        (PENALTIES[1], [0, 3, 6]),
        (Penalty("tanh"), list(range(8))),
        (Penalty("none"), []),
        (Penalty("l0"), []),
    ],
    ids=lambda value: value.kind if isinstance(value, Penalty) else None,
)
def test_norms_are_computed_at_their_steps_only(penalty, steps, monkeypatch):
    made = a_map("molt")
    norms, computed = made.norms, []
    monkeypatch.setattr(made, "norms", lambda: computed.append(0) or norms())
    held, seen = no_norms(made), []
    pre = acts = torch.rand(4, made.n_units, dtype=torch.float64)
    for step in range(8):
        before = len(computed)
        given = norms_at(penalty, made, step, held)
        if penalty.kind != "l0":  # which is a JumpReLU's
            penalty_of(penalty, made, pre, acts, given)
        seen += [step] * (len(computed) - before)
    assert seen == steps

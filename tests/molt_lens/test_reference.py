"""Reference mode against the transcription: the start, loss and every gradient, and a curve of Adam, in float64."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from molt_lens import Molt, Replacement
from molt_lens.activations import ActivationStore
from molt_lens.crosslayer import molt_of_groups
from molt_lens.gates import ReferenceJumpReLUGate
from molt_lens.hosts import Site
from molt_lens.packing import pack_documents
from molt_lens.penalties import penalty_of, penalty_weight
from molt_lens.reference import REFERENCE_PENALTY, reference_molt, set_reference_statistics
from tests.molt_lens.crosslayer_transcription import Transcription, randomise
from tests.molt_lens.host_models import tiny_host, tiny_text
from training.molt_loop import MoltTrainer
from training.molt_recipes import MoltOptim, MoltRun

SIZES = [(16, [(8, 1), (4, 2), (2, 4)]), (13, [(7, 3), (5, 1), (1, 6)]), (5, [(5, 2)])]


def pair(d: int, groups: list[tuple[int, int]], trained: bool = True) -> tuple[Molt, Transcription]:
    """Our MOLT and theirs with the same weights."""
    theirs = Transcription(d, groups).double()
    if trained:
        randomise(theirs)
    gate = theirs.nonlinearity
    Us, Vs = [U.detach() for U in theirs.Us], [V.detach() for V in theirs.Vs]
    weights = theirs.e.weight.detach(), theirs.e.bias.detach(), gate.theta[0].detach(), gate.bandwidth
    ours = molt_of_groups(Us, Vs, *weights)
    ours.b_dec.requires_grad_(False)
    return ours, theirs


def our_loss(ours: Molt, z: Tensor, target: Tensor, step: int, steps: int) -> Tensor:
    """As a trainer computes it."""
    pre = ours.pre_acts(z)
    acts = ours.gate(pre)
    y = ours.decode_reachable(acts, z, ours.gate.reachable(pre, acts))
    penalty = penalty_of(REFERENCE_PENALTY, ours, pre, acts)
    return (y - target).square().mean() + penalty_weight(REFERENCE_PENALTY, step, steps) * penalty


def their_loss(theirs: Transcription, z: Tensor, target: Tensor, step: int, steps: int) -> Tensor:
    return theirs.loss(z, target, step=step, steps=steps, weight=REFERENCE_PENALTY.weight)


def in_our_layout(theirs: Transcription, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    n_groups = len(theirs.Us)
    return {
        "U": torch.cat([tensors[f"Us.{i}"].flatten(0, 1) for i in range(n_groups)]),
        "V": torch.cat([tensors[f"Vs.{i}"].mT.flatten(0, 1) for i in range(n_groups)]),
        "W_enc": tensors["e.weight"],
        "b_enc": tensors["e.bias"],
        "gate.threshold": tensors["nonlinearity.theta"][0],
    }


def gradients(loss: Tensor, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("way", ["active", "dense"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("d", "groups"), SIZES)
@pytest.mark.parametrize("batch", [1, 33])
def test_loss_and_every_gradient(d, groups, trained, batch, way, monkeypatch):
    monkeypatch.setattr("molt_lens.molt.DENSE_ABOVE", {"active": 1.0, "dense": -1.0}[way])
    ours, theirs = pair(d, groups, trained)
    z, target = torch.randn(2, batch, d, dtype=torch.float64)
    learned = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    fast, slow = our_loss(ours, z, target, 7, 10), their_loss(theirs, z, target, 7, 10)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    found = gradients(fast, learned)
    expected = in_our_layout(theirs, gradients(slow, dict(theirs.named_parameters())))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10, msg=name)


def test_all_of_the_surrogate_was_in_use():
    """The comparison above is worth what its batches reach: each branch of the gate."""
    ours, _ = pair(*SIZES[0])
    pre = ours.pre_acts(torch.randn(2, 33, 16, dtype=torch.float64)[0])
    threshold = ours.gate.threshold
    assert isinstance(threshold, Tensor)
    assert (threshold == 0).any()
    for case in (pre > threshold, (pre > 0) & (pre < threshold), (pre < 0) & (pre > threshold), pre < threshold - 0.5):
        assert case.any()
    assert (pre > threshold + 0.5).any()


def test_the_surrogate_at_its_edges():
    """By hand, at theta = 0.25 and a window of 1: (-0.25, 0.75]."""
    gate = ReferenceJumpReLUGate(1, threshold=0.25).double()
    pre = torch.tensor([[-0.25], [-0.2], [0.0], [0.25], [0.5], [0.75], [0.76]], dtype=torch.float64, requires_grad=True)
    expected_acts = [0, 0, 0, 0, 0.5, 0.75, 0.76]
    expected_to_pre = [0, 0, 1, 1, 1, 1, 1]
    expected_to_theta = [0, -0.25, -0.25, -0.25, -0.25, -0.25, 0]
    acts = gate(pre)
    assert acts.flatten().tolist() == expected_acts
    reachable = gate.reachable(pre, acts).flatten().tolist()
    for i in range(len(pre)):
        to_pre, to_theta = torch.autograd.grad(acts[i, 0], (pre, gate.threshold), retain_graph=True)
        assert to_pre[i].item() == expected_to_pre[i]
        assert to_theta.item() == expected_to_theta[i]
        assert reachable[i] == bool(expected_to_pre[i] or expected_to_theta[i])


@torch.no_grad()
def test_without_gradients_only_what_is_open_is_touched(monkeypatch):
    """Though nearly every unit has a gradient: poison in the weights of closed transforms does not reach the output."""
    monkeypatch.setattr("molt_lens.molt.DENSE_ABOVE", 1.0)
    ours, _ = pair(*SIZES[0])
    z = torch.randn(1, 16, dtype=torch.float64)
    closed, expected = ours.encode(z)[0] == 0, ours(z)
    assert closed.any()
    assert ours.gate.reachable(ours.pre_acts(z), ours.encode(z))[0, closed].any()
    ours.U[closed.repeat_interleave(torch.tensor(ours.ranks))] = torch.nan
    assert torch.equal(ours(z), expected)


def test_the_same_seed_starts_with_their_weights():
    ladder = ((6, 1), (3, 2), (2, 4))
    torch.manual_seed(3)
    ours = reference_molt(9, 9, n=2, ladder=ladder)
    torch.manual_seed(3)
    theirs = Transcription(9, [(6, 2), (3, 4), (2, 8)])
    expected = in_our_layout(theirs, dict(theirs.named_parameters()))
    learned = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert learned.keys() == expected.keys()
    for name, parameter in learned.items():
        assert torch.equal(parameter, expected[name]), name
    assert ours.b_dec.count_nonzero() == 0
    torch.testing.assert_close(ours.norms(), theirs.norms())


def test_the_size_of_the_reference_run():
    with torch.device("meta"):
        molt = reference_molt(768, 768, n=50)
    assert (molt.n_units, len(molt.U)) == (1550, 128_000)
    assert sum(p.numel() for p in molt.parameters() if p.requires_grad) == 197_801_500


def test_adam_draws_the_same_curve():
    torch.manual_seed(0)
    d, steps = 13, 30
    ours, theirs = pair(d, SIZES[1][1], trained=False)
    teacher = torch.randn(d, d, dtype=torch.float64) / d**0.5
    optimizers = [torch.optim.Adam(model.parameters(), lr=2e-4) for model in (ours, theirs)]
    curves = []
    for step in range(steps):
        z = torch.randn(40, d, dtype=torch.float64)
        target = (z @ teacher).relu()
        losses = our_loss(ours, z, target, step, steps), their_loss(theirs, z, target, step, steps)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curves.append([loss.item() for loss in losses])
    curve, expected = zip(*curves, strict=True)
    assert curve == pytest.approx(expected, rel=0, abs=1e-10)
    assert len(set(curve)) == steps
    for name, tensor in in_our_layout(theirs, dict(theirs.named_parameters())).items():
        torch.testing.assert_close(ours.get_parameter(name), tensor, rtol=0, atol=1e-9, msg=name)


def test_the_trainer_draws_the_same_curve(tmp_path):
    """From the seed on: start, statistics of the first batch, ramp of the penalty, Adam."""
    d, ladder, batch_size, steps = 32, ((6, 1), (3, 2)), 50, 20
    host = tiny_host("gpt2", d_model=d)
    optim = MoltOptim(lr=2e-4, betas=(0.9, 0.999), warmup=0.0, decay=0.0, clip=0.0)
    config = MoltRun(
        name="reference",
        gate="reference",
        penalty=REFERENCE_PENALTY,
        optim=optim,
        revive_after=0,
        tokens=steps * batch_size,
        batch_size=batch_size,
        log_every=1,
    )

    def store() -> ActivationStore:
        return ActivationStore(
            host,
            Site(1, "pre_norm_in", "mlp_out"),
            lambda: pack_documents([tiny_text(2000)], host, 64),
            tokens=config.tokens,
            batch_size=batch_size,
            seed=0,
            dtype=torch.float32,
        )

    torch.manual_seed(5)
    replacement = Replacement(reference_molt(d, d, n=2, ladder=ladder))
    set_reference_statistics(replacement, *next(iter(store())))
    records = []
    MoltTrainer(config, replacement, store(), tmp_path).run(records.append)

    torch.manual_seed(5)
    theirs = Transcription(d, [(6, 2), (3, 4)])
    optimizer = torch.optim.Adam(theirs.parameters(), lr=2e-4)
    curve, first = [], None
    for step, (x, y) in enumerate(store()):
        first = (x, y) if first is None else first
        z, target = ((batch - of.mean(0)) / of.std(0) for batch, of in zip((x, y), first, strict=True))
        loss = their_loss(theirs, z, target, step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert len(curve) == steps
    assert [record["loss"] for record in records] == pytest.approx(curve, rel=1e-5)


def test_the_statistics_of_the_first_batch():
    torch.manual_seed(0)
    x, y = 3 * torch.randn(50, 6) + 1, torch.randn(50, 4)
    x[:, 2] = 5.0
    replacement = Replacement(reference_molt(6, 4, n=1, ladder=((2, 1),)))
    set_reference_statistics(replacement, x, y)
    z = replacement.input(x)
    assert z[:, 2].tolist() == [0.0] * 50
    torch.testing.assert_close(z[:, 0].std(correction=1), torch.tensor(1.0))
    torch.testing.assert_close(replacement.output(y).std(0, correction=1), torch.ones(4))
    assert replacement.input.std[2].item() == pytest.approx(1e-8)

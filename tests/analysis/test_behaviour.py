"""What a splice does to a real, tiny host, against forward passes written out by hand."""

import pytest
import torch
from torch import Tensor

from analysis.behaviour import measure_behaviour
from molt_lens.hosts import Site
from molt_lens.packing import keep_mask, pack_documents
from molt_lens.replacement import true_mlp
from tests.molt_lens.host_models import tiny_host, tiny_text

SITE = Site(1, target="post_norm_out")


@pytest.fixture(scope="module")
def host():
    return tiny_host("gemma3")


@pytest.fixture(scope="module")
def sequences(host) -> Tensor:
    return torch.stack(list(pack_documents([tiny_text(300), tiny_text(200, seed=1)], host, 40)))


@pytest.fixture(scope="module")
def mean(host, sequences) -> Tensor:
    return host.capture(SITE, sequences)[1][keep_mask(host, sequences)].mean(0)


def half(host):
    mlp = true_mlp(host, SITE)
    return lambda x: 0.5 * mlp(x)


def test_the_true_mlp_changes_nothing(host, sequences, mean):
    b = measure_behaviour(host, {SITE: true_mlp(host, SITE)}, sequences, {SITE: mean})
    assert b.ce_spliced == b.ce_host
    assert (b.kl, b.top1) == (0.0, 1.0)
    assert (b.recovered_zero, b.recovered_mean) == (1.0, 1.0)
    assert b.tokens == int(keep_mask(host, sequences)[:, 1:].sum())


def test_zero_and_mean_recover_nothing_of_themselves(host, sequences, mean):
    nothing = measure_behaviour(host, {SITE: lambda x: 0 * x}, sequences, {SITE: mean})
    assert nothing.recovered_zero == pytest.approx(0)
    constant = measure_behaviour(host, {SITE: lambda x: mean.expand_as(x)}, sequences, {SITE: mean})
    assert constant.recovered_mean == pytest.approx(0)
    assert nothing.kl > 0
    assert nothing.ce_zero != nothing.ce_host


def test_against_a_hook_by_hand(host, sequences, mean):
    """Half the MLP's output at the tokens of the text, by a plain forward hook."""
    keep = keep_mask(host, sequences)
    module = host.modules(SITE).target_module
    own = host.logits(sequences).double().log_softmax(-1)
    handle = module.register_forward_hook(lambda m, a, y: torch.where(keep[..., None], 0.5 * y, y))  # noqa: ARG005
    other = host.logits(sequences).double().log_softmax(-1)
    handle.remove()
    predicted, targets = keep[:, 1:], sequences[:, 1:]
    losses = -other[:, :-1].gather(-1, targets[..., None])[..., 0][predicted]
    kl = (own.exp() * (own - other)).sum(-1)[:, :-1][predicted]
    b = measure_behaviour(host, {SITE: half(host)}, sequences, {SITE: mean})
    assert b.ce_spliced == pytest.approx(losses.mean().item(), rel=1e-6)
    assert b.kl == pytest.approx(kl.mean().item(), rel=1e-4)


def test_batches_do_not_matter(host, sequences, mean, monkeypatch):
    whole = measure_behaviour(host, {SITE: half(host)}, sequences, {SITE: mean})
    monkeypatch.setattr("analysis.splicing.LOGITS_AT_A_TIME", 1)
    shares: list[float] = []
    one_by_one = measure_behaviour(host, {SITE: half(host)}, sequences, {SITE: mean}, shares.append)
    for figure in ("ce_host", "ce_spliced", "ce_zero", "ce_mean", "kl", "top1"):
        assert getattr(one_by_one, figure) == pytest.approx(getattr(whole, figure), rel=1e-5)
    assert shares == [(i + 1) / len(sequences) for i in range(len(sequences))]


def test_bad_input(host, sequences, mean):
    with pytest.raises(ValueError, match=r"no mean is given for Site\(layer=1"):
        measure_behaviour(host, {SITE: half(host)}, sequences, {})
    with pytest.raises(ValueError, match=r"two tokens or more, got \(\d+, 1\)"):
        measure_behaviour(host, {SITE: half(host)}, sequences[:, :1], {SITE: mean})
    with pytest.raises(ValueError, match=r"Site\(layer=1.* gave shape .* 16\), and its target has .* 32\)"):
        measure_behaviour(host, {SITE: half(host)}, sequences, {SITE: mean[:16]})
    with pytest.raises(ValueError, match="with the replacement spliced in gives losses that are not finite"):
        measure_behaviour(host, {SITE: lambda x: x * torch.nan}, sequences, {SITE: mean})
    with pytest.raises(ValueError, match="the 2 sequences of 9 tokens have none to predict"):
        measure_behaviour(host, {SITE: half(host)}, torch.full((2, 9), host.bos_id), {SITE: mean})

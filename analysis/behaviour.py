"""What a host says with a replacement spliced in: loss, divergence from its own words, and how much of a layer is kept.

    behaviour = measure_behaviour(host, {site: replacement}, sequences, means={site: mean_target})

Special tokens keep the host's own output, since no map is trained on them, and are not predicted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from molt_lens.hosts import Host, Site
from molt_lens.packing import keep_mask
from molt_lens.replacement import spliced

LOGITS_AT_A_TIME = 2**27
"""Numbers in one batch of logits: half a gigabyte in float32."""


@dataclass(frozen=True)
class Behaviour:
    """Means over `tokens` predicted tokens; losses and divergence in nats."""

    tokens: int
    ce_host: float
    ce_spliced: float
    ce_zero: float
    """With the target set to 0."""
    ce_mean: float
    """With the target set to its mean."""
    kl: float
    """KL(host || spliced)."""
    top1: float
    """Share of tokens at which both have the same likeliest next token."""

    @property
    def recovered_zero(self) -> float:
        """Share of what setting the target to 0 costs that the replacement wins back."""
        return (self.ce_zero - self.ce_spliced) / (self.ce_zero - self.ce_host)

    @property
    def recovered_mean(self) -> float:
        """Share of what setting the target to its mean costs that the replacement wins back."""
        return (self.ce_mean - self.ce_spliced) / (self.ce_mean - self.ce_host)


def measure_behaviour(
    host: Host,
    replacements: Mapping[Site, Callable[[Tensor], Tensor]],
    sequences: Int64[Tensor, "sequence pos"],
    means: Mapping[Site, Float[Tensor, " d_out"]],
    progress: Callable[[float], None] = lambda _: None,
) -> Behaviour:
    """Forward passes of the host as it is, with the replacements, and with their targets at 0 and at `means`.

    Raises:
        ValueError: fewer than two tokens a sequence, or a mean missing for a site.
    """
    if sequences.ndim != 2 or sequences.shape[1] < 2:
        raise ValueError(f"expected sequences of two tokens or more, got {tuple(sequences.shape)}")
    if missing := [site for site in replacements if site not in means]:
        raise ValueError(f"no mean is given for {missing[0]}: what ablation sets its target to")
    zero = {site: _constant(torch.zeros_like(means[site])) for site in replacements}
    mean = {site: _constant(means[site]) for site in replacements}
    totals = torch.zeros(6, dtype=torch.float64)
    tokens = 0
    for ids in _batches(host, sequences):
        text = keep_mask(host, ids)
        predicted = text[:, 1:]
        own = _log_probs(host, ids, predicted)
        targets = ids[:, 1:][predicted].to(own.device)
        ablated = []
        for maps in (zero, mean):
            with spliced(host, maps, "replace", keep=~text):
                ablated.append(_loss(_log_probs(host, ids, predicted), targets))
        with spliced(host, replacements, "replace", keep=~text):
            other = _log_probs(host, ids, predicted)
        kl = (own.exp() * (own - other)).sum(-1).double().sum()
        agree = (own.argmax(-1) == other.argmax(-1)).double().sum()
        totals += torch.stack([_loss(own, targets), _loss(other, targets), *ablated, kl, agree]).cpu()
        tokens += int(predicted.sum())
        progress(len(ids) / len(sequences))
    ce_host, ce_spliced, ce_zero, ce_mean, kl, top1 = (totals / tokens).tolist()
    return Behaviour(tokens, ce_host, ce_spliced, ce_zero, ce_mean, kl, top1)


def _batches(host: Host, sequences: Tensor) -> Iterator[Tensor]:
    return iter(sequences.split(max(1, LOGITS_AT_A_TIME // (sequences.shape[1] * host.d_vocab))))


def _log_probs(host: Host, ids: Tensor, predicted: Tensor) -> Float[Tensor, "token d_vocab"]:
    return host.logits(ids)[:, :-1][predicted.to(host.device)].float().log_softmax(-1)


def _loss(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.gather(-1, targets[:, None]).double().sum()


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: value.to(x).expand(*x.shape[:-1], len(value))

"""What a host says with a replacement spliced in: loss, divergence from its own words, and how much of a layer is kept.

    behaviour = measure_behaviour(host, {site: replacement}, sequences, means={site: mean_target})

Special tokens keep the host's own output, since no map is trained on them, and are not predicted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from analysis.splicing import spliced_sums
from molt_lens.hosts import Host, Site


@dataclass(frozen=True)
class Behaviour:
    """Means over `tokens` predicted tokens; losses and divergence in nats."""

    tokens: int
    ce_host: float
    ce_spliced: float
    ce_zero: float
    """With the target set to 0."""
    ce_mean: float
    """With the target set to its mean; nan where no mean was given."""
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
    means: Mapping[Site, Float[Tensor, " d_out"]] | None,
    progress: Callable[[float], None] = lambda _: None,
) -> Behaviour:
    """Forward passes of the host as it is, with the replacements, and with their targets at 0 and at `means`.

    Args:
        means: None leaves the ablation to the mean out.
        progress: is told the share of the text that is done.

    Raises:
        ValueError: fewer than two tokens a sequence, a mean missing for a site, or losses that are not finite.
    """
    if missing := [site for site in replacements if means is not None and site not in means]:
        raise ValueError(f"no mean is given for {missing[0]}: what ablation sets its target to")
    maps = {"the replacement": replacements, "zero": dict.fromkeys(replacements, _constant(torch.zeros(host.d_model)))}
    if means is not None:
        maps["the mean"] = {site: _constant(means[site]) for site in replacements}
    own, zeroed, *averaged = spliced_sums(host, maps, sequences, progress).values()
    tokens = int(own.tokens.sum())
    ce_mean = averaged[0].ce if averaged else torch.tensor(torch.nan)
    sums = (own.ce_host, own.ce, zeroed.ce, ce_mean, own.kl, own.top1)
    return Behaviour(tokens, *(s.sum().item() / tokens for s in sums))


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: value.to(x).expand(*x.shape[:-1], len(value))

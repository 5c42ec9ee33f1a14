"""Several replacements spliced into one host, each alone, on the same text: sums over each sequence.

The host's own words are computed once for all of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from analysis.jackknife import sums_by_sequence
from molt_lens.hosts import Host, Site
from molt_lens.packing import keep_mask
from molt_lens.replacement import spliced

LOGITS_AT_A_TIME = 2**27
"""Numbers in one batch of logits: half a gigabyte in float32."""


@dataclass(frozen=True, eq=False)
class SplicedSums:
    """Sums over the predicted tokens of each sequence; losses and divergence in nats, float64.

    Attributes:
        tokens: predicted tokens.
        ce_host: loss of the host as it is.
        ce: loss with the replacement.
        kl: KL(host || spliced).
        top1: tokens at which both have the same likeliest next token.
    """

    tokens: Float[Tensor, " sequence"]
    ce_host: Float[Tensor, " sequence"]
    ce: Float[Tensor, " sequence"]
    kl: Float[Tensor, " sequence"]
    top1: Float[Tensor, " sequence"]


@torch.no_grad()
def spliced_sums(
    host: Host,
    replacements: Mapping[str, Mapping[Site, Callable[[Tensor], Tensor]]],
    sequences: Int64[Tensor, "sequence pos"],
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, SplicedSums]:
    """Forward passes of the host as it is, and with each of these; special tokens keep the host's own output.

    Args:
        replacements: by name, what is spliced in at once.
        progress: is told the share of the text that is done.

    Raises:
        ValueError: sequences of fewer than two tokens, none with a token to predict, or losses that are not finite.
    """
    if sequences.ndim != 2 or sequences.shape[1] < 2:
        raise ValueError(f"expected sequences of two tokens or more, got {tuple(sequences.shape)}")
    if not keep_mask(host, sequences)[:, 1:].any():
        raise ValueError(
            f"the {len(sequences)} sequences of {sequences.shape[1]} tokens have none to predict: all behind the first "
            f"are special tokens of {host.name}"
        )
    parts: dict[str, list[Tensor]] = {name: [] for name in replacements}
    done = 0
    for ids in _batches(host, sequences):
        text = keep_mask(host, ids)
        predicted = text[:, 1:]
        of, n = predicted.nonzero()[:, 0], len(ids)
        own = _log_probs(host, ids, predicted)
        targets = ids[:, 1:][predicted].to(own.device)[:, None]
        ones = torch.ones(len(of), dtype=torch.float64)
        p, likeliest = own.exp(), own.argmax(-1)
        shared = [sums_by_sequence(v, of, n) for v in (ones, -own.gather(-1, targets)[:, 0])]
        for name, maps in replacements.items():
            with spliced(host, maps, "replace", keep=~text):
                other = _log_probs(host, ids, predicted)
            figures = (
                -other.gather(-1, targets)[:, 0],
                (p * (own - other)).sum(-1),
                (likeliest == other.argmax(-1)).double(),
            )
            parts[name].append(torch.stack([*shared, *(sums_by_sequence(v, of, n) for v in figures)]))
        done += n
        progress(done / len(sequences))
    sums = {name: torch.cat(part, dim=1) for name, part in parts.items()}
    for name, values in sums.items():
        if not values.isfinite().all():
            raise ValueError(f"{host.name} with {name} spliced in gives losses that are not finite")
    return {name: SplicedSums(*values) for name, values in sums.items()}


def _batches(host: Host, sequences: Tensor) -> Iterator[Tensor]:
    return iter(sequences.split(max(1, LOGITS_AT_A_TIME // (sequences.shape[1] * host.d_vocab))))


def _log_probs(host: Host, ids: Tensor, predicted: Tensor) -> Float[Tensor, "token d_vocab"]:
    return host.logits(ids)[:, :-1][predicted.to(host.device)].float().log_softmax(-1)

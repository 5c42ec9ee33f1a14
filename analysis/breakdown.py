"""Where two models differ: their paired difference by position in the context, and by how common the next token is.

The bins partition the compared tokens, so their differences, weighted by their tokens, sum to the overall difference.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from cayley_interp.losses import PairedDifference

QUANTILES = 10


@dataclass(frozen=True)
class Bin:
    """One bin of the compared tokens: both models' losses on it and their difference, in nats per token."""

    label: str
    loss_a: float
    loss_b: float
    difference: PairedDifference


def by_position(a: Float64[Tensor, "n pos"], b: Float64[Tensor, "n pos"]) -> list[Bin]:
    """Positions 0, 1, 2-3, 4-7, ...: the prediction at position p is made from p + 1 tokens."""
    n, pos = a.shape
    bins = torch.frexp(torch.arange(pos, dtype=torch.float64)).exponent.long()
    starts = [0] + [1 << i for i in range(int(bins[-1]))]
    ends = [start - 1 for start in starts[1:]] + [pos - 1]
    labels = [str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]
    return _binned(a, b, bins.expand(n, pos), labels)


def by_frequency(
    a: Float64[Tensor, "n pos"],
    b: Float64[Tensor, "n pos"],
    targets: Int64[Tensor, "n pos"],
    counts: Int64[Tensor, " d_vocab"],
) -> list[Bin]:
    """Tenths of the text that `counts` counted, from the commonest tokens to the rarest.

    Equal shares of the text rather than of the vocabulary: half of a vocabulary is a few per cent of any text. Count
    the training text, so that "rare" is what the models seldom saw, not what the compared text happens to lack.

    Args:
        targets: The tokens whose losses `a` and `b` are.
        counts: Occurrences of every token id in a reference text; ids it lacks are among the rarest.

    Raises:
        ValueError: counts of nothing, or fewer of them than the ids in `targets`.
    """
    if not counts.sum() > 0:
        raise ValueError("the counts are all 0: expected occurrences of the token ids in the training text")
    if targets.max() >= len(counts):
        raise ValueError(f"token id {targets.max()} has no count: expected counts of at least {targets.max() + 1} ids")
    quantile = frequency_quantiles(counts)
    sizes = quantile[counts > 0].bincount(minlength=QUANTILES).tolist()
    labels = [f"{i + 1} ({size:,} tokens)" for i, size in enumerate(sizes)]
    return _binned(a, b, quantile[targets], labels)


def frequency_quantiles(counts: Int64[Tensor, " d_vocab"]) -> Int64[Tensor, " d_vocab"]:
    """Which tenth of the text each token id belongs to, 0 the commonest: where the middle of its occurrences falls."""
    order = counts.argsort(descending=True, stable=True)
    ranked = counts[order]
    # In whole numbers: a rounding would move a token that sits on an edge.
    twice_the_middle = 2 * ranked.cumsum(0) - ranked
    quantile = torch.empty_like(counts)
    quantile[order] = (QUANTILES * twice_the_middle // (2 * counts.sum())).clamp(max=QUANTILES - 1)
    return quantile


def _binned(
    a: Float64[Tensor, "n pos"], b: Float64[Tensor, "n pos"], bins: Int64[Tensor, "n pos"], labels: list[str]
) -> list[Bin]:
    """The bins that have tokens, in order; standard errors over sequences, which may differ in tokens of a bin."""
    found = []
    for k, label in enumerate(labels):
        mask = (bins == k).double()
        tokens = mask.sum(dim=1)
        total = tokens.sum().item()
        if not total:
            continue
        mean = ((a - b) * mask).sum().item() / total
        # The bin's mean is a ratio of two sums over sequences, hence its linearised (delta-method) standard error.
        # With equally many tokens in each sequence it is that of `paired_difference`.
        residuals = ((a - b) * mask).sum(dim=1) - mean * tokens
        n, within = len(tokens), int((tokens > 0).sum())
        error = (n / (n - 1) * residuals.square().sum()).sqrt().item() / total if within > 1 else float("nan")
        loss_a, loss_b = (a * mask).sum().item() / total, (b * mask).sum().item() / total
        found.append(Bin(label, loss_a, loss_b, PairedDifference(mean, error, within, int(total))))
    return found

"""What the counts of units say of sparsity: histogram of frequencies, active parameters, bits per token.

L0, active rank and frequencies are the counter's own (units.py).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.units import UnitCounter
from molt_lens import Molt, SparseMap

BINS_PER_DECADE = 4


@dataclass(frozen=True)
class FrequencyHistogram:
    """Units by log10 of their frequency; those that are dead are in no bin."""

    edges: list[float]
    counts: list[int]


def frequency_histogram(counter: UnitCounter) -> FrequencyHistogram:
    """Quarter-decade bins from below one opening in all tokens up to 1."""
    frequency = counter.frequency().numpy()
    lowest = min(int(np.floor(-np.log10(counter.tokens))), -1)
    edges = np.linspace(lowest, 0, -BINS_PER_DECADE * lowest + 1)
    counts, _ = np.histogram(np.log10(frequency[frequency > 0]), bins=edges)
    return FrequencyHistogram(edges.tolist(), counts.tolist())


def active_parameters(map: SparseMap, counter: UnitCounter) -> float:
    """Mean number of parameters that a token touches: all but those of closed units.

    Every detector, the gate's own parameters, b_dec, a skip connection and the hidden layer of a mixture of decoders
    are touched at every token. What an open unit adds is its own: rank * (d_in + d_out) of a transform, d_out of a
    transcoder's feature and of an expert's diagonal. The detectors of a transcoder are thus most of what it touches.

    Raises:
        ValueError: a counter of another number of units than the map's.
    """
    if len(counter.ranks) != map.n_units:
        raise ValueError(f"a counter of {len(counter.ranks)} units for a map of {map.n_units}: give it its own map's")
    each = counter.ranks * (map.d_in + map.d_out) if isinstance(map, Molt) else torch.full((map.n_units,), map.d_out)
    closed = (each * (1 - counter.frequency())).sum().item()
    return sum(parameter.numel() for parameter in map.parameters()) - closed


def bits_per_token(counter: UnitCounter, value_bits: int = 8) -> float:
    """Description length of a token's acts, in bits: which units are open, and `value_bits` for the act of each.

    Which are open costs sum_u H(p_u), H the entropy in bits of a yes or no and p_u the frequency of unit u: the code
    for independent units of these frequencies. Units that are never or always open cost nothing; of all frequencies
    with the same L0, equal ones cost most, n_units * H(L0 / n_units). The act of an open unit costs `value_bits`, sign
    included: 2^value_bits equally dear steps between the unit's extremes.

    It bounds from above what Ayonrinde, Pearce and Sharkey (2024, arXiv 2410.11179, MDL-SAE) minimise, the sum of the
    entropies of the quantised acts; the code book (the weights) and the error that is left are not in it. A transform
    of a MOLT reads x besides its act, so its bits say how the map is chosen, not what it would take to send y.

    Raises:
        ValueError: value_bits below 0.
    """
    if value_bits < 0:
        raise ValueError(f"value_bits = {value_bits}: expected 0 (which units are open, alone) or more")
    return _binary_entropy(counter.frequency()).sum().item() + value_bits * counter.l0()


def _binary_entropy(p: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """In bits; torch.special.entr has 0 at 0."""
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)

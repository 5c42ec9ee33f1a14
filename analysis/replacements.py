"""Everything measured on a trained replacement in one call: for the last line of metrics.jsonl and for its report."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from analysis.behaviour import Behaviour, measure_behaviour
from analysis.dead_features import dense, zombie
from analysis.reconstruction import ReconstructionMeter
from analysis.sparsity import active_parameters, bits_per_token
from analysis.units import UnitCounter
from molt_lens import Replacement
from molt_lens.hosts import Host, Site

TOKENS_AT_A_TIME = 2_048


@dataclass(frozen=True)
class Fit:
    """How well one map reconstructs, over the same held-out tokens as the others; definitions in reconstruction.py."""

    nmse: float
    fvu: float
    cosine: float


@dataclass(frozen=True)
class ReplacementEvaluation:
    """All on held-out tokens.

    L0, active rank, active parameters and bits are means over tokens; `alive`, the share of units that opened at least
    once; `zombie` and `dense`, numbers of units (dead_features.py); `by_rank`, units, L0, frequencies and share alive
    of each rank; `floors`, the mean predictor and the ridge map.
    """

    tokens: int
    fit: Fit
    l0: float
    active_rank: float
    active_parameters: float
    bits_per_token: float
    alive: float
    zombie: int
    dense: int
    max_frequency: float
    by_rank: dict[int, dict[str, int | float]]
    frequencies: list[float]
    floors: dict[str, Fit]
    behaviour: Behaviour

    def scalars(self) -> dict[str, Any]:
        """The figures, ready for JSON, without the frequency of every unit."""
        figures = asdict(self)
        del figures["frequencies"]
        figures["behaviour"] |= {
            "recovered_zero": self.behaviour.recovered_zero,
            "recovered_mean": self.behaviour.recovered_mean,
        }
        return figures


def evaluate_replacement(
    replacement: Replacement,
    host: Host,
    site: Site,
    x: Float[Tensor, "token d_in"],
    y: Float[Tensor, "token d_out"],
    sequences: Int64[Tensor, "sequence pos"],
    floors: dict[str, Replacement],
    progress: Callable[[str, float], None] = lambda *_: None,
) -> ReplacementEvaluation:
    """Reconstruction and gates on the pairs (x, y), behaviour on `sequences`; the replacement is in eval mode.

    Args:
        floors: other replacements by name, measured on the same pairs.
        progress: what is going on, and the share of it that is done.
    """
    replacement.eval()
    counter = UnitCounter(replacement.map.ranks, replacement.map.norms())
    progress("reconstruction", 0.0)
    fit = measure_fit(replacement, x, y, counter)
    other = {name: measure_fit(floor, x, y) for name, floor in floors.items()}
    mean = y.double().mean(0).float()
    behaviour = measure_behaviour(
        host, {site: replacement}, sequences, {site: mean}, lambda share: progress("spliced into the host", share)
    )
    return ReplacementEvaluation(
        tokens=len(x),
        fit=fit,
        l0=counter.l0(),
        active_rank=counter.active_rank(),
        active_parameters=active_parameters(replacement.map, counter),
        bits_per_token=bits_per_token(counter),
        alive=counter.alive(),
        zombie=int(zombie(counter).sum()),
        dense=int(dense(counter).sum()),
        max_frequency=counter.max_frequency(),
        by_rank=counter.by_rank(),
        frequencies=counter.frequency().tolist(),
        floors=other,
        behaviour=behaviour,
    )


@torch.no_grad()
def measure_fit(
    replacement: Replacement,
    x: Float[Tensor, "token d_in"],
    y: Float[Tensor, "token d_out"],
    counter: UnitCounter | None = None,
) -> Fit:
    """Reconstruction errors over all pairs; `counter` is told of the acts."""
    device = replacement.map.b_dec.device
    meter = ReconstructionMeter(replacement.d_out)
    for some_x, some_y in zip(x.split(TOKENS_AT_A_TIME), y.split(TOKENS_AT_A_TIME), strict=True):
        some_x = some_x.to(device).float()
        acts = replacement.encode(some_x)
        meter.add(some_y.float(), replacement.decode(acts, some_x))
        if counter is not None:
            counter.add(acts)
    return Fit(meter.nmse(), meter.fvu(), meter.cosine())

"""Where units open, streaming: the strongest events of every unit and a random sample of them, in bounded memory.

An event is a unit that is open at a token. Tokens are counted through the whole text, so that what is kept does not
depend on how it is batched.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

NOWHERE = -1
"""In place of a token where a unit has fewer events than are kept."""
# splitmix64's constants as signed integers, whose products wrap alike.
GOLDEN, MIX_1, MIX_2 = (
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class Events(NamedTuple):
    """Units that are open, in any order."""

    token: Int64[Tensor, " event"]
    unit: Int64[Tensor, " event"]
    act: Float32[Tensor, " event"]


def events_of(codes: Tensor | tuple[Tensor, Tensor], first_token: int) -> Events:
    """The events of a batch: of dense acts [..., unit], or of a sparse code's indices and values [..., k].

    Args:
        first_token: number of the batch's first token in the whole text.
    """
    if isinstance(codes, Tensor):
        acts = codes.detach().flatten(0, -2)
        token, unit = acts.nonzero(as_tuple=True)
        act = acts[token, unit]
    else:
        indices, values = (t.detach().flatten(0, -2) for t in codes)
        token, place = values.nonzero(as_tuple=True)
        unit, act = indices[token, place], values[token, place]
    return Events(token.cpu() + first_token, unit.cpu(), act.float().cpu())


class BestEvents:
    """The k events of each unit with the largest scores; of equal scores those of the earlier tokens.

    Attributes:
        score: [unit, k], largest first, -inf where there are fewer events.
        token: [unit, k], their tokens, NOWHERE where there are fewer.
        act: [unit, k], 0 where there are fewer.
    """

    def __init__(self, n_units: int, k: int):
        self.k = k
        self.score: Float64[Tensor, "unit k"] = torch.full((n_units, k), -torch.inf, dtype=torch.float64)
        self.token: Int64[Tensor, "unit k"] = torch.full((n_units, k), NOWHERE)
        self.act: Float32[Tensor, "unit k"] = torch.zeros(n_units, k)

    def add(self, events: Events, score: Float[Tensor, " event"]) -> None:
        """Each pair of unit and token at most once over all calls."""
        order = sorted_by(events.token, -score.double(), events.unit)
        token, unit, act = (t[order] for t in events)
        units, counts = unit.unique_consecutive(return_counts=True)
        row = torch.arange(len(units)).repeat_interleave(counts)
        place = torch.arange(len(unit)) - (counts.cumsum(0) - counts)[row]
        few = place < self.k
        kept = [self.score, self.token, self.act]
        both = []
        for old, new in zip(kept, (score.double()[order], token, act), strict=True):
            rows = torch.full_like(old[units], -torch.inf if old is self.score else NOWHERE if old is self.token else 0)
            rows[row[few], place[few]] = new[few]
            both.append(torch.cat([old[units], rows], dim=1))
        by_token = both[1].argsort(dim=1)
        order = by_token.gather(1, both[0].gather(1, by_token).argsort(dim=1, stable=True, descending=True))
        for old, new in zip(kept, both, strict=True):
            old[units] = new.gather(1, order)[:, : self.k]


def strongest_of_windows(events: Events, n_ctx: int) -> Events:
    """Of the events of a unit in one window of the text only that of the largest |act|, of equals the first."""
    token, unit, act = events
    order = sorted_by(token, -act.abs(), token // n_ctx, unit)
    window, unit_of = (token // n_ctx)[order], unit[order]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = (window[1:] != window[:-1]) | (unit_of[1:] != unit_of[:-1])
    kept = order[first]
    return Events(token[kept], unit[kept], act[kept])


def priorities(events: Events, seed: int = 0) -> Float64[Tensor, " event"]:
    """A number in [0, 1) for each event that depends on its unit, its token and the seed alone.

    The events of a unit with the k largest are a random sample of its events, drawn in one pass without knowing how
    many there will be, and the same however they are batched (splitmix64; Steele, Lea, Flood 2014).
    """
    z = events.token * MIX_1 + events.unit * GOLDEN + torch.tensor(seed) * MIX_2
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        z = (z ^ _shifted(z, shift)) * factor
    return (_shifted(z ^ _shifted(z, 31), 11)).double() / 2**53


def _shifted(z: Int64[Tensor, " event"], bits: int) -> Int64[Tensor, " event"]:
    """Right, as of an unsigned integer."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def sorted_by(*keys: Tensor) -> Int64[Tensor, " event"]:
    """The order by the last key, where that is equal by the one before it, and so on."""
    order = torch.arange(len(keys[0]))
    for key in keys:
        order = order[key[order].argsort(stable=True)]
    return order

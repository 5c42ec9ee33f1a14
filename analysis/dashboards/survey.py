"""The first pass over a text: every unit counted, its strongest events and a random sample of all kept.

Memory holds one batch of codes and so many events of every unit, however long the text.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log2

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.dashboards.events import NOWHERE, BestEvents, events_of, priorities, strongest_of_windows
from analysis.dashboards.sources import Codes, Group, Pass, Source, Text
from analysis.reconstruction import ReconstructionMeter
from analysis.units import UnitCounter

Progress = Callable[[str, float], None]

STRONGEST, SAMPLED = 12, 48
"""Events kept of every unit: its strongest, one a window, and a random sample."""


@dataclass(frozen=True, eq=False)
class Survey:
    """A group's units after the first pass.

    Attributes:
        nmse: of what they make of what they stand for; `affine_nmse` where their acts say that of it only.
    """

    counter: UnitCounter
    strongest: BestEvents
    sample: BestEvents
    nmse: float

    def entropies(self, text: Text) -> Float[Tensor, " unit"]:
        """Bits of the distribution of tokens at which each unit's sampled events are; nan for a dead unit.

        At most log2 of the sample's size; 0 for a unit of one token.
        """
        found = torch.full((len(self.sample.token),), torch.nan)
        alive = (self.counter.opened > 0).nonzero().flatten().tolist()
        found[alive] = torch.tensor(self.entropies_of(text, alive))
        return found

    def entropies_of(self, text: Text, units: Sequence[int]) -> list[float]:
        """Of some units that open."""
        tokens = text.windows.flatten()
        found = []
        for unit in units:
            own = self.sample.token[unit]
            counts = Counter(tokens[own[own != NOWHERE]].tolist())
            n = sum(counts.values())
            found.append(sum(c / n * log2(n / c) for c in counts.values()))
        return found


def survey(source: Source, text: Text, progress: Progress = lambda *_: None) -> list[Survey]:
    """The first pass: counts of every unit, its strongest events and a random sample of all; one for each group."""
    looks = [_Look(group) for group in source.groups]
    for rows, run in passes(source, text, "counting units", progress):
        for i, look in enumerate(looks):
            look.add(run, i, rows.start * text.n_ctx, text.counted[rows])
    return [look.survey() for look in looks]


class _Look:
    """One group while the text goes by."""

    def __init__(self, group: Group):
        self.counter = UnitCounter(group.ranks, group.norms)
        self.strongest, self.sample = BestEvents(group.n_units, STRONGEST), BestEvents(group.n_units, SAMPLED)
        self.affine = group.affine
        self.meter: ReconstructionMeter | None = None

    def add(self, run: Pass, group: int, first: int, counted: Bool[Tensor, "window pos"]) -> None:
        codes = run.codes[group]
        _count(self.counter, codes, counted)
        events = events_of(codes, first)
        strongest = strongest_of_windows(events, counted.shape[1])
        self.strongest.add(strongest, strongest.act.abs())
        self.sample.add(events, priorities(events))
        target, made = run.reconstruction(group)
        self.meter = self.meter or ReconstructionMeter(target.shape[-1])
        self.meter.add(*(t[counted.to(t.device)] for t in (target, made)))

    def survey(self) -> Survey:
        assert self.meter is not None
        nmse = self.meter.affine_nmse() if self.affine else self.meter.nmse()
        return Survey(self.counter, self.strongest, self.sample, nmse)


def _count(counter: UnitCounter, codes: Codes, counted: Tensor) -> None:
    if isinstance(codes, Tensor):
        counter.add(codes[counted.to(codes.device)])
    else:
        counter.add_codes(*(t[counted.to(t.device)] for t in codes))


def passes(source: Source, text: Text, what: str, progress: Progress) -> Iterator[tuple[slice, Pass]]:
    """Rows of each batch of windows, and the model run over them."""
    for start in range(0, len(text.windows), source.batch_size):
        rows = slice(start, min(start + source.batch_size, len(text.windows)))
        yield rows, source.run(text.windows[rows], text.counted[rows])
        progress(what, rows.stop / len(text.windows))

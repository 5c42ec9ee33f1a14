"""The second pass over a text: contexts, histogram, positions, documents, company and effect of the chosen units.

Memory holds one batch of codes, and of each chosen unit what its page shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from analysis.dashboards.events import NOWHERE, BestEvents, Events, events_of
from analysis.dashboards.sources import Codes, Pass, Source, Text
from analysis.dashboards.survey import Progress, Survey, passes

Which = Literal["strongest", "middle", "random", "closed"]

N_MIDDLE, N_RANDOM = 6, 6
"""Contexts of the sample: those nearest its median |act|, and the first drawn of the others."""
BEFORE, AFTER = 15, 8
"""Tokens shown about the one that a context is of."""
BINS = 50
"""Equal bins of a histogram of acts, from 0, or from minus the largest |act| where there are negative ones, to the
largest |act|."""
POSITION_BINS = 16
CO_FIRING = 12
"""Units shown that are open where a unit is."""
CLOSED_DRAWN = 32
"""Places drawn of each unit where contexts are asked for in which it is closed; those in which it opens are dropped."""
PENDING = 1 << 22
"""Pairs of units that are open together that are held before they are counted."""


@dataclass(frozen=True)
class Context:
    """Tokens about the one at `peak`, with the unit's act at each."""

    which: Which
    tokens: list[int]
    acts: list[float]
    peak: int
    window: int
    document: int


@dataclass(frozen=True, eq=False)
class Details:
    """A unit after the second pass."""

    unit: int
    contexts: list[Context]
    closed: list[Context]
    """All through which it is closed; none unless they are asked for."""
    histogram: list[int]
    has_negative: bool
    by_position: list[float]
    """Share of tokens at which it is open, in POSITION_BINS parts of a window."""
    documents: int
    """In which it opens at least once."""
    busiest: tuple[int, int]
    """The document with most of the tokens at which it is open, the first of several, and how many it has."""
    co_firing: list[tuple[int, float, float]]
    """Unit of its own group, share of this unit's sampled events at which that is open too, and this over its
    frequency."""
    written: Float[Tensor, " d_model"] | None
    """Mean over its strongest events of what it writes, as the unembedding sees it; None without a direct path."""


def look_at(
    source: Source,
    text: Text,
    surveys: Sequence[Survey],
    chosen: Sequence[Sequence[int]],
    progress: Progress = lambda *_: None,
    *,
    closed: bool = False,
) -> list[list[Details]]:
    """Details of the chosen units of each group, by number; a group of which none is chosen costs nothing.

    Args:
        closed: find contexts in which each is closed too.

    Raises:
        ValueError: a unit that has no events: there is nothing to look at.
    """
    looks = [
        _Look(text, own, torch.tensor(sorted(units), dtype=torch.int64), f"{group.name} of {source.name}", closed)
        if units
        else None
        for group, own, units in zip(source.groups, surveys, chosen, strict=True)
    ]
    for rows, run in passes(source, text, "looking at units", progress):
        for group, look in enumerate(looks):
            if look is not None:
                look.add(rows, run, group)
    return [[] if look is None else look.details() for look in looks]


class _Look:
    """The chosen units of one group while the text goes by; row i is of units[i]."""

    def __init__(self, text: Text, survey: Survey, units: Int64[Tensor, " chosen"], name: str, closed: bool):
        if (dead := units[survey.counter.opened[units] == 0]).numel():
            raise ValueError(f"unit {int(dead[0])} of {name} never opens on this text: choose others, or more tokens")
        self.text, self.survey, self.units = text, survey, units
        n, n_units = len(units), len(survey.counter.ranks)
        self.row = torch.full((n_units,), -1)
        self.row[units] = torch.arange(n)
        self.largest = survey.counter.max_act[units]
        self.bins = torch.zeros(n, 2, BINS, dtype=torch.int64)  # of negative and of positive acts
        self.by_position = torch.zeros(n, POSITION_BINS, dtype=torch.int64)
        self.last_document = torch.full((n,), -1)
        self.documents, self.in_last = (torch.zeros(n, dtype=torch.int64) for _ in range(2))
        self.busiest = torch.full((n,), -1)  # tokens and, lower ones larger, the document, in one number
        self.pairs: list[Tensor] = []
        self.together: tuple[Tensor, Tensor] = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        self.written: Tensor | None = None
        self.counted = text.counted.flatten().nonzero().flatten() if closed else None
        self.wanted, self.which = self._choose()
        self.acts = torch.zeros(len(self.wanted.token), BEFORE + 1 + AFTER)

    def _choose(self) -> tuple[Events, list[Which]]:
        """Events that have a context, and which it is; `unit` is the row."""
        found: list[tuple[int, int, float]] = []
        which: list[Which] = []
        for row, unit in enumerate(self.units.tolist()):
            for kind, events in self._choose_of(unit).items():
                for token, act in events:
                    found.append((token, row, act))
                    which.append(kind)
        tokens, rows, acts = zip(*found, strict=True) if found else ((), (), ())
        long = torch.int64
        return Events(torch.tensor(tokens, dtype=long), torch.tensor(rows, dtype=long), torch.tensor(acts)), which

    def _choose_of(self, unit: int) -> dict[Which, list[tuple[int, float]]]:
        """Token and act of each."""
        drawn = _known(self.survey.sample, unit)
        median = sorted(abs(act) for _, act in drawn)[len(drawn) // 2]
        near = sorted(range(len(drawn)), key=lambda i: abs(abs(drawn[i][1]) - median))[:N_MIDDLE]
        found: dict[Which, list[tuple[int, float]]] = {
            "strongest": _known(self.survey.strongest, unit),
            "middle": sorted((drawn[i] for i in near), key=lambda event: -abs(event[1])),
            "random": [drawn[i] for i in range(len(drawn)) if i not in near][:N_RANDOM],
        }
        if self.counted is not None:
            places = torch.randint(len(self.counted), (CLOSED_DRAWN,), generator=torch.Generator().manual_seed(unit))
            found["closed"] = [(token, 0.0) for token in self.counted[places].tolist()]
        return found

    def add(self, rows: slice, run: Pass, group: int) -> None:
        first, last = rows.start * self.text.n_ctx, rows.stop * self.text.n_ctx
        codes = run.codes[group]
        events = events_of(codes, first)
        own = self.row[events.unit] >= 0
        self._count(Events(events.token[own], self.row[events.unit[own]], events.act[own]))
        self._count_company(codes, events, first)
        here = ((self.wanted.token >= first) & (self.wanted.token < last)).nonzero().flatten()
        if not len(here):
            return
        token, row = self.wanted.token[here], self.wanted.unit[here]
        window, pos, unit = (token - first) // self.text.n_ctx, token % self.text.n_ctx, self.units[row]
        self.acts[here] = self._acts_about(codes, window, pos, unit)
        strongest = torch.tensor([self.which[i] == "strongest" for i in here.tolist()])
        if strongest.any():
            self._add_written(row[strongest], run.writes(group, window[strongest], pos[strongest], unit[strongest]))

    def _count(self, events: Events) -> None:
        """`unit` is the row."""
        row = events.unit
        bin = (events.act.abs() / self.largest[row] * BINS).long().clamp_max(BINS - 1)
        flat = (row * 2 + (events.act > 0).long()) * BINS + bin
        self.bins += torch.bincount(flat, minlength=self.bins.numel()).view(self.bins.shape)
        part = events.token % self.text.n_ctx * POSITION_BINS // self.text.n_ctx
        at = torch.bincount(row * POSITION_BINS + part, minlength=self.by_position.numel())
        self.by_position += at.view(self.by_position.shape)
        self._count_documents(row, self.text.documents.flatten()[events.token])

    def _count_documents(self, row: Tensor, document: Tensor) -> None:
        """Documents come one after the other: only the last of a row goes on into the next batch."""
        n_documents = int(self.text.documents.max()) + 1
        seen, tokens = (row * n_documents + document).unique(return_counts=True)
        row, document = seen // n_documents, seen % n_documents
        new = document > self.last_document[row]
        self.documents += torch.bincount(row[new], minlength=len(self.documents))
        tokens = tokens + self.in_last[row].masked_fill(new, 0)
        self.busiest.scatter_reduce_(0, row, tokens * n_documents + n_documents - 1 - document, "amax")
        self.last_document.scatter_reduce_(0, row, document, "amax")
        last = document == self.last_document[row]
        self.in_last[row[last]] = tokens[last]

    def _add_written(self, row: Tensor, written: Tensor | None) -> None:
        if written is None:
            return
        if self.written is None:
            self.written = torch.zeros(len(self.units), written.shape[1])
        self.written.index_add_(0, row, written.float().cpu())

    def _acts_about(self, codes: Codes, window: Tensor, pos: Tensor, unit: Tensor) -> Float[Tensor, "event place"]:
        """Acts of a unit at the tokens about one; 0 outside the window."""
        places = pos[:, None] + torch.arange(-BEFORE, AFTER + 1)
        inside = (places >= 0) & (places < self.text.n_ctx)
        places = places.clamp(0, self.text.n_ctx - 1)
        if isinstance(codes, Tensor):
            acts = codes.cpu()[window[:, None], places, unit[:, None]]
        else:
            indices, values = (t.cpu()[window[:, None], places] for t in codes)
            acts = torch.where(indices == unit[:, None, None], values, 0).sum(-1)
        return acts.float() * inside

    def _count_company(self, codes: Codes, events: Events, first: int) -> None:
        """Which units are open at the sampled events of each chosen one."""
        sample = self.survey.sample.token[self.units]
        row, place = ((sample >= first) & (sample < first + self._tokens_of(codes))).nonzero(as_tuple=True)
        order = events.token.argsort(stable=True)
        token, unit = events.token[order], events.unit[order]
        start = torch.searchsorted(token, sample[row, place])
        length = torch.searchsorted(token, sample[row, place], right=True) - start
        of = torch.arange(len(row)).repeat_interleave(length)
        offset = torch.arange(len(of)) - (length.cumsum(0) - length)[of]
        self.pairs.append(row[of] * len(self.row) + unit[start[of] + offset])
        if sum(map(len, self.pairs)) > PENDING:
            self._merge_pairs()

    def _tokens_of(self, codes: Codes) -> int:
        dense = codes if isinstance(codes, Tensor) else codes[0]
        return dense.shape[0] * dense.shape[1]

    def _merge_pairs(self) -> None:
        keys, counts = self.together
        new_keys, new_counts = torch.cat(self.pairs or [keys[:0]]).unique(return_counts=True)
        keys, inverse = torch.cat([keys, new_keys]).unique(return_inverse=True)
        counts = torch.zeros(len(keys), dtype=torch.int64).index_add_(0, inverse, torch.cat([counts, new_counts]))
        self.together, self.pairs = (keys, counts), []

    # ---- What has been seen ----

    def details(self) -> list[Details]:
        self._merge_pairs()
        counted = self.text.counted.sum(0)
        part = torch.arange(self.text.n_ctx) * POSITION_BINS // self.text.n_ctx
        per_part = torch.zeros(POSITION_BINS, dtype=torch.int64).index_add_(0, part, counted)
        shares = self.by_position / per_part.clamp_min(1)
        contexts = self._contexts()
        n_strongest = (self.survey.strongest.token[self.units] != NOWHERE).sum(1)
        n_documents = int(self.text.documents.max()) + 1
        written = None if self.written is None else self.written / n_strongest[:, None]
        return [
            Details(
                unit=unit,
                contexts=[c for c in contexts[row] if c.which != "closed"],
                closed=[c for c in contexts[row] if c.which == "closed" and not any(c.acts)],
                histogram=self._histogram(row),
                has_negative=bool(self.bins[row, 0].any()),
                by_position=shares[row].tolist(),
                documents=int(self.documents[row]),
                busiest=(n_documents - 1 - int(self.busiest[row]) % n_documents, int(self.busiest[row]) // n_documents),
                co_firing=self._co_firing(row),
                written=None if written is None else written[row],
            )
            for row, unit in enumerate(self.units.tolist())
        ]

    def _contexts(self) -> list[list[Context]]:
        found: list[list[Context]] = [[] for _ in self.units]
        windows, documents, n_ctx = self.text.windows, self.text.documents, self.text.n_ctx
        for i, (token, row) in enumerate(zip(self.wanted.token.tolist(), self.wanted.unit.tolist(), strict=True)):
            window, pos = divmod(token, n_ctx)
            start, stop = max(0, pos - BEFORE), min(n_ctx, pos + AFTER + 1)
            found[row].append(
                Context(
                    self.which[i],
                    windows[window, start:stop].tolist(),
                    self.acts[i, start - pos + BEFORE : stop - pos + BEFORE].tolist(),
                    pos - start,
                    window,
                    int(documents[window, pos]),
                )
            )
        return found

    def _histogram(self, row: int) -> list[int]:
        negative, positive = self.bins[row].tolist()
        if not any(negative):
            return positive
        both = negative[::-1] + positive
        return [both[i] + both[i + 1] for i in range(0, 2 * BINS, 2)]

    def _co_firing(self, row: int) -> list[tuple[int, float, float]]:
        keys, counts = self.together
        start, stop = (int(torch.searchsorted(keys, (row + i) * len(self.row))) for i in (0, 1))
        unit, count = keys[start:stop] % len(self.row), counts[start:stop]
        sampled = int((self.survey.sample.token[self.units[row]] != NOWHERE).sum())
        own = unit != self.units[row]
        unit, share = unit[own], count[own].double() / sampled
        lift = share / self.survey.counter.frequency()[unit]
        order = lift.log().mul(share).argsort(descending=True, stable=True)[:CO_FIRING]
        return list(zip(unit[order].tolist(), share[order].tolist(), lift[order].tolist(), strict=True))


def _known(events: BestEvents, unit: int) -> list[tuple[int, float]]:
    """Token and act of each."""
    known = events.token[unit] != NOWHERE
    return list(zip(events.token[unit][known].tolist(), events.act[unit][known].tolist(), strict=True))

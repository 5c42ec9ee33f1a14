"""What a unit's page and its line in the index say, as the site's data."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.dashboards.choice import flags_of
from analysis.dashboards.chunks import Strings, short, shortened
from analysis.dashboards.details import Context, Details
from analysis.dashboards.events import NOWHERE
from analysis.dashboards.opening import Opened
from analysis.dashboards.survey import Progress, Survey

UNITS_PER_CHUNK = 64
MOVED = 10
"""Logits shown that a unit raises, and as many that it lowers."""


def index_of(
    opened: Opened, survey: Survey, chosen: Sequence[int], labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """The columns of all units of a group.

    Args:
        chosen: units with a page, rising; 64 of them share a chunk.
        labels: of each unit, where they have been asked for.
    """
    counter = survey.counter
    page = [-1] * len(counter.ranks)
    for i, unit in enumerate(chosen):
        page[unit] = i // UNITS_PER_CHUNK
    return {
        "frequency": [short(f) for f in counter.frequency().tolist()],
        "max": [short(m) for m in counter.max_act.tolist()],
        "entropy": [short(e, 3) for e in survey.entropies(opened.text).tolist()],
        "flags": flags_of(survey),
        "page": page,
        "token": list(common_tokens(opened, survey)),
        **({} if labels is None else {"label": labels}),
    }


def common_tokens(opened: Opened, survey: Survey) -> Iterator[str]:
    """For each unit the string of the token at which most of its sampled events are; "" for a dead one."""
    tokens = opened.text.windows.flatten()
    for own in survey.sample.token:
        found = tokens[own[own != NOWHERE]].tolist()
        yield opened.strings[int(Counter(found).most_common(1)[0][0])] if found else ""


def chunk_of(
    opened: Opened, group: int, survey: Survey, details: Sequence[Details], progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """The pages of at most 64 units of a group."""
    strings = Strings(opened.strings)
    logits = logits_of(opened, details)
    entropies, flags = survey.entropies_of(opened.text, [d.unit for d in details]), flags_of(survey)
    extras = opened.extras(group, details, strings, progress)
    units = {}
    for own, entropy, moved, extra in zip(details, entropies, logits, extras, strict=True):
        counter, unit = survey.counter, own.unit
        largest = float(counter.max_act[unit])
        units[unit] = {
            "unit": unit,
            "frequency": short(int(counter.opened[unit]) / counter.tokens),
            "max": short(largest),
            "mean_act": short(float(counter.magnitude[unit]) / int(counter.opened[unit])),
            "entropy": short(entropy, 3),
            "flags": flags[unit],
            "documents": own.documents,
            "tokens_a_document": short(int(counter.opened[unit]) / own.documents, 3),
            "busiest_document": own.busiest[0],
            "busiest_tokens": own.busiest[1],
            "histogram": {"from": short(-largest if own.has_negative else 0.0), "to": short(largest)}
            | {"counts": own.histogram},
            "by_position": [short(share) for share in own.by_position],
            "contexts": [_context(context, strings) for context in own.contexts],
            "co_firing": [[other, short(share, 3), short(lift, 3)] for other, share, lift in own.co_firing],
            "promoted": [] if moved is None else _moved(moved, strings, largest_first=True),
            "suppressed": [] if moved is None else _moved(moved, strings, largest_first=False),
            "extra": shortened(extra),
        }
    return {"strings": strings.used(), "units": units}


def logits_of(opened: Opened, details: Sequence[Details]) -> Sequence[Tensor | None]:
    """Of each what it does to the logits; None of units that do not write to the residual stream."""
    written = [d.written for d in details if d.written is not None]
    if len(written) < len(details):
        return [None] * len(details)
    return list(opened.source.logits(torch.stack(written)).float().cpu())


def _context(context: Context, strings: Strings) -> dict[str, Any]:
    return vars(context) | {
        "tokens": [strings(token) for token in context.tokens],
        "acts": [short(round(act, 3)) for act in context.acts],
    }


def _moved(logits: Float[Tensor, " d_vocab"], strings: Strings, *, largest_first: bool) -> list[list[int | float]]:
    """Number of a string and how far its logit moves, largest move first."""
    values, tokens = logits.topk(min(MOVED, len(logits)), largest=largest_first)
    return [[strings(t), short(v, 3)] for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]

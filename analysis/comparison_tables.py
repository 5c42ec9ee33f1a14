"""A comparison as rows, points and tables: runs of one config that differ in their seed make one point."""

import json
import math
import statistics
from dataclasses import dataclass
from typing import Any, Literal

from analysis.comparison import Figures, Measured, Settings
from analysis.subjects import Subject
from analysis.tables import Sheet
from molt_lens.hosts import Site

By = Literal["config", "run"]

NOT_CONFIG = {
    *("name", "seed", "out", "device", "track", "activation_cache", "baseline"),
    *("log_every", "checkpoint_every", "keep_checkpoints", "val_tokens", "behaviour_tokens"),
}
"""Settings of a run that do not say what was trained."""


@dataclass(frozen=True)
class Comparison:
    """Every map of every site with its figures, and what they were measured on."""

    host: str
    host_fingerprint: str
    text: str
    """Whose held-out text."""
    text_digest: str
    settings: Settings
    command: str
    date: str
    measured: list[Measured]

    def sites(self) -> list[Site]:
        return sorted({m.subject.site for m in self.measured}, key=lambda s: (s.layer, s.input, s.target))


@dataclass(frozen=True)
class Point:
    """One config: a run, or all that differ from it in their seed alone."""

    label: str
    members: list[Measured]

    @property
    def subject(self) -> Subject:
        return self.members[0].subject

    def value(self, figure: str) -> int | float | None:
        """The mean over runs."""
        values = self._values(figure)
        return statistics.fmean(values) if values else None

    def error(self, figure: str) -> int | float | None:
        """The standard deviation over seeds; of a single run the standard error over sequences, where there is one."""
        if len(self.members) == 1:
            return self.members[0].figures.get(f"{figure}_se")
        values = self._values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, figure: str) -> list[int | float]:
        return [m.figures[figure] for m in self.members if m.figures.get(figure) is not None]


def points_of(comparison: Comparison, site: Site, by: By) -> list[Point]:
    """The points of a site, controls last."""
    groups: dict[str, list[Measured]] = {}
    for measured in comparison.measured:
        if measured.subject.site == site:
            groups.setdefault(_group(measured, by), []).append(measured)
    return sorted(
        (Point(label_of(members, by), members) for members in groups.values()), key=lambda p: p.subject.control
    )


def _group(measured: Measured, by: By) -> str:
    subject = measured.subject
    if by == "run" or subject.seed is None:
        return f"{subject.control} {subject.name}"
    config = {key: value for key, value in (subject.config or {}).items() if key not in NOT_CONFIG}
    return json.dumps([subject.kind, config], sort_keys=True)


def label_of(members: list[Measured], by: By) -> str:
    """Kind, gate and size of a run; of all else its name."""
    subject = members[0].subject
    if subject.seed is None:
        return subject.name
    kind, _, part = subject.kind.partition(", ")
    words = [kind, subject.gate or "", f"N={(subject.config or {}).get('n')}"]
    if by == "run":
        words.append(f"seed {subject.seed}")
    elif len(members) > 1:
        words.append(f"{len(members)} seeds")
    return ", ".join(filter(None, [" ".join(filter(None, words)), part]))


# ---- As text ----

COLUMNS: list[tuple[str, str, str]] = [
    ("L0", "l0", ".2f"),
    ("active rank", "active_rank", ",.0f"),
    ("NMSE", "nmse", ".4f"),
    ("CE above host", "ce_above_host", "+.4f"),
    ("Jacobian cosine", "jacobian_cosine", ".4f"),
    ("at tokens", "jacobian_tokens", ",.0f"),
    ("Jacobian error", "jacobian_relative_error", ".4f"),
    ("Jacobian norm ratio", "jacobian_norm_ratio", ".4f"),
    ("FVU", "fvu", ".4f"),
    ("cosine", "cosine", ".4f"),
    ("KL", "kl", ".4f"),
    ("recovered of mean", "recovered_mean", ".1%"),
    ("recovered of zero", "recovered_zero", ".1%"),
    ("active parameters", "active_parameters", ",.0f"),
    ("bits a token", "bits_per_token", ".1f"),
    ("alive", "alive", ".1%"),
    ("most frequent", "max_frequency", ".1%"),
]
"""Header, figure and format."""
SHORT = ("l0", "active_rank", "nmse", "ce_above_host", "jacobian_cosine")
"""What a terminal or a hover has room for."""


def cell(point: Point, figure: str, form: str) -> str:
    """`value ± error`; an em dash where there is nothing to say."""
    value, error = point.value(figure), point.error(figure)
    if value is None:
        return "—"
    if error is None or math.isnan(error) or error == 0:
        return format(value, form)
    return f"{value:{form}} ± {error:{form.lstrip('+')}}"


def sheet_of(points: list[Point], site: Site, figures: tuple[str, ...] | None = None) -> Sheet:
    """A table of a site; of these figures, or of all."""
    columns = [column for column in COLUMNS if figures is None or column[1] in figures]
    header = ["map"] + ([] if figures else ["parameters", "training tokens", "text"]) + [name for name, _, _ in columns]
    rows = []
    for point in points:
        subject = point.subject
        about = (
            [] if figures else [thousands(subject.parameters), thousands(subject.training_tokens), subject.text or "—"]
        )
        rows.append([point.label, *about, *(cell(point, figure, form) for _, figure, form in columns)])
    return Sheet(title_of(site), header, rows)


def title_of(site: Site) -> str:
    return f"Layer {site.layer}, {site.input} → {site.target}"


def thousands(number: int | None) -> str:
    return "—" if not number else f"{number:,}"


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """One for each run and control, complete."""
    rows = []
    for subject, figures in comparison.measured:
        about = {
            "name": subject.name,
            "kind": subject.kind,
            "control": subject.control,
            "layer": subject.site.layer,
            "input": subject.site.input,
            "target": subject.site.target,
            "gate": subject.gate,
            "n": (subject.config or {}).get("n"),
            "parameters": subject.parameters,
            "training_tokens": subject.training_tokens,
            "seed": subject.seed,
            "text": subject.text,
        }
        rows.append(about | {"figures": figures, "config": subject.config})
    return rows


def lines_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Records without what no cell holds: each figure beside the rest, but those by rank, and no config."""
    lines = []
    for record in records(comparison):
        figures: Figures = record.pop("figures")
        del record["config"]
        lines.append(record | {name: value for name, value in figures.items() if not isinstance(value, dict)})
    return lines

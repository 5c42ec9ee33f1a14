"""What a dashboard is built from, by name: a source, the text it is looked at on, and what its pages say besides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from analysis.dashboards.details import Details
from analysis.dashboards.sources import Source, Text
from analysis.dashboards.survey import Progress
from analysis.tables import Sheet
from cayley_interp.folder import is_model_folder
from cayley_interp.pretrained import bundled_models
from molt_lens.opening import bundled_replacements

SiteKind = Literal["cayley", "molt", "transcoder", "sae"]

StringIndex = Callable[[int], int]
"""Of a token id, the number under which a chunk keeps its string."""

Extras = Callable[[int, Sequence[Details], StringIndex, Progress], list[dict[str, Any]]]
"""Of units of one group, by its number in the source, what a page of their kind shows besides."""


@dataclass(frozen=True)
class Curve:
    """A line of a figure of the model page."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    title: str
    x: str
    y: str
    curves: list[Curve]


def points_of(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """A figure of a run's log against its steps, where it has both."""
    return [(float(r["step"]), float(r[key])) for r in records if key in r and "step" in r]


@dataclass(frozen=True, eq=False)
class Opened:
    """
    Attributes:
        strings: how each token id is shown, `analysis.tokens.token_strings`.
        fingerprint: digest of the weights that the pages depend on.
        text_of: a built-in prompt as a text of one window, as the model reads it.
        about: facts for the head of the model page, label and value.
        settings: of the run, name and value.
        sheets: tables of the model page, measured when they are asked for.
    """

    kind: SiteKind
    source: Source
    text: Text
    strings: Sequence[str]
    fingerprint: str
    extras: Extras
    text_of: Callable[[str], Text]
    about: list[tuple[str, str]]
    settings: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    sheets: Callable[[Progress], list[Sheet]] = lambda _: []


def open_named(
    name: str,
    *,
    layers: Sequence[int] | None,
    tokens: int,
    device: str,
    host: str | None = None,
    vanilla: str | None = None,
) -> Opened:
    """A Cayley-GPT by a bundled name, a run or a folder; a MOLT or transcoder by its run or folder; a SAELens SAE.

    Args:
        layers: whose units are looked at; by default all.
        tokens: most tokens of text.
        host: of a replacement, where it is not found by the name that it had when the replacement was made.
        vanilla: model that a Cayley-GPT is held against.

    Raises:
        FileNotFoundError: nothing of that name, or a file that it needs.
        ValueError: a model without units, layers that it does not have, fewer tokens than one window, a host of what
            is a host itself, or a vanilla model beside what is none.
        ImportError: a library that it needs is missing.
    """
    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: expected 1 or more")
    path = Path(name)
    if name in bundled_models() or is_model_folder(path) or is_model_folder(path / "model"):
        if host is not None:
            raise ValueError(f"--host {host}: {name} is a model itself; leave --host out")
        from analysis.dashboards.cayley_opening import open_cayley

        return open_cayley(name, layers=layers, tokens=tokens, device=device, vanilla=vanilla)
    if vanilla is not None:
        raise ValueError(f"--vanilla {vanilla}: {name} is no Cayley-GPT; leave --vanilla out")
    from analysis.dashboards.replacement_opening import open_source

    if not (path.exists() or name in bundled_replacements() or ":" in name or name.count("/") > 1):
        bundled = ", ".join([*bundled_models(), *bundled_replacements()])
        raise FileNotFoundError(
            f"there is no {name}: expected a bundled name ({bundled}), the folder of a run, a model, a replacement or "
            "a SAELens SAE, RELEASE:ID of one that SAELens loads, or OWNER/REPOSITORY/PATH of a Gemma Scope transcoder"
        )
    return open_source(name, layers=layers, tokens=tokens, device=device, host=host)

"""The site's files beside the pages of units: what the model page shows, and the program that shows all of it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.dashboards.choice import DEAD, DENSE, ZOMBIE, flags_of
from analysis.dashboards.chunks import short
from analysis.dashboards.opening import Opened
from analysis.dashboards.sources import Group
from analysis.dashboards.survey import Survey
from analysis.tables import Sheet
from cayley_interp.files import write_atomically

ASSETS = Path(__file__).parent / "assets"
PAGE = "index.html"


def copy_assets(out: Path) -> None:
    """OUT/index.html and OUT/assets."""
    (out / "assets").mkdir(parents=True, exist_ok=True)
    for file in ASSETS.iterdir():
        write_atomically(out / file.name if file.name == PAGE else out / "assets" / file.name, file.read_bytes())


def site_of(
    opened: Opened,
    surveys: Sequence[Survey],
    chosen: Sequence[Sequence[int]],
    prompts: Sequence[dict[str, Any]],
    settings: Sequence[tuple[str, str]],
    sheets: Sequence[Sheet],
) -> dict[str, Any]:
    """What every page needs, and the model page."""
    text, groups = opened.text, opened.source.groups
    rows = [_group(g, groups, own, len(units)) for g, own, units in zip(groups, surveys, chosen, strict=True)]
    return {
        "name": opened.source.name,
        "kind": opened.kind,
        "about": opened.about,
        "tokens": text.tokens,
        "documents": len(text.documents.unique()),
        "windows": len(text.windows),
        "n_ctx": text.n_ctx,
        "groups": rows,
        "sheets": [sheet._asdict() for sheet in sheets],
        "figures": [asdict(figure) for figure in opened.figures],
        "prompts": [{"title": p["title"], "n_tokens": len(p["tokens"])} for p in prompts],
        "settings": [*settings, *opened.settings],
    }


def _group(group: Group, groups: Sequence[Group], survey: Survey, n_pages: int) -> dict[str, Any]:
    flags = flags_of(survey)
    return {
        "name": group.name,
        "layer": group.layer,
        "level": group.level,
        "kind": group.kind,
        "n_units": group.n_units,
        "n_pages": n_pages,
        "l0": short(survey.counter.l0()),
        "nmse": short(survey.nmse),
        **{
            name: sum(f & bit > 0 for f in flags)
            for name, bit in (("dead", DEAD), ("zombie", ZOMBIE), ("dense", DENSE))
        },
        "title": f"layer {group.layer}" if group.level is None else f"layer {group.layer}, level {group.level}",
        "parent_group": _beside(group, groups, -1),
        "child_group": _beside(group, groups, 1),
    }


def _beside(group: Group, groups: Sequence[Group], step: int) -> str | None:
    """The group of the level above or below in the same layer."""
    if group.level is None:
        return None
    place = (group.layer, group.level + step)
    return next((other.name for other in groups if (other.layer, other.level) == place), None)

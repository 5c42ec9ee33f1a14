"""The page of a comparison: frontiers of error and Jacobian against L0, active rank and each other, and the table."""

import json
import textwrap
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.at_equal import sheet_at_equal
from analysis.comparison_tables import (
    COLUMNS,
    NOT_CONFIG,
    SHORT,
    By,
    Comparison,
    Point,
    cell,
    points_of,
    thousands,
    title_of,
)
from analysis.page import flatten, render
from analysis.pareto import pareto_front
from analysis.plots import ACCENT, GREY, blank, rgb, script_safe
from analysis.predictors import sheet_of_predictors
from cayley_interp.files import write_atomically

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = {
    "molt": ACCENT,
    "molt-skip": (196, 62, 130),
    "transcoder": (58, 136, 204),
    "skip-transcoder": (24, 156, 132),
    "mxd": (146, 104, 214),
    "linear": (150, 138, 60),
}
"""By what a kind ends with: Gemma Scope's transcoders have the colour of ours, and another symbol."""
SYMBOLS = dict(zip(COLOURS, ("circle", "square", "diamond", "triangle-up", "cross", "x"), strict=True))

PLOTS = {
    "l0-nmse": ("l0", "nmse", "L0, open units a token", "NMSE"),
    "rank-nmse": ("active_rank", "nmse", "sum of active ranks", "NMSE"),
    "l0-jacobian": ("l0", "jacobian_cosine", "L0, open units a token", "Jacobian cosine"),
    "nmse-jacobian": ("nmse", "jacobian_cosine", "NMSE", "Jacobian cosine"),
}
LOGARITHMIC = ("l0", "active_rank")
TICKS = [digit * 10**power for power in range(-2, 6) for digit in (1, 2, 5)]
HOVER_WIDTH = 48
"""Characters in a line of what a point shows: narrow enough for a phone."""
LEVELS = {"nmse": {"ridge": "dot"}, "jacobian_cosine": {"ridge": "dot", "mean-jacobian": "dash"}}
"""Controls that are levels where the axis counts units, since they have none; how their lines look."""


def write_comparison_page(comparison: Comparison, path: Path, by: By) -> None:
    """Write the page, one self-contained file; every string in it is escaped."""
    figures, sites = {}, []
    for i, site in enumerate(comparison.sites()):
        points = points_of(comparison, site, by)
        figures |= {f"{name}-{i}": script_safe(frontier(points, *axes)) for name, axes in PLOTS.items()}
        rows = [
            (point.subject.control, [point.label, thousands(point.subject.parameters), *numbers(point)])
            for point in points
        ]
        sites.append((i, title_of(site), rows, sheet_at_equal(points, site), sheet_of_predictors(points, site)))
    settings = {
        "host": comparison.host,
        "host_fingerprint": comparison.host_fingerprint,
        "text": comparison.text,
        "text_sha256": comparison.text_digest,
        **vars(comparison.settings),
        "date": comparison.date,
        "command": comparison.command,
    }
    mixtures = any(m.subject.kind == "mxd" for m in comparison.measured)
    page = render(
        "compare.html.j2",
        name=comparison.host,
        kind="comparison",
        sites=sites,
        header=["Map", "Parameters", *(name for name, _, _ in COLUMNS)],
        settings=comparison.settings,
        text=comparison.text,
        foreign=sorted({m.subject.name for m in comparison.measured if m.subject.text in ("other", "unknown")}),
        merged=any(len(p.members) > 1 for s in comparison.sites() for p in points_of(comparison, s, by)),
        mixtures=mixtures,
        config=flatten(settings),
        environment=[],
        figures=figures,
    )
    write_atomically(path, page)


def numbers(point: Point) -> list[str]:
    return [cell(point, figure, form) for _, figure, form in COLUMNS]


def frontier(points: list[Point], x: str, y: str, x_title: str, y_title: str) -> "Figure":
    """Points in the colour of their kind with their errors, a line along each kind's Pareto front, controls hollow."""
    figure = blank(x_title, y_title)
    figure.update_layout(hovermode="closest", height=380, hoverlabel={"align": "left", "font": {"size": 11}})
    logarithmic = x in LOGARITHMIC
    if logarithmic:
        figure.update_xaxes(type="log", tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS])
        for point in points:
            if point.subject.kind in LEVELS[y] and (level := point.value(y)) is not None:
                figure.add_hline(
                    y=level,
                    line={"color": rgb(GREY), "width": 1, "dash": LEVELS[y][point.subject.kind]},
                    annotation={"text": point.label, "font": {"size": 11, "color": rgb(GREY)}},
                )
    shown = [p for p in points if not logarithmic or (p.value(x) or 0) > 0]
    shown = [p for p in shown if p.subject.kind not in ("zero", "mean")]
    for kind in dict.fromkeys(p.subject.kind for p in shown):
        own = [p for p in shown if p.subject.kind == kind]
        _add_kind(figure, kind, own, x, y)
    return figure


def _add_kind(figure: "Figure", kind: str, points: list[Point], x: str, y: str) -> None:
    family = kind.split(",")[0].removeprefix("gemma-scope ")
    colour = rgb(COLOURS.get(family, GREY))
    at = [(float(p.value(x) or 0), float(p.value(y) or 0)) for p in points]
    if not points[0].subject.control:
        front = pareto_front(at, higher_y_is_better=y == "jacobian_cosine")
        figure.add_scatter(
            x=[at[i][0] for i in front],
            y=[at[i][1] for i in front],
            mode="lines",
            line={"color": colour, "width": 1.5},
            legendgroup=kind,
            showlegend=False,
            hoverinfo="skip",
        )
    symbol = SYMBOLS.get(family, "star")
    hollow = points[0].subject.control or kind.startswith("gemma-scope")
    figure.add_scatter(
        x=[a for a, _ in at],
        y=[b for _, b in at],
        error_x=_bars(points, x, colour),
        error_y=_bars(points, y, colour),
        name=kind,
        showlegend=not points[0].subject.control,
        mode="markers+text" if kind in LEVELS[y] else "markers",
        text=[f"{p.label}  " for p in points],
        textposition="middle left",
        cliponaxis=False,
        textfont={"size": 11, "color": colour},
        marker={"color": colour, "size": 9, "symbol": f"{symbol}-open" if hollow else symbol},
        legendgroup=kind,
        hovertext=[hover(p) for p in points],
        hoverinfo="text",
    )


def _bars(points: list[Point], figure: str, colour: str) -> dict:
    return {"array": [p.error(figure) or 0 for p in points], "color": colour, "thickness": 1, "width": 2}


def hover(point: Point) -> str:
    """What a point is and what it was trained with, in the little HTML that plotly has.

    Settings are wrapped, several a line: plotly leaves out a label that is taller than its plot.
    """
    lines = [f"<b>{plain(point.label)}</b>"]
    if len(point.members) == 1 and point.label != point.subject.name:
        lines.append(plain(point.subject.name))
    lines += [f"{name} {cell(point, figure, form)}" for name, figure, form in COLUMNS if figure in SHORT]
    trained = {key: value for key, value in (point.subject.config or {}).items() if key not in NOT_CONFIG}
    settings = flatten(json.loads(json.dumps(trained, default=str)))
    shown = ", ".join(f"{key} {value[:HOVER_WIDTH]}" for key, value in settings if value not in ("null", ""))
    lines += map(plain, textwrap.wrap(shown, HOVER_WIDTH, break_on_hyphens=False))
    return "<br>".join(lines)


def plain(text: str) -> str:
    """Text as plotly's labels show it: they know no entity for a quotation mark."""
    return escape(text, quote=False)

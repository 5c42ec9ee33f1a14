"""How plots look: plotly figures, transparent, in colours that read on light and on dark, with one accent."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ACCENT = (222, 107, 44)
GREY = (128, 138, 150)

Metrics = list[dict[str, Any]]
Points = list[tuple[int | float, int | float]]


def script_safe(figure: "Figure") -> str:
    """JSON without `<`, so that nothing in it can end the script element it stands in."""
    return json.dumps(json.loads(str(figure.to_json()))).replace("<", "\\u003c")


def series(metrics: Metrics, key: str) -> Points:
    """(step, value) of every record that has the key."""
    return [(record["step"], record[key]) for record in metrics if key in record]


def ramp(i: int, n: int) -> tuple[int, int, int]:
    """From grey for the first of n to the accent for the last."""
    share = i / max(n - 1, 1)
    mixed = [round(g + share * (a - g)) for g, a in zip(GREY, ACCENT, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def rgb(colour: tuple[int, int, int]) -> str:
    return f"rgb{colour}"


def blank(x: str, y: str, figure: "Figure | None" = None) -> "Figure":
    """An empty figure in the page's style; the page's script adds the text colour of the scheme in use."""
    import plotly.graph_objects as go

    figure = go.Figure() if figure is None else figure
    axis: dict[str, Any] = {
        "gridcolor": "rgba(128,138,150,0.18)",
        "zeroline": False,
        "automargin": True,
        "title_standoff": 10,
        "title_font": {"size": 13, "color": rgb(GREY)},
        "tickfont": {"size": 12},
    }
    figure.update_layout(
        template=None,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        height=340,
        margin={"l": 48, "r": 12, "t": 36, "b": 44},
        hovermode="x unified",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
    )
    figure.update_xaxes(title_text=x, showgrid=False, **axis)
    figure.update_yaxes(title_text=y, **axis)
    return figure


def line(
    figure: "Figure",
    points: Points,
    name: str,
    colour: tuple[int, int, int],
    width: int | float,
    *,
    markers: bool = False,
    dash: str = "solid",
    row: int | None = None,
    showlegend: bool = True,
) -> None:
    figure.add_scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        name=name,
        mode="lines+markers" if markers else "lines",
        line={"color": rgb(colour), "width": width, "dash": dash},
        showlegend=showlegend,
        row=row,
        col=None if row is None else 1,
    )

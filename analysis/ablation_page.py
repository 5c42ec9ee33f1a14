"""The page of an ablation: differences from the base as a forest plot, validation curves, units, probes."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.ablation_results import Difference, Results, Run
from analysis.ablation_tables import (
    accuracy_and_error,
    loss_sheet,
    probe_scores,
    probe_sheets,
    tax_sheet,
    unit_sheet,
)
from analysis.page import flatten, render
from analysis.plots import ACCENT, GREY, blank, line, rgb, script_safe
from analysis.probing import show_k
from analysis.speeches import LABELS, Label
from analysis.variants import Variant
from cayley_interp.files import write_atomically

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = (
    *(ACCENT, (58, 136, 204), (24, 156, 132), (196, 62, 130), (146, 104, 214), (150, 138, 60)),
    *(GREY, (92, 99, 110), (60, 170, 190), (200, 90, 80)),
)
SYMBOLS = ("circle-open", "diamond-open", "square-open", "triangle-up-open", "x-thin-open")
"""Of the seeds."""
FIRST_SHOWN = 0.2
"""Share of a run that its curve leaves out: the fall from an untrained model's loss would be all there is to see."""
DRAWN = (("codes", "solid"), ("random_codes", "dot"), ("mlp_in", "dash"))
"""Sources of probes that are drawn, pooled by their mean, and how: a base's all, of another variant the first that it
has. The tables have the rest."""


def write_ablation_page(results: Results, settings: dict[str, Any], missing: list[str], path: Path) -> None:
    """Write the page, one self-contained file; every string in it is escaped."""
    figures = {"forest": forest(results)}
    bases = [variant for variant in results.variants() if variant.base is None]
    figures |= {f"curves-{i}": curves(results, base) for i, base in enumerate(bases)}
    if any(run.probes for run in results.runs):
        figures["probe-scores"] = probe_figure(results)
    page = render(
        "ablation.html.j2",
        name="Cayley-GPT and its variants",
        kind="ablation",
        bases=list(enumerate(bases)),
        losses=loss_sheet(results),
        units=unit_sheet(results),
        taxes=tax_sheet(results),
        probes=[sheet for sheet in probe_sheets(results) if sheet.rows],
        n_seeds=len({run.place.seed for run in results.runs}),
        missing=missing,
        config=flatten(settings),
        environment=[],
        figures={name: script_safe(figure) for name, figure in figures.items() if figure is not None},
    )
    write_atomically(path, page)


def forest(results: Results) -> "Figure | None":
    """A row a variant: each seed's difference from the base, and their mean with its standard error.

    Runs that were stopped at the loss of their base have no row: their difference was made to be zero.
    """
    shown = [d for d in results.differences() if not d.variant.cold_stop][::-1]  # the first on top
    if not shown:
        return None
    figure = blank("nats per token above the base", "")
    names = [label_of(difference) for difference in shown]
    for i, seed in enumerate(sorted({seed for difference in shown for seed in difference.by_seed})):
        own = [(name, d.by_seed[seed]) for name, d in zip(names, shown, strict=True) if seed in d.by_seed]
        figure.add_scatter(
            x=[pair.mean for _, pair in own],
            y=[name for name, _ in own],
            mode="markers",
            name=f"seed {seed}",
            marker={"color": rgb(GREY), "size": 8, "symbol": SYMBOLS[i % len(SYMBOLS)]},
            hovertext=[f"seed {seed}: {p.mean:+.4f} ± {p.standard_error:.4f} over sequences" for _, p in own],
            hoverinfo="text",
        )
    over = [difference.over_seeds for difference in shown]
    figure.add_scatter(
        x=[o.mean for o in over],
        y=names,
        error_x={
            "array": [0 if len(o.values) < 2 else o.standard_error for o in over],
            "color": rgb(ACCENT),
            "thickness": 2,
            "width": 5,
        },
        mode="markers",
        name="mean ± standard error over seeds",
        marker={"color": rgb(ACCENT), "size": 10, "symbol": "line-ns-open", "line": {"width": 2}},
        hovertext=[f"{o.mean:+.4f} ± {o.standard_error:.4f} over {len(o.values)} seeds" for o in over],
        hoverinfo="text",
    )
    figure.add_vline(x=0, line={"color": rgb(GREY), "width": 1})
    figure.update_yaxes(categoryorder="array", categoryarray=names, showgrid=True)
    figure.update_xaxes(tickformat="+.2f")
    figure.update_layout(height=max(290, 110 + 40 * len(shown)), hovermode="closest")
    return figure


def label_of(difference: Difference) -> str:
    return escape(f"{difference.variant.name} − {difference.variant.base}")


def curves(results: Results, base: Variant) -> "Figure":
    """Validation loss by training tokens of a base and of what is held against it, a line a run."""
    figure = blank("training tokens", "validation loss, nats per token")
    group = [v for v in results.variants() if base.name in (v.name, v.base)]
    longest = max(run.tokens for variant in group for run in results.of(variant.name))
    for i, variant in enumerate(group):
        for j, run in enumerate(results.of(variant.name)):
            line(
                figure,
                [(v.tokens, v.val_loss) for v in run.curve if v.tokens > FIRST_SHOWN * longest],
                escape(variant.name),
                COLOURS[i % len(COLOURS)],
                2.5 if variant is base else 1.25,
                dash="dot" if variant.cold_stop else "solid",
                showlegend=j == 0,
            )
            figure.data[-1].update(legendgroup=variant.name, hovertemplate=hover_of(run))
    figure.update_layout(hovermode="closest", height=420)
    return figure


def hover_of(run: Run) -> str:
    return f"{escape(run.place.name)}: %{{y:.4f}} after %{{x:,}} tokens<extra></extra>"


def probe_figure(results: Results) -> "Figure":
    """Balanced accuracy by features that a probe may read, a panel a label, a line for each thing probed."""
    from plotly.subplots import make_subplots

    scores = probe_scores(results)
    labels: list[Label] = [label for label in LABELS if any(key[3] == label for key in scores)]
    ks = list(dict.fromkeys(k for *_, k in scores))
    titles = [label.capitalize() for label in labels]
    figure = make_subplots(rows=1, cols=len(labels), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    blank("", "", figure)
    variants = list(dict.fromkeys(key[0] for key in scores))
    bases = {variant.name for variant in results.variants() if variant.base is None}
    for column, label in enumerate(labels, start=1):
        for name in variants:
            had = [(source, dash) for source, dash in DRAWN if (name, source, "mean", label, ks[0]) in scores]
            for source, dash in had if name in bases else had[:1]:
                drawn = [accuracy_and_error(scores[(name, source, "mean", label, k)]) for k in ks]
                colour = rgb(COLOURS[variants.index(name) % len(COLOURS)])
                figure.add_scatter(
                    x=[show_k(k) for k in ks],
                    y=[accuracy for accuracy, _ in drawn],
                    error_y={"array": [error for _, error in drawn], "color": colour, "thickness": 1, "width": 2},
                    mode="lines+markers",
                    line={"color": colour, "dash": dash, "width": 2},
                    name=escape(f"{name}: {source}"),
                    legendgroup=f"{name} {source}",
                    showlegend=column == 1,
                    row=1,
                    col=column,
                )
    figure.update_yaxes(title_text="balanced accuracy", col=1)
    figure.update_layout(height=500, hovermode="closest", legend={"y": -0.15, "yanchor": "top"})
    return figure

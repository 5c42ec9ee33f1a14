"""The plots of a Cayley-GPT run's report."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from analysis.dead_features import DENSE_FREQUENCY
from analysis.evaluate import Evaluation
from analysis.mlp_worth import STANDARD_ERRORS, worth_nothing
from analysis.plots import ACCENT, GREY, Metrics, blank, line, ramp, rgb, script_safe, series

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DASHES = ["dot", "solid", "dash", "longdash"]


def figures(metrics: Metrics, evaluation: Evaluation) -> dict[str, str]:
    """Figures by name as JSON that is safe inside a script element; those without data are left out."""
    drawn = {
        "loss": loss_figure(metrics, evaluation),
        "rates": rates_figure(metrics),
        "silent": silent_figure(metrics),
        "worth": worth_figure(evaluation),
    }
    for level in range(len(evaluation.levels[0]) if evaluation.levels else 0):
        drawn[f"frequency-{level}"] = frequency_figure(evaluation, level)
    return {name: script_safe(figure) for name, figure in drawn.items() if figure is not None}


def loss_figure(metrics: Metrics, evaluation: Evaluation) -> "Figure | None":
    """Train and validation loss by step, with the count models as horizontal lines."""
    train, val = series(metrics, "train_loss"), series(metrics, "val_loss")
    if not train and not val:
        return None
    figure = blank("step", "nats per token")
    line(figure, train, "train", GREY, 1.5)
    line(figure, val, "validation", ACCENT, 2.5, markers=True)
    for name, loss in (("unigram", evaluation.unigram_loss), ("bigram", evaluation.bigram_loss)):
        figure.add_hline(
            y=loss,
            line={"color": rgb(GREY), "width": 1, "dash": "dot"},
            annotation={"text": f"{name} {loss:.2f}", "font": {"size": 12, "color": rgb(GREY)}},
        )
    drawn = [loss for _, loss in train + val if math.isfinite(loss)]
    low, high = min([*drawn, evaluation.bigram_loss]), max([*drawn, evaluation.unigram_loss])
    margin = 0.06 * (high - low)
    figure.update_yaxes(range=[low - margin, high + margin])
    return figure


def rates_figure(metrics: Metrics) -> "Figure | None":
    """Learning rates above, the gradient norm below, by step."""
    from plotly.subplots import make_subplots

    muon, adamw, norm = (series(metrics, key) for key in ("lr_muon", "lr_adamw", "grad_norm"))
    if not (muon or adamw or norm):
        return None
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12)
    blank("step", "learning rate", figure)
    line(figure, muon, "Muon", ACCENT, 2)
    line(figure, adamw, "AdamW", GREY, 2)
    line(figure, norm, "gradient norm", GREY, 1, row=2, showlegend=False)
    figure.update_xaxes(title_text="", row=1)
    figure.update_yaxes(rangemode="tozero", row=1)
    figure.update_yaxes(title_text="gradient norm", rangemode="tozero", row=2)
    figure.update_layout(height=460)
    return figure


def silent_figure(metrics: Metrics) -> "Figure | None":
    """Share of features silent during training, one line per layer and level."""
    names = {name for record in metrics for name in record.get("silent", {})}
    if not names:
        return None
    cells = sorted(tuple(int(part) for part in name.split(".")) for name in names)
    figure = blank("step", "share of features silent")
    for layer, level in cells:
        key = f"{layer}.{level}"
        points = [(record["step"], record["silent"][key]) for record in metrics if key in record.get("silent", {})]
        line(
            figure, points, f"layer {layer}, level {level}", ramp(layer, cells[-1][0] + 1), 1.5, dash=DASHES[level % 4]
        )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_layout(hovermode="closest", showlegend=False)
    return figure


def worth_figure(evaluation: Evaluation) -> "Figure":
    """Nats that each layer's MLP takes off the loss, grey where that is nothing; whiskers of three standard errors."""
    figure = blank("layer", "nats per token")
    worths = evaluation.mlp_worths
    figure.add_bar(
        x=[f"{layer}" for layer in range(len(worths))],
        y=[worth.mean for worth in worths],
        error_y={
            "array": [STANDARD_ERRORS * worth.standard_error for worth in worths],
            "color": rgb(GREY),
            "thickness": 1.5,
            "width": 4,
        },
        marker={
            "color": [rgb(GREY if worth_nothing(worth) else ACCENT) for worth in worths],
            "opacity": [0.5 if worth_nothing(worth) else 1 for worth in worths],
        },
        hovertext=[
            f"layer {layer}: {worth.mean:+.4f} ± {worth.standard_error:.4f} nats" for layer, worth in enumerate(worths)
        ],
        hoverinfo="text",
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero", zeroline=True, zerolinecolor=rgb(GREY), zerolinewidth=1)
    figure.update_layout(height=280, hovermode="closest", showlegend=False, bargap=0.4)
    return figure


def frequency_figure(evaluation: Evaluation, level: int) -> "Figure":
    """Features of one level by log10 frequency, one line per layer, early layers grey and late ones in the accent."""
    figure = blank("share of tokens at which a feature is active", "features")
    layers = len(evaluation.histograms)
    for layer, levels in enumerate(evaluation.histograms):
        edges, counts = levels[level].edges, levels[level].counts
        middles = [10 ** ((a + b) / 2) for a, b in pairwise(edges)]
        line(figure, list(zip(middles, counts, strict=True)), f"layer {layer}", ramp(layer, layers), 2)
    figure.update_traces(line_shape="hvh")
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.add_vline(x=DENSE_FREQUENCY, line={"color": rgb(GREY), "width": 1, "dash": "dot"})
    # On a log axis an annotation's x is a power of ten, a line's is not.
    figure.add_annotation(
        x=math.log10(DENSE_FREQUENCY), y=1, yref="paper", text="dense →", showarrow=False, xanchor="left", xshift=6
    )
    figure.update_layout(height=300)
    return figure

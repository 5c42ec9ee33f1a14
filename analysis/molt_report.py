"""The page of a replacement's run: how well it stands for its layer, through what, and what the host then says.

path = write_molt_report(run_dir, evaluation)
"""

from pathlib import Path
from typing import TYPE_CHECKING

from analysis.page import RunFiles, count, gigabytes, write_page
from analysis.plots import ACCENT, GREY, Metrics, blank, line, ramp, rgb, script_safe, series
from analysis.replacements import Fit, ReplacementEvaluation

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def write_molt_report(run_dir: Path, evaluation: ReplacementEvaluation) -> Path:
    """Write `run_dir/report.html` from the run's config.json, environment.json and metrics.jsonl; returns its path.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: one of the files is not the JSON it should be.
    """
    run = RunFiles(run_dir)
    drawn = {
        "mse": mse_figure(run.metrics, evaluation),
        "l0": l0_figure(run.metrics),
        "frequencies": frequency_figure(evaluation),
    }
    return write_page(
        run,
        "molt_report.html.j2",
        str(run.config.get("kind", "replacement")),
        evaluation=evaluation,
        headline=headline(run, evaluation),
        fits=fit_ladder(evaluation),
        figures={name: script_safe(figure) for name, figure in drawn.items() if figure is not None},
    )


def headline(run: RunFiles, evaluation: ReplacementEvaluation) -> list[tuple[str, str]]:
    """The facts of a run as (label, value); an em dash where a run has not recorded one."""
    final, config = run.final(), run.config
    return [
        ("Host", f"{config.get('host', '—')}, layer {config.get('layer', '—')}"),
        ("From, to", f"{config.get('input', '—')} → {config.get('target', '—')}"),
        ("Gate", str(config.get("gate", "—"))),
        ("Parameters", count(final.get("n_parameters"))),
        ("Training tokens", count(run.last("tokens"))),
        ("Held-out tokens", count(evaluation.tokens)),
        ("L0", f"{evaluation.l0:.2f}"),
        ("Active rank", f"{evaluation.active_rank:.0f}"),
        ("Active parameters", count(evaluation.active_parameters)),
        ("Bits per token", f"{evaluation.bits_per_token:.1f}"),
        ("Units alive", f"{evaluation.alive:.1%}"),
        ("Zombie units", count(evaluation.zombie)),
        ("Dense units", count(evaluation.dense)),
        ("Tokens per second", count(final.get("tokens_per_second"))),
        ("Peak memory", gigabytes(final.get("peak_memory_bytes"))),
        ("Seed", str(config.get("seed", "—"))),
        ("Device", str(run.environment.get("device", "—"))),
        ("Commit", str(run.environment.get("commit") or "—")[:12]),
    ]


def fit_ladder(evaluation: ReplacementEvaluation) -> list[tuple[str, Fit, float]]:
    """(who, its fit, width of the bar in per cent), this map last."""
    names = {"mean": "Mean of the target", "ridge": "Best linear map (ridge)"}
    rows = [(names.get(name, name), fit) for name, fit in evaluation.floors.items()]
    rows.append(("This map", evaluation.fit))
    longest = max(fit.nmse for _, fit in rows)
    return [(who, fit, 100 * fit.nmse / longest) for who, fit in rows]


def mse_figure(metrics: Metrics, evaluation: ReplacementEvaluation) -> "Figure | None":
    """Standardised error by step, with the held-out figure of the ridge map as a line."""
    points = series(metrics, "mse")
    if not points:
        return None
    figure = blank("step", "mean squared error, standardised")
    line(figure, points, "training", ACCENT, 2)
    if "ridge" in evaluation.floors:
        ridge = evaluation.floors["ridge"].nmse
        figure.add_hline(
            y=ridge,
            line={"color": rgb(GREY), "width": 1, "dash": "dot"},
            annotation={"text": f"ridge {ridge:.3f}", "font": {"size": 12, "color": rgb(GREY)}},
        )
    figure.update_yaxes(range=[0, 1.05])
    return figure


def l0_figure(metrics: Metrics) -> "Figure | None":
    """Open units a token by step: all, and by rank where ranks differ."""
    points = series(metrics, "l0")
    if not points:
        return None
    figure = blank("step", "open units a token")
    ranks = sorted({int(rank) for record in metrics for rank in record.get("l0_by_rank", {})}, reverse=True)
    for i, rank in enumerate(ranks):
        by_rank = [(r["step"], r["l0_by_rank"][str(rank)]) for r in metrics if "l0_by_rank" in r]
        line(figure, by_rank, f"rank {rank}", ramp(i, len(ranks)), 1.5, dash="dot")
    line(figure, points, "all", ACCENT, 2.5)
    figure.update_yaxes(rangemode="tozero")
    return figure


def frequency_figure(evaluation: ReplacementEvaluation) -> "Figure | None":
    """How often each unit is open, most frequent first, one colour a rank."""
    if not evaluation.frequencies:
        return None
    figure = blank("unit, most frequent first", "share of tokens at which it is open")
    start = 0
    for i, (rank, group) in enumerate(evaluation.by_rank.items()):
        # Units come rank after rank, so a rank's units are a stretch of the list.
        n = int(group["units"])
        values = sorted(evaluation.frequencies[start : start + n], reverse=True)
        x = list(range(start + 1, start + n + 1))
        figure.add_bar(x=x, y=values, name=f"rank {rank}", marker={"color": rgb(ramp(i, len(evaluation.by_rank)))})
        start += n
    figure.update_layout(bargap=0.15, hovermode="closest", showlegend=len(evaluation.by_rank) > 1)
    figure.update_xaxes(title_text="unit, by rank and then by frequency")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure

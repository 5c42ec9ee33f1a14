"""One self-contained HTML page per run: what was trained, how it went, what its features do. Opens without a network.

path = write_report(run_dir, evaluation)
"""

from pathlib import Path

from analysis.evaluate import Evaluation
from analysis.features import Context
from analysis.figures import figures
from analysis.mlp_worth import worth_nothing
from analysis.page import RunFiles, count, gigabytes, write_page


def write_report(run_dir: Path, evaluation: Evaluation) -> Path:
    """Write `run_dir/report.html` from the run's config.json, environment.json and metrics.jsonl; returns its path.

    Metrics that are not there, such as evaluations of a run stopped early, leave their place empty.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: one of the files is not the JSON it should be.
    """
    run, show = RunFiles(run_dir), evaluation.token_strings
    return write_page(
        run,
        "report.html.j2",
        "Cayley-GPT" if evaluation.levels else "Vanilla GPT",
        evaluation=evaluation,
        headline=headline(run, evaluation),
        losses=loss_ladder(evaluation),
        figures=figures(run.metrics, evaluation),
        worthless=[layer for layer, worth in enumerate(evaluation.mlp_worths) if worth_nothing(worth)],
        contexts=lambda context: _highlighted(context, show),
        sample_prompt=[show[i] for i in evaluation.sample.prompt],
        sample_continuation=[show[i] for i in evaluation.sample.continuation],
    )


def headline(run: RunFiles, evaluation: Evaluation) -> list[tuple[str, str]]:
    """The facts of a run as (label, value); an em dash where a run has not recorded one."""
    final = run.final()
    return [
        ("Recipe", str(run.config.get("name", "—"))),
        ("Levels", str(run.config.get("model", {}).get("levels") or "none (vanilla)")),
        ("Parameters", count(final.get("n_parameters"))),
        ("Steps", count(run.last("step"))),
        ("Training tokens", count(run.last("tokens"))),
        ("Validation tokens", count(evaluation.val_tokens)),
        ("Tokens per second", count(final.get("tokens_per_second"))),
        ("Model FLOPs utilisation", utilisation(final)),
        ("Peak memory", gigabytes(final.get("peak_memory_bytes"))),
        ("Seed", str(run.config.get("seed", "—"))),
        ("Device", str(run.environment.get("device", "—"))),
        ("Commit", str(run.environment.get("commit") or "—")[:12]),
        ("Started", str(run.environment.get("started", "—"))),
    ]


def utilisation(final: dict) -> str:
    """Share of the device's peak, and whether that peak is of its data sheet or was measured."""
    return "—" if final.get("mfu") is None else f"{final['mfu']:.1%} of the {final['peak_flops_source']} peak"


def loss_ladder(evaluation: Evaluation) -> list[tuple[str, float, float]]:
    """(who, nats per token, width of the bar in per cent), the model last."""
    rows = [
        ("Unigram counts", evaluation.unigram_loss),
        ("Bigram counts", evaluation.bigram_loss),
        ("This model", evaluation.val_loss),
    ]
    longest = max(loss for _, loss in rows)
    return [(who, loss, 100 * loss / longest) for who, loss in rows]


def _highlighted(context: Context, show: list[str]) -> list[list[tuple[str, float, float]]]:
    """(token, value, opacity from 0 to 1) of the tokens before the peak, and of those from the peak on."""
    largest = abs(context.values[context.peak])
    tokens = [
        (show[token], value, abs(value) / largest) for token, value in zip(context.tokens, context.values, strict=True)
    ]
    return [tokens[: context.peak], tokens[context.peak :]]

"""One self-contained HTML page per run: what was trained, how it went, what its features do. Opens without a network.

path = write_report(run_dir, evaluation)
"""

import json
from pathlib import Path
from typing import Any

from analysis.evaluate import Evaluation
from analysis.features import Context
from analysis.figures import figures
from cayley_interp.files import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_dir: Path, evaluation: Evaluation) -> Path:
    """Write `run_dir/report.html` from the run's config.json, environment.json and metrics.jsonl; returns its path.

    Metrics that are not there, such as evaluations of a run stopped early, leave their place empty.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: one of the files is not the JSON it should be.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    config = _read_json(run_dir / "config.json")
    environment = _read_json(run_dir / "environment.json") if (run_dir / "environment.json").exists() else {}
    metrics = read_metrics(run_dir / "metrics.jsonl")
    loader = jinja2.FileSystemLoader(TEMPLATES)
    jinja = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    show = evaluation.token_strings
    html = jinja.get_template("report.html.j2").render(
        name=str(config.get("name", run_dir.name)),
        evaluation=evaluation,
        is_vanilla=not evaluation.levels,
        headline=headline(config, environment, metrics, evaluation),
        losses=loss_ladder(evaluation),
        figures=figures(metrics, evaluation),
        contexts=lambda context: _highlighted(context, show),
        sample_prompt=[show[i] for i in evaluation.sample.prompt],
        sample_continuation=[show[i] for i in evaluation.sample.continuation],
        config=flatten(config),
        environment=flatten(environment),
        plotlyjs=get_plotlyjs(),
    )
    path = run_dir / "report.html"
    write_atomically(path, html.encode(errors="backslashreplace"))
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none where there is no file yet.

    Raises:
        ValueError: a line that is not a JSON object.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): delete the line, or rerun") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
        records.append(record)
    return records


def headline(
    config: dict[str, Any], environment: dict[str, Any], metrics: list[dict[str, Any]], evaluation: Evaluation
) -> list[tuple[str, str]]:
    """The facts of a run as (label, value); an em dash where a run has not recorded one."""
    final = {key: value for record in metrics for key, value in record.get("final", {}).items()}
    last: dict[str, Any] = {}
    for record in metrics:
        last.update({key: record[key] for key in ("step", "tokens") if key in record})
    return [
        ("Recipe", str(config.get("name", "—"))),
        ("Levels", str(config.get("model", {}).get("levels") or "none (vanilla)")),
        ("Parameters", _count(final.get("n_parameters"))),
        ("Steps", _count(last.get("step"))),
        ("Training tokens", _count(last.get("tokens"))),
        ("Validation tokens", _count(evaluation.val_tokens)),
        ("Tokens per second", _count(final.get("tokens_per_second"))),
        ("Peak memory", _gigabytes(final.get("peak_memory_bytes"))),
        ("Seed", str(config.get("seed", "—"))),
        ("Device", str(environment.get("device", "—"))),
        ("Commit", str(environment.get("commit") or "—")[:12]),
        ("Started", str(environment.get("started", "—"))),
    ]


def loss_ladder(evaluation: Evaluation) -> list[tuple[str, float, float]]:
    """(who, nats per token, width of the bar in per cent), the model last."""
    rows = [
        ("Unigram counts", evaluation.unigram_loss),
        ("Bigram counts", evaluation.bigram_loss),
        ("This model", evaluation.val_loss),
    ]
    longest = max(loss for _, loss in rows)
    return [(who, loss, 100 * loss / longest) for who, loss in rows]


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _highlighted(context: Context, show: list[str]) -> list[list[tuple[str, float, float]]]:
    """(token, value, opacity from 0 to 1) of the tokens before the peak, and of those from the peak on."""
    largest = abs(context.values[context.peak])
    tokens = [
        (show[token], value, abs(value) / largest) for token, value in zip(context.tokens, context.values, strict=True)
    ]
    return [tokens[: context.peak], tokens[context.peak :]]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} is not a run folder: it has no {path.name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _count(number: int | float | None) -> str:
    return "—" if number is None else f"{number:,.0f}"


def _gigabytes(size: int | float | None) -> str:
    return "—" if size is None else f"{size / 1e9:,.2f} GB"

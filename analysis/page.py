"""A run's page: one self-contained HTML file that opens without a network, from a template and the run's own files."""

import json
from pathlib import Path
from typing import Any

from cayley_interp.files import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


class RunFiles:
    """What a run has written: `config` and `environment` (empty if there is none), and the lines of metrics.jsonl.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: one of the files is not the JSON it should be.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.config = _read_json(run_dir / "config.json")
        environment = run_dir / "environment.json"
        self.environment = _read_json(environment) if environment.exists() else {}
        self.metrics = read_metrics(run_dir / "metrics.jsonl")

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.run_dir.name))

    def final(self) -> dict[str, Any]:
        """The figures of the last evaluation."""
        return {key: value for record in self.metrics for key, value in record.get("final", {}).items()}

    def last(self, key: str) -> Any:
        """The latest value of a key of the log, or None."""
        return next((record[key] for record in reversed(self.metrics) if key in record), None)


def write_page(run: RunFiles, template: str, kind: str, **content: Any) -> Path:
    """Render `RUN/report.html`; every string in `content` is escaped."""
    path = run.run_dir / "report.html"
    config, environment = flatten(run.config), flatten(run.environment)
    write_atomically(
        path, render(template, name=run.name, kind=kind, config=config, environment=environment, **content)
    )
    return path


def render(template: str, **content: Any) -> bytes:
    """A page from a template that extends base.html.j2; every string in `content` is escaped."""
    import jinja2
    from plotly.offline import get_plotlyjs

    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = jinja.get_template(template).render(plotlyjs=get_plotlyjs(), **content)
    return html.encode(errors="backslashreplace")


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


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} is not a run folder: it has no {path.name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def count(number: int | float | None) -> str:
    return "—" if number is None else f"{number:,.0f}"


def gigabytes(size: int | float | None) -> str:
    return "—" if size is None else f"{size / 1e9:,.2f} GB"

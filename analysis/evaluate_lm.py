"""A language model on tasks of the LM Evaluation Harness: HellaSwag, LAMBADA, perplexity and any other.

    python -m analysis.evaluate_lm cayley-tiny-2L-sotu --tasks lambada_openai,wikitext --out cayley.json
    python -m analysis.evaluate_lm gemma-3-270m --replacements runs/molt --tasks hellaswag --limit 1000 --out molt.json

Most tasks fetch their data from the Hugging Face Hub the first time, and find them in its cache after that.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from torch import Tensor

from analysis.command_line import run_command
from analysis.features import Progress as ReportProgress
from analysis.hosts import open_host, open_replacements
from analysis.progress import make_progress
from analysis.tables import Sheet, to_rich
from cayley_interp.files import write_atomically
from molt_lens.hosts import Host, Site

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def evaluate_lm(
    host: Host,
    tasks: list[str],
    replacements: Mapping[Site, Callable[[Tensor], Tensor]] | None = None,
    *,
    manager: "TaskManager",
    limit: int | None = None,
    max_length: int | None = None,
    progress: ReportProgress = lambda _what, _share: None,
) -> dict[str, Any]:
    """What lm-eval makes of a host's answers, and what they depend on; ready for JSON.

    Args:
        tasks: names of tasks, groups or tags that `manager` knows.
        limit: documents of each task, its first ones; by default all.
        max_length: see `HostLM`.

    Raises:
        ValueError: an unknown task, or what `HostLM` raises.
        FileNotFoundError: the data of a task could not be had.
    """
    from lm_eval.evaluator import simple_evaluate

    from analysis.lm_eval_adapter import HostLM

    lm = HostLM(host, replacements, max_length=max_length, progress=progress)
    loaded = [task for name in tasks for task in load_task(name, manager)]
    report: Any = simple_evaluate(lm, tasks=loaded, task_manager=manager, limit=limit, log_samples=False)
    return {
        "model": host.name,
        "fingerprint": host.fingerprint,
        "replaced_layers": sorted(site.layer for site in lm.replacements),
        "max_length": lm.max_length,
        "limit": limit,
        "lm_eval": version("lm_eval"),
        "results": report["results"],
        "n_samples": report["n-samples"],
        "n_shot": report["n-shot"],
        "versions": report["versions"],
    }


def load_task(name: str, manager: "TaskManager") -> list[Any]:
    """A task or group by its name, or the tasks of a tag, with their data.

    Raises:
        ValueError: no task has the name.
        FileNotFoundError: its data could not be had.
    """
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.task_index, n=4)
        raise ValueError(
            f"lm-eval {version('lm_eval')} knows no task {name!r}"
            + (f": did you mean {', '.join(near)}?" if near else ": give the folder of its YAML file, --include-path")
        )
    try:
        loaded: Any = manager.load([name])
    except Exception as error:  # of `datasets`, the Hub's client, its HTTP library, or the task's own code
        raise FileNotFoundError(
            f"the data of task {name!r} could not be had ({type(error).__name__}: {error}). Most come from the Hugging "
            "Face Hub: run this once where there is network and keep the cache (HF_HOME), or give tasks whose data are "
            "local files, --include-path FOLDER"
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def to_sheet(report: dict[str, Any]) -> Sheet:
    """One row for each metric of each task."""
    rows = []
    for task, figures in report["results"].items():
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            shown = f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, (int, float)) else "")
            n = report["n_samples"].get(task, {}).get("effective", "")
            rows.append([task, metric, f"{n}", shown])
    spliced = f", layers {report['replaced_layers']} replaced" if report["replaced_layers"] else ""
    return Sheet(report["model"] + spliced, ["task", "metric", "documents", "value ± standard error"], rows)


def main(
    model: tyro.conf.Positional[str],
    tasks: str = "hellaswag,lambada_openai,wikitext",
    out: Path | None = None,
    replacements: tuple[str, ...] = (),
    limit: int | None = None,
    max_length: int | None = None,
    include_path: Path | None = None,
    device: str = "cpu",
) -> None:
    """Evaluate a language model by lm-eval, as it is or with replacements of its MLPs spliced in.

    Args:
        model: A bundled model's name, a run or model folder, gemma-3-270m, or a host's folder or Hub id.
        tasks: Names of tasks, groups or tags, separated by commas.
        out: Write every figure to this JSON file.
        replacements: Folders of runs or replacements, or Gemma Scope ids, at most one a layer.
        limit: Documents of each task; by default all.
        max_length: Longest input in tokens, which perplexities depend on; by default n_ctx, at most 1024.
        include_path: Folder with YAML files of more tasks.
        device: Device to run the model on.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('this needs lm-eval: pip install "cayley-interp[eval]"') from error

    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} to: make it first")
    host = open_host(model, device)
    spliced = open_replacements(replacements, host)
    console = Console()
    with console.status("indexing the tasks of lm-eval"):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    with make_progress() as bar:
        task = bar.add_task("loading the tasks' data", total=1.0)
        report = evaluate_lm(
            host,
            [name.strip() for name in tasks.split(",") if name.strip()],
            spliced,
            manager=manager,
            limit=limit,
            max_length=max_length,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    console.print(to_rich(to_sheet(report)))
    if out is not None:
        write_atomically(out, json.dumps(report | {"replacements": list(replacements)}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main, "analysis.evaluate_lm")

"""What a run says about itself: `metrics.jsonl` always, and optionally an experiment tracker beside it.

    metrics = MetricsFile(run_dir / "metrics.jsonl")
    metrics.append({"step": 10, "train_loss": 5.2})
    tracker = start_tracker("trackio", run_dir, "tiny", asdict(config))
    tracker.log({"train_loss": 5.2}, step=10)

metrics.jsonl is the truth: after a resume it holds each step once, while a tracker keeps what it was sent before.
One process writes, the main one.
"""

import json
import math
import os
import re
import statistics
import uuid
from pathlib import Path
from typing import Any, Literal

from cayley_interp.files import write_atomically

PROJECT = "cayley-interp"


class MetricsFile:
    """JSON lines, each with its `step`. NaN and infinities become null, so that every JSON reader can read them."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one line. It is in the file as soon as this returns, and all of it or nothing.

        Raises:
            ValueError: a record without an integer `step`.
            OSError: the disk is full; the file is as it was.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a record of {self.path.name} needs an integer `step`, got {record}")
        line = (json.dumps(_json_safe(record), allow_nan=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise OSError(f"{self.path}: no room for another line, the disk is full")
        finally:
            os.close(descriptor)

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step, the final evaluation (a resumed run makes it again), and a torn line.

        Raises:
            ValueError: a whole line that is no record.
        """
        if not self.path.exists():
            return
        lines = self.path.read_bytes().split(b"\n")[:-1]  # after the last newline: nothing, or a torn line
        kept = [
            line + b"\n"
            for i, line in enumerate(lines, start=1)
            if self._step_of(line, i) <= step and "final" not in json.loads(line)
        ]
        write_atomically(self.path, b"".join(kept))

    def median(self, key: str) -> float | None:
        """Median of a top-level number over all lines that have it; None if none has."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        values = [record[key] for line in lines if (record := json.loads(line)).get(key) is not None]
        return statistics.median(values) if values else None

    def _step_of(self, line: bytes, number: int) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {number} is not a record with a step: remove that line, then resume again"
            ) from error


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tracker:
    """No tracker; the others are made by `start_tracker`."""

    def log(self, record: dict[str, Any], step: int) -> None:
        """Send one record; nested names are joined by "/"."""

    def finish(self) -> None:
        """Wait until everything is written."""


def start_tracker(
    kind: Literal["none", "wandb", "trackio"], run_dir: Path, name: str, config: dict[str, Any]
) -> Tracker:
    """Start a run in a tracker, or go on with the one that `run_dir` began.

    Neither needs an account or a network: Weights & Biases writes to `run_dir/wandb` (later `wandb sync`) unless
    WANDB_MODE says otherwise or an account is configured; trackio to `run_dir/trackio` unless TRACKIO_DIR is set.

    Raises:
        ImportError: the tracker is not installed.
    """
    if kind == "none":
        return Tracker()
    try:
        start = {"wandb": _WandbTracker, "trackio": _TrackioTracker}[kind]
        return start(run_dir, name, flatten(config))
    except ModuleNotFoundError as error:
        if error.name != kind:
            raise
        raise ImportError(
            f"--track {kind} needs a package that is not installed: pip install 'cayley-interp[tracking]', "
            "or use --track none"
        ) from error


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"silent": {"0": 0.1}} -> {"silent/0": 0.1}"""
    flat = {}
    for key, value in record.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class _WandbTracker(Tracker):
    def __init__(self, run_dir: Path, name: str, config: dict[str, Any]):
        import wandb

        # Without credentials wandb.init asks for an account, and a job nobody watches would wait for ever.
        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=_run_id(run_dir),
            resume="allow",
            dir=run_dir,
            mode="offline" if offline else None,
            config=config,
        )

    def log(self, record: dict[str, Any], step: int) -> None:
        self.run.log(flatten(record), step=step)

    def finish(self) -> None:
        self.run.finish()


class _TrackioTracker(Tracker):
    def __init__(self, run_dir: Path, name: str, config: dict[str, Any]):
        # trackio reads TRACKIO_DIR once, when it is imported.
        os.environ.setdefault("TRACKIO_DIR", str(run_dir.absolute() / "trackio"))
        import trackio

        # Runs are told apart by name, and a folder that is shared by all runs holds many of the same recipe.
        self.run = trackio.init(
            project=PROJECT, name=_run_id(run_dir), group=name, config=config, resume="allow", embed=False
        )

    def log(self, record: dict[str, Any], step: int) -> None:
        self.run.log(flatten(record), step=step)

    def finish(self) -> None:
        self.run.finish()


def _run_id(run_dir: Path) -> str:
    """The tracker's id of this run, drawn once: the folder may be moved, and others may have its name."""
    path = run_dir / "tracker_id"
    if not path.exists():
        stem = re.sub(r"[^A-Za-z0-9_.-]", "-", run_dir.absolute().name)
        path.write_text(f"{stem}-{uuid.uuid4().hex[:8]}\n")
    return path.read_text().strip()

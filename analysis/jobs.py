"""A queue of training commands: so many at a time, each with its log, gone on with where it was stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis.page import read_metrics
from analysis.progress import make_progress
from cayley_interp.files import write_atomically

ROOT = Path(__file__).parents[1]
"""The checkout, which the training commands are modules of."""
TAIL = 8
"""Last lines shown of a run that failed."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One run of a training script."""

    name: str
    script: str
    """Module of the script, training.train_cayley or training.train_molt."""
    arguments: tuple[str, ...]
    """That start the run; --out is added."""
    run_dir: Path
    log: Path

    def is_done(self) -> bool:
        """Whether the run has its report, which it writes last."""
        return (self.run_dir / "report.html").is_file()

    def command(self) -> list[str]:
        """What trains the run, from its beginning or from where it stopped."""
        train = [sys.executable, "-m", self.script]
        if (self.run_dir / "config.json").is_file():
            return [*train, "--resume", str(self.run_dir)]
        return [*train, *self.arguments, "--out", str(self.run_dir)]

    def share_done(self) -> float:
        """Of the run's steps, by its metrics.jsonl; a cold stop may need fewer than all."""
        try:
            config: dict[str, Any] = json.loads((self.run_dir / "config.json").read_text())
            records = read_metrics(self.run_dir / "metrics.jsonl")
        except (OSError, ValueError):  # not there yet, or a line half written
            return 0.0
        steps = config.get("max_steps") or config["tokens"] // config["batch_size"] * config["epochs"]
        return min(1.0, max((record["step"] for record in records), default=0) / steps)


def run_jobs(jobs: list[Job], at_once: int, console: Console) -> list[Job]:
    """Run what is not done, `at_once` at a time; returns the jobs that failed, the others are not stopped by them.

    Whatever ends it ends the runs, which go on from their checkpoints next time: an interrupt, and a SIGTERM, which
    raises KeyboardInterrupt too. Runs left behind would write the same folders as those that are started next.
    """
    waiting = [job for job in jobs if not job.is_done()]
    running: dict[Job, subprocess.Popen[bytes]] = {}
    done, failed = len(jobs) - len(waiting), list[Job]()
    with make_progress(console=console) as bar, _sigterm_interrupts():
        task = bar.add_task("", total=len(jobs), completed=done)
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[job] = _start(job, at_once)
                for job, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[job]
                    done += 1
                    if process.returncode or not job.is_done():
                        failed.append(job)
                    word = "failed" if job in failed else "done"
                    bar.console.print(f"{word}: {job.name} ({done} of {len(jobs)})", markup=False)
                shares = sum(job.share_done() for job in running)
                bar.update(task, completed=done + shares, description=", ".join(job.name for job in running))
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.terminate()  # a run can be killed at any moment
            for process in running.values():
                process.wait()
    return failed


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def say_what_failed(failed: list[Job], console: Console) -> None:
    """The last lines of each log."""
    for job in failed:
        lines = job.log.read_text(errors="replace").splitlines()[-TAIL:]
        said = "".join(f"\n    {line}" for line in lines)
        console.print(f"failed: {job.name}, whose log {job.log} ends with{said}", markup=False)


def check_at_once(at_once: int) -> None:
    """
    Raises:
        ValueError: below 1.
    """
    if at_once < 1:
        raise ValueError(f"--jobs {at_once}: expected 1 or more")


def claim_folder(out: Path, file: str, asked: Mapping[str, object]) -> None:
    """Make the folder of a queue, with runs/ and logs/, and note in `file` what its runs share and no name says.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    there: dict[str, Any] = json.loads((out / file).read_text()) if (out / file).is_file() else {}
    now: dict[str, Any] = json.loads(json.dumps(asked))  # as it will be read
    if differing := [name for name in now if name in there and there[name] != now[name]]:
        listed = "; ".join(f"{name} {there[name]} and not {now[name]}" for name in differing)
        raise ValueError(f"{out} holds runs with {listed}: give another --out, or the same settings")
    for name in ("runs", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_atomically(out / file, json.dumps(there | now, indent=2) + "\n")


def _start(job: Job, at_once: int) -> subprocess.Popen[bytes]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // at_once))),
        "PYTHONUNBUFFERED": "1",  # a log is read while it is written, and its errors stand where they happened
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with job.log.open("ab") as log:
        return subprocess.Popen(job.command(), stdout=log, stderr=subprocess.STDOUT, env=environment)

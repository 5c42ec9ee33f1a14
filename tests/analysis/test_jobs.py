"""The queue of runs, with a script that runs in no time: failures stay alone, what is done is left alone."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from analysis.jobs import ROOT, Job, check_at_once, claim_folder, run_jobs, say_what_failed

SCRIPT = """
import sys
from pathlib import Path
print(*sys.argv[1:])
if "fail" in sys.argv:
    sys.exit("no such thing")
if "unfinished" not in sys.argv:
    run = Path(sys.argv[-1])
    run.mkdir(exist_ok=True)
    (run / "report.html").write_text("")
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes jobs of the script, by name."""
    (tmp_path / "script_of_jobs.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    claim_folder(tmp_path, "settings.json", {})
    return lambda name: Job(name, "script_of_jobs", (name,), tmp_path / "runs" / name, tmp_path / "logs" / name)


def test_failures_stop_no_other_run_and_what_is_done_is_not_run_again(job):
    jobs = [job(name) for name in ("fail", "fine", "unfinished", "finished")]
    jobs[3].run_dir.mkdir()
    (jobs[3].run_dir / "report.html").write_text("")
    assert {j.name for j in run_jobs(jobs, 2, Console(quiet=True))} == {"fail", "unfinished"}
    assert jobs[1].is_done()
    assert jobs[1].log.read_text() == f"fine --out {jobs[1].run_dir}\n"
    assert not jobs[3].log.exists()

    said = io.StringIO()
    say_what_failed(jobs[:1], Console(file=said, soft_wrap=True))
    assert said.getvalue().rstrip().endswith("no such thing")


def test_a_run_that_was_stopped_goes_on(job):
    begun = job("begun")
    begun.run_dir.mkdir()
    (begun.run_dir / "config.json").write_text('{"max_steps": 1}')
    assert run_jobs([begun], 1, Console(quiet=True)) == []
    assert begun.log.read_text() == f"--resume {begun.run_dir}\n"


QUEUE = """
import sys
from pathlib import Path
from rich.console import Console
from analysis.jobs import ROOT, Job, run_jobs
folder = Path(sys.argv[1])
run_jobs([Job("sleeps", "script_that_sleeps", (), folder / "run", folder / "log")], 1, Console(quiet=True))
"""


def test_a_queue_that_is_told_to_end_ends_its_runs(tmp_path):
    (tmp_path / "script_that_sleeps.py").write_text(
        "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    queue = subprocess.Popen([sys.executable, "-c", QUEUE, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    log = tmp_path / "log"
    while not (log.is_file() and log.read_text().endswith("\n")):
        assert queue.poll() is None
        time.sleep(0.05)
    queue.terminate()
    assert queue.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.parametrize(
    "config", [{"max_steps": 8, "batch_size": 16}, {"tokens": 1000, "batch_size": 256, "epochs": 2}]
)
def test_progress_is_steps_logged_of_steps_planned(job, config):
    run = job("run")
    assert run.share_done() == 0
    run.run_dir.mkdir()
    (run.run_dir / "config.json").write_text(json.dumps(config))
    assert run.share_done() == 0
    steps = config.get("max_steps", 6)
    metrics = run.run_dir / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n')
    assert run.share_done() == 2 / steps
    metrics.write_text(f'{{"step": {steps + 1}}}\n')
    assert run.share_done() == 1
    metrics.write_text('{"step": 1}\n{"st')
    assert run.share_done() == 0


def test_a_folder_keeps_to_its_settings(tmp_path):
    claim_folder(tmp_path, "settings.json", {"steps": 5, "flags": ("a",)})
    claim_folder(tmp_path, "settings.json", {"steps": 5, "more": 1})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"steps": 5, "flags": ["a"], "more": 1}
    with pytest.raises(ValueError, match="holds runs with steps 5 and not 6"):
        claim_folder(tmp_path, "settings.json", {"steps": 6})


def test_at_least_one_run_at_once():
    check_at_once(1)
    with pytest.raises(ValueError, match="expected 1 or more"):
        check_at_once(0)

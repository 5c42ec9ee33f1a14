"""The record of what a run ran on: complete, JSON, honest about the checkout, and free of environment variables."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy
import torch

from training.environment import cpu_model, describe_environment, git_state


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_it_is_json_and_names_versions_device_and_start():
    before = datetime.now(UTC).replace(microsecond=0)
    described = json.loads(json.dumps(describe_environment("cpu"), allow_nan=False))

    assert described["versions"]["torch"] == torch.__version__
    assert described["versions"]["numpy"] == numpy.__version__
    assert described["versions"]["python"].startswith("3.")
    assert described["device"] == f"{cpu_model()} (cpu)"
    assert described["gpu"] is None
    assert described["cpu"]["torch_threads"] == torch.get_num_threads()
    assert described["command"]
    started = datetime.fromisoformat(described["started"])
    assert started.utcoffset() is not None
    assert before <= started <= datetime.now(UTC)


def test_no_environment_variable_gets_in(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-4711")
    assert "very-secret-4711" not in json.dumps(describe_environment("cpu"))


def test_a_checkout_is_dirty_once_a_file_changes(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    assert git_state(tmp_path) == {"commit": None, "dirty": True}  # before the first commit

    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}

    (tmp_path / "code.py").write_text("x = 2\n")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_outside_a_checkout_or_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    nothing = {"commit": None, "dirty": None}
    assert git_state(tmp_path) == nothing
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) == nothing


def test_peak_memory_is_this_process_s_own():
    # A child of a large process: getrusage would answer with the parent's peak.
    ballast = bytearray(400_000_000)
    code = (
        "from training.environment import peak_resident_memory as p; a = p(); b = bytearray(150_000_000); print(a, p())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert before < len(ballast)
    assert 140_000_000 < after - before < 250_000_000

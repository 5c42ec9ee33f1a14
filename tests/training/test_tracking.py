"""metrics.jsonl survives kills and resumes; wandb and trackio really write, without an account or a network."""

import builtins
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from training.tracking import MetricsFile, flatten, start_tracker

CHECKOUT = Path(__file__).parents[2]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def metrics(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        file.append({"step": step, "loss": 1 / step})
    return file


# ---- metrics.jsonl ----


def test_each_record_is_a_line_at_once(metrics):
    assert lines(metrics.path) == [{"step": step, "loss": 1 / step} for step in (10, 20, 30)]


def test_a_line_is_one_write_to_an_append_descriptor(metrics, monkeypatch):
    writes = []
    real_open, real_write = os.open, os.write

    def recording_open(path, flags, *mode):
        writes.append(bool(flags & os.O_APPEND))
        return real_open(path, flags, *mode)

    def recording_write(descriptor, data):
        writes.append(data)
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "open", recording_open)
    monkeypatch.setattr(os, "write", recording_write)
    metrics.append({"step": 40})
    assert writes == [True, b'{"step": 40}\n']


def test_what_is_not_finite_is_null_at_any_depth(metrics):
    metrics.append({"step": 40, "loss": float("nan"), "silent": {"0": float("inf")}, "pair": [1.5, float("-inf")]})
    assert lines(metrics.path)[-1] == {"step": 40, "loss": None, "silent": {"0": None}, "pair": [1.5, None]}


def test_a_full_disk_leaves_the_file_as_it_was(metrics, monkeypatch):
    before = metrics.path.read_bytes()
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:5]))
    with pytest.raises(OSError, match="disk is full"):
        metrics.append({"step": 40, "loss": 0.5})
    assert metrics.path.read_bytes() == before


@pytest.mark.parametrize("record", [{}, {"step": None}, {"step": "10"}, {"step": 1.5}])
def test_a_record_without_a_step_is_refused(metrics, record):
    before = metrics.path.read_bytes()
    with pytest.raises(ValueError, match="integer `step`"):
        metrics.append(record)
    assert metrics.path.read_bytes() == before


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (9, 0), (10, 1), (29, 2), (30, 3), (1000, 3)])
def test_resuming_drops_later_steps_and_keeps_the_others_to_the_byte(metrics, step, kept):
    before = metrics.path.read_bytes()
    metrics.truncate_after(step)
    assert metrics.path.read_bytes() == b"".join(before.splitlines(keepends=True)[:kept])
    metrics.append({"step": step + 1})
    assert lines(metrics.path)[-1] == {"step": step + 1}
    assert [path.name for path in metrics.path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 25, "lo', b'{"step": 5}', b"\0\0\0"])
def test_resuming_drops_a_torn_last_line(metrics, torn):
    before = metrics.path.read_bytes()
    metrics.path.write_bytes(before + torn)
    metrics.truncate_after(30)
    assert metrics.path.read_bytes() == before


def test_a_file_that_is_not_ours_is_refused_and_left_alone(metrics):
    damaged = metrics.path.read_bytes().replace(b'{"step": 20', b"what is this")
    metrics.path.write_bytes(damaged)
    with pytest.raises(ValueError, match="line 2"):
        metrics.truncate_after(30)
    assert metrics.path.read_bytes() == damaged


def test_a_kill_during_the_rewrite_loses_nothing(metrics, monkeypatch):
    before = metrics.path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.truncate_after(10)
    assert metrics.path.read_bytes() == before


def test_resuming_before_the_first_line_is_no_error(tmp_path):
    MetricsFile(tmp_path / "none.jsonl").truncate_after(0)
    assert list(tmp_path.iterdir()) == []


def test_median_is_over_the_lines_that_have_the_number(metrics):
    for step, speed in ((40, 1.0), (50, float("nan")), (60, 3.0), (70, 100.0)):
        metrics.append({"step": step, "speed": speed})
    assert metrics.median("speed") == 3.0
    assert metrics.median("no_such") is None


# ---- Trackers ----


def test_flatten_joins_names():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"0": 3}}, "e": {}}) == {"a": 1, "b/c": 2, "b/d/0": 3}


def test_no_tracker_writes_nothing(tmp_path):
    tracker = start_tracker("none", tmp_path, "tiny", {})
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_missing_package_names_the_extra(kind, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == kind:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    with pytest.raises(ImportError, match=r"--track .* pip install 'cayley-interp\[tracking\]'"):
        start_tracker(kind, tmp_path, "tiny", {})


def track_three_steps(kind: str, run_dir: Path, home: Path, first: int, **variables: str) -> None:
    """In a process of its own: both trackers keep global state. A home without credentials, and no terminal."""
    code = (
        "import sys; from pathlib import Path; from training.tracking import start_tracker\n"
        "kind, run_dir, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])\n"
        "tracker = start_tracker(kind, run_dir, 'tiny', {'model': {'d_model': 128}})\n"
        "for step in range(first, first + 3):\n"
        "    tracker.log({'loss': 2.5 + step, 'silent': {'0': 0.25}}, step=step)\n"
        "tracker.finish()\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO", "HF_"))}
    # Ports nobody listens on: a request to the network fails the way it does without one.
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    subprocess.run(
        [sys.executable, "-c", code, kind, str(run_dir), str(first)],
        cwd=CHECKOUT,
        env=kept | proxies | {"HOME": str(home), "NETRC": str(home / "netrc")} | variables,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )


def test_wandb_runs_offline_without_an_account_and_resumes_the_same_run(tmp_path):
    run_dir, home = tmp_path / "my run", tmp_path / "home"
    run_dir.mkdir()
    home.mkdir()
    for first in (1, 4):
        track_three_steps("wandb", run_dir, home, first)
    files = list((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.name for file in files} == {f"run-{(run_dir / 'tracker_id').read_text().strip()}.wandb"}
    written = b"".join(file.read_bytes() for file in files)
    for text in (b"silent/0", b"model/d_model", b"tiny"):
        assert text in written
    assert {path.name for path in run_dir.iterdir()} == {"wandb", "tracker_id"}


def test_wandb_mode_of_the_user_wins(tmp_path):
    track_three_steps("wandb", tmp_path, tmp_path, 1, WANDB_MODE="disabled")
    assert not list(tmp_path.rglob("*.wandb"))


def trackio_rows(folder: Path) -> list[tuple]:
    with sqlite3.connect(folder / "cayley-interp.db") as database:
        rows = database.execute("select run_name, run_id, step, metrics from metrics order by step").fetchall()
    return [(name, run, step, json.loads(text)) for name, run, step, text in rows]


def test_trackio_writes_into_the_run_folder_and_resumes_the_same_run(tmp_path):
    run_dir, home = tmp_path / "my run", tmp_path / "home"
    run_dir.mkdir()
    home.mkdir()
    for first in (1, 4):
        track_three_steps("trackio", run_dir, home, first)
    rows = trackio_rows(run_dir / "trackio")
    assert [row[2:] for row in rows] == [(step, {"loss": 2.5 + step, "silent/0": 0.25}) for step in range(1, 7)]
    assert len({row[:2] for row in rows}) == 1
    assert rows[0][0] == (run_dir / "tracker_id").read_text().strip()
    assert rows[0][0].startswith("my-run-")


def test_runs_that_share_a_trackio_folder_stay_apart(tmp_path):
    shared = tmp_path / "shared"
    for parent in ("a", "b"):
        run_dir = tmp_path / parent / "tiny"
        run_dir.mkdir(parents=True)
        track_three_steps("trackio", run_dir, tmp_path, 1, TRACKIO_DIR=str(shared))
        assert not (run_dir / "trackio").exists()
    assert len({row[0] for row in trackio_rows(shared)}) == 2
    assert len(trackio_rows(shared)) == 6

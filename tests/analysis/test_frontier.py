"""Sweeps: their commands are the training command's, and a real one is run, goes on, and outlives a failure."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from analysis.comparison import Settings
from analysis.frontier import Frontier, Options, chosen, compare_layers, main
from analysis.jobs import run_jobs
from analysis.sweeps import SWEEPS, Sweep
from tests.analysis.tiny_runs import tiny_flags
from tests.helpers import ROOT, environment
from training.train_molt import COMMAND


def test_the_declared_sweep():
    cells = list(SWEEPS["gemma-270m"].cells())
    assert len(cells) == len({cell.name for cell in cells}) == 3 * (3 * 4 + 2 * 6 + 1)
    assert {cell.layer for cell in SWEEPS["gemma-270m-L9"].cells()} == {9}


def test_commands_are_read_by_the_training_command_as_meant():
    frontier = Frontier(SWEEPS["gemma-270m"], Path("x"))
    for cell, job in list(frontier.jobs.items())[20:40:3]:
        argv = job.command()
        config, out, resume = COMMAND.parse(argv[argv.index("training.train_molt") + 1 :])
        assert (config.layer, config.kind, config.gate, config.seed) == (cell.layer, cell.kind, cell.gate, cell.seed)
        assert (config.tokens, config.epochs, config.n, config.host) == (300_000, 2, 1, "gemma-3-270m")
        assert (config.activation_cache, out, resume) == (Path("x/activations"), Path(f"x/runs/{cell.name}"), False)


def test_options_narrow_and_change():
    options = Options("gemma-270m", Path("x"), layers=(9,), kinds=("mxd", "linear"), seeds=(0, 1), tokens=50_000)
    sweep = chosen(options, ("--host-dtype", "bfloat16"))
    assert len(list(sweep.cells())) == 4 * 2 + 1
    assert sweep.tokens == 50_000
    assert sweep.arguments[-2:] == ("--host-dtype", "bfloat16")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no-such", "--out", "x"], "the sweeps are gemma-270m, gemma-270m-L9"),
        (["gemma-270m", "--out", "x", "--jobs", "0"], "--jobs 0: expected 1 or more"),
    ],
)
def test_bad_options_are_one_line(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "sweep"
    assert main(["gemma-270m-L9", "--out", str(out), "--kinds", "molt", "--dry-run", "--", "--host", "a b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("--host 'a b'" in line and "-m training.train_molt" in line for line in lines)
    assert not out.exists()


def test_a_sweep_outlives_a_failure_goes_on_with_what_stopped_and_skips_what_is_done(tmp_path):
    console = Console(quiet=True)
    flags = tuple(tiny_flags(tmp_path))
    gates = {"molt": ("topk:40",), "linear": ()}
    sweep = Sweep(layers=(1,), gates=gates, tokens=2048, epochs=1, arguments=flags)
    frontier = Frontier(sweep, tmp_path / "out")
    impossible, linear = frontier.jobs.values()
    frontier.start()

    # As a run leaves its folder that is stopped before its first step.
    command = linear.command()
    config, run_dir, _ = COMMAND.parse(command[command.index("training.train_molt") + 1 :])
    run_dir.mkdir()
    config = replace(config, optim=replace(config.optim, lr=config.peak_lr))
    (run_dir / "config.json").write_text(json.dumps(asdict(config), default=str))
    assert "--resume" in linear.command()

    assert run_jobs([impossible, linear], 2, console) == [impossible]
    assert "expected k from 1 to the 31 units" in " ".join(impossible.log.read_text().split())
    assert linear.is_done()
    assert impossible.share_done() == 0

    log = linear.log.read_text()
    possible = Frontier(replace(sweep, gates={"linear": ()}), tmp_path / "out")
    assert run_jobs(list(possible.jobs.values()), 1, console) == []
    assert linear.log.read_text() == log

    settings = Settings(tokens=500, behaviour_tokens=256, jacobian_tokens=32)
    assert compare_layers(frontier, settings, console) == [tmp_path / "out" / "L1" / "index.html"]
    assert "linear N=1" in (tmp_path / "out" / "L1" / "compare.md").read_text()
    with pytest.raises(ValueError, match="holds runs with tokens 2048 and not 4096"):
        Frontier(replace(sweep, tokens=4096), tmp_path / "out").start()


@pytest.mark.slow
def test_an_interrupted_sweep_leaves_no_process_and_goes_on(tmp_path):
    flags = ["gemma-270m-L9", "--layers", "1", "--kinds", "molt", "--tokens", "4096", "--epochs", "1000"]
    argv = [*flags, "--out", str(tmp_path / "out"), "--", *tiny_flags(tmp_path), "--log-every", "1"]
    command = [sys.executable, "-m", "analysis.frontier", *argv]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell has its background jobs ignore interrupts, and their children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    run = tmp_path / "out" / "runs" / "L1-molt-batchtopk1-s0"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on" in said
    n_lines = len((run / "metrics.jsonl").read_text().splitlines())
    time.sleep(1)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == n_lines
    shown = subprocess.run(
        [*command[:3], *flags, "--dry-run", *argv[len(flags) :]],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert f"--resume {run}" in shown.stdout.splitlines()[0]

"""The training script as a user runs it: real processes, real kills, real errors."""

import json
import random
import signal
import subprocess
import time

import pytest
import torch

from tests.helpers import (
    ROOT,
    SMALL_RUN,
    environment,
    metrics,
    run_training,
    small_corpus,
    train_command,
    train_losses,
    weights,
)
from training.recipes import RECIPES, config_from_dict


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of 30 steps that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    arguments = [*SMALL_RUN, str(corpus), "--max-steps", "30", "--checkpoint-every", "4", "--eval-every", "10"]
    result = run_training("tiny", *arguments, "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out, arguments, result


def test_a_run_leaves_everything_that_was_promised(finished):
    out, _, result = finished
    assert str(out / "report.html") in result.stdout
    assert str(out) in result.stdout
    for name in ("config.json", "environment.json", "metrics.jsonl", "report.html", "model/model.safetensors"):
        assert (out / name).stat().st_size > 0, name
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-0000028", "step-0000030"]
    config = config_from_dict(json.loads((out / "config.json").read_text()))
    assert (config.max_steps, config.model.levels, config.optim.warmup) == (30, "4,3,0;6,4,4", 5)
    assert config.optim.muon_lr == RECIPES["tiny"][1].optim.muon_lr


def test_the_display_shows_step_loss_speed_and_time_left(finished):
    stderr = finished[2].stderr
    line = next(line for line in stderr.splitlines() if line.startswith("step     20/30"))
    for part in ("loss ", "tokens/s", "MFU ", "left"):
        assert part in line


def test_metrics_hold_every_step_and_the_final_evaluation(finished):
    records = metrics(finished[0])
    assert [r["step"] for r in records if "train_loss" in r] == list(range(1, 31))
    assert [r["step"] for r in records if "val_loss" in r] == [10, 20, 30]
    promised = {"tokens", "lr_muon", "lr_adamw", "grad_norm", "tokens_per_second", "mfu"}
    assert all(promised <= r.keys() for r in records if "train_loss" in r)
    final = records[-1]["final"]
    assert final["val_loss"] == pytest.approx(records[-2]["val_loss"], abs=1e-4)
    assert 0 < final["bigram_loss"] < final["unigram_loss"] < 6
    assert final["peak_memory_bytes"] > 50e6
    assert final["peak_flops_source"] == "measured"
    assert final["mfu"] > 0
    assert [(s["layer"], s["level"]) for s in final["levels"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0 < s["l0"] <= 4 for s in final["levels"])


def test_the_environment_says_what_the_process_was_set_to(finished):
    described = json.loads((finished[0] / "environment.json").read_text())
    assert described["kernels"]["backend"] == "auto"
    assert described["cpu"]["flush_denormal"] is True
    assert 1 <= described["cpu"]["available"] <= described["cpu"]["count"]


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_the_backend_is_set_and_recorded_or_refused(corpus, tmp_path, backend):
    out = tmp_path / "run"
    arguments = ["--max-steps", "2", "--backend", backend, "--out", str(out)]
    result = run_training("tiny", *SMALL_RUN, str(corpus), *arguments)
    if backend == "torch":
        assert result.returncode == 0, result.stderr
        assert json.loads((out / "environment.json").read_text())["kernels"]["backend"] == "torch"
        return
    assert result.returncode == 2
    message = " ".join(result.stderr.replace("│", " ").split())
    assert "--backend" in message
    assert ("--backend auto" if backend == "triton" else "invalid choice 'cuda'") in message
    assert "Traceback" not in message
    assert not out.exists()


def test_the_model_learns(finished):
    losses = train_losses(finished[0])
    assert sum(losses[-3:]) / 3 < losses[0] - 0.5


@pytest.mark.parametrize("kill_at", [0, 3, 13])
def test_a_killed_run_resumes_to_bit_identical_weights(finished, tmp_path, kill_at):
    whole, arguments, _ = finished
    out = tmp_path / "killed"
    process = subprocess.Popen(
        train_command("tiny", *arguments, "--out", str(out)),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # 0 kills as soon as the folder has a config, before any step.
    waiting_for = out / ("metrics.jsonl" if kill_at else "config.json")
    deadline = time.monotonic() + 120
    while not (waiting_for.exists() and (not kill_at or len(waiting_for.read_text().splitlines()) >= kill_at)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    result = run_training("--resume", str(out))
    assert result.returncode == 0, result.stderr
    expected, got = weights(whole), weights(out)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    assert train_losses(out) == train_losses(whole)


def test_a_finished_run_can_be_resumed_to_remake_its_report(finished):
    out = finished[0]
    before = weights(out)
    (out / "report.html").unlink()
    result = run_training("--resume", str(out))
    assert result.returncode == 0, result.stderr
    assert (out / "report.html").exists()
    assert all(torch.equal(before[name], value) for name, value in weights(out).items())


def test_vanilla_runs_and_reports_too(corpus, tmp_path):
    arguments = [a for a in SMALL_RUN if a not in ("--levels", "4,3,0;6,4,4")]
    result = run_training("tiny-vanilla", *arguments, str(corpus), "--max-steps", "4", "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "run")[-1]["final"]["levels"] == []


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(corpus, tmp_path):
    out = tmp_path / "run"
    arguments = ["--max-steps", "40", "--checkpoint-every", "1", "--warmup", "0"]
    arguments += ["--muon-lr", "1e30", "--adamw-lr", "1e30"]
    result = run_training("tiny", *SMALL_RUN, str(corpus), *arguments, "--out", str(out))
    assert result.returncode == 2
    assert "TrainingDiverged" in result.stderr
    assert "stopped before the weights were touched" in result.stderr
    assert "--muon-lr" in result.stderr
    kept = sorted((out / "checkpoints").iterdir())[-1]
    assert str(kept) in result.stderr
    from safetensors.torch import load_file

    assert all(v.isfinite().all() for v in load_file(kept / "model.safetensors").values() if v.is_floating_point())


def test_help_names_every_recipe_with_its_line():
    result = run_training("--help")
    assert result.returncode == 0
    for name, (line, _) in RECIPES.items():
        assert name in result.stdout
        assert " ".join(line.split()[:4]) in " ".join(result.stdout.split())
    for flag in ("max-steps", "out", "seed", "data", "device", "resume", "dictionary", "levels", "track"):
        assert f"--{flag}" in result.stdout, flag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-recipe"], "the recipes are tiny, tiny-vanilla"),
        (["--levels", "8,8,0"], r"log2(d_model) = 7, got n = 8"),
        (["--d-model", "100"], "power of two from 4 to 65536, got 100: try 64 or 128"),
        (["--levels", "7,8,0;22,16,32"], "n up to 21"),
        (["--levels", "7,200,0"], "k must be from 1 to the 128 candidates"),
        (["--dictionary", "bent"], "even log2(d_model)"),
        (["--levels", "7,8"], 'levels are written "n,k,budget'),
        (["--resume", "/nonexistent"], "is not a run folder"),
        (["--data", "/nonexistent/*.txt"], "/nonexistent"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path):
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "run")]
    result = run_training(*arguments, *out)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


def test_a_folder_with_something_in_it_is_left_alone(finished):
    out, arguments, _ = finished
    before = weights(out)
    result = run_training("tiny", *arguments, "--out", str(out))
    assert result.returncode == 2
    assert "--resume" in result.stderr
    assert all(torch.equal(before[name], value) for name, value in weights(out).items())


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_the_same(finished, tmp_path):
    whole, arguments, _ = finished
    out = tmp_path / "run"
    command = train_command("tiny", *arguments, "--out", str(out))
    kills = random.Random(0)
    for _ in range(12):
        process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not (out / "config.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(kills.uniform(0.0, 6.0))
        process.kill()
        process.wait()
        command = train_command("--resume", str(out))
    result = run_training("--resume", str(out))
    assert result.returncode == 0, result.stderr
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(whole).items())
    assert train_losses(out) == train_losses(whole)


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions_train(corpus, tmp_path, precision):
    out = tmp_path / "run"
    arguments = ["--max-steps", "12", "--precision", precision, "--out", str(out)]
    result = run_training("tiny", *SMALL_RUN, str(corpus), *arguments)
    assert result.returncode == 0, result.stderr
    losses = train_losses(out)
    assert losses[-1] < losses[0]
    dtype = torch.float64 if precision == "fp64" else torch.float32
    assert weights(out)["wpe.weight"].dtype == dtype


@pytest.mark.slow
def test_a_compiled_run_takes_the_same_steps(corpus, tmp_path):
    losses = []
    for flag in ("False", "True"):
        out = tmp_path / flag
        arguments = ["--max-steps", "6", "--precision", "fp64", "--compile", flag, "--out", str(out)]
        result = run_training("tiny", *SMALL_RUN, str(corpus), *arguments)
        assert result.returncode == 0, result.stderr
        losses.append(train_losses(out))
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_run_can_be_tracked_without_an_account(corpus, tmp_path, tracker):
    out = tmp_path / "run"
    result = run_training("tiny", *SMALL_RUN, str(corpus), "--max-steps", "3", "--track", tracker, "--out", str(out))
    assert result.returncode == 0, result.stderr
    written = [p for p in out.rglob("*") if p.suffix in (".wandb", ".db") and p.stat().st_size > 0]
    assert written, f"{tracker} left nothing in the run folder"

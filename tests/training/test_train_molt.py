"""The real script on a tiny real host: what it leaves, that it learns, that it can be killed, and bad input."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from molt_lens.folder import check_site, load_replacement
from molt_lens.hosts import load_host
from tests.helpers import MOLT_SCRIPT, ROOT, environment, metrics, run_molt, small_corpus
from tests.molt_lens.host_models import tiny_model, tiny_tokenizer
from training.molt_recipes import MOLT_RECIPES, molt_run_from_dict
from training.train_molt import COMMAND


@pytest.fixture(scope="module")
def host_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host") / "tiny-gemma"
    tiny_model("gemma3").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(host_folder, tmp_path_factory):
    corpus = small_corpus(tmp_path_factory.mktemp("text") / "corpus")
    return [
        *("--host", str(host_folder), "--layer", "1", "--data", str(corpus), "--device", "cpu"),
        *("--tokens", "4096", "--epochs", "2", "--batch-size", "256", "--n-ctx", "64"),
        *("--buffer-tokens", "3000"),
        *("--val-tokens", "1024", "--behaviour-tokens", "512", "--log-every", "1", "--checkpoint-every", "5"),
    ]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = run_molt(*arguments, "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out, result


def test_a_run_leaves_everything_that_was_promised(finished, host_folder):
    out, result = finished
    assert str(out / "report.html") in result.stdout
    assert {p.name for p in out.iterdir()} == {
        *("config.json", "environment.json", "held_out.safetensors", "metrics.jsonl"),
        *("checkpoints", "model", "ridge", "report.html"),
    }
    assert molt_run_from_dict(json.loads((out / "config.json").read_text())).layer == 1
    replacement, record = load_replacement(out / "model")
    check_site(record, load_host(host_folder))
    assert record.hooks["hf_target"] == "model.layers.1.post_feedforward_layernorm.output"
    assert record.hooks["tl_input"] == "blocks.1.mlp.hook_in"
    assert record.training is not None
    assert record.training["training_tokens"] == 8192
    assert record.training["fit"]["nmse"] == metrics(out)[-1]["final"]["fit"]["nmse"]
    assert replacement.map.n_units == 31


def test_it_learns_and_says_through_what(finished):
    records = metrics(finished[0])
    steps = [r for r in records if "mse" in r]
    assert [r["step"] for r in steps] == list(range(1, 33))
    assert all({"l0", "active_rank", "opened", "lr", "grad_norm", "tokens_per_second"} <= r.keys() for r in steps)
    assert all(r["l0"] == pytest.approx(4, abs=0.1) for r in steps)
    assert steps[-1]["mse"] < 0.9 * steps[0]["mse"]
    final = records[-1]["final"]
    assert final["floors"]["mean"]["nmse"] == pytest.approx(1, abs=0.1)
    assert final["floors"]["ridge"]["nmse"] < 0.9
    assert final["fit"]["nmse"] < 1
    assert final["behaviour"]["ce_host"] > 0
    assert set(final["by_rank"]) == {"32"}
    for part in ("active rank", "alive", "recovered", "KL"):
        assert part in finished[1].stderr


def test_a_killed_run_resumes_to_bit_identical_weights(finished, arguments, tmp_path):
    whole, out = finished[0], tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, MOLT_SCRIPT, *arguments, "--out", str(out)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    # In the second epoch; the buffer holds about eleven of the sixteen steps of an epoch.
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 17:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    result = run_molt("--resume", str(out))
    assert result.returncode == 0, result.stderr
    expected, got = load_replacement(whole / "model")[0].state_dict(), load_replacement(out / "model")[0].state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    timed = {"tokens_per_second"}
    for a, b in zip(metrics(whole)[:-1], metrics(out)[:-1], strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def test_a_run_killed_between_two_exact_norms_resumes_to_bit_identical_weights(arguments, tmp_path):
    """What is left of it is the checkpoint of step 5; norms are exact at steps 3 and 6."""
    run = tmp_path / "run"
    penalty = ["--penalty.kind", "tanh", "--penalty.weight", "0.1", "--penalty.norms-every", "3"]
    sizes = ["--tokens", "2048", "--gate", "relu", "--keep-checkpoints", "9"]
    assert COMMAND.main([*arguments, *sizes, *penalty, "--out", str(run)]) == 0
    whole = load_replacement(run / "model")[0].state_dict()
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert [checkpoint.name for checkpoint in checkpoints] == [f"step-00000{n}" for n in ("05", "10", "15", "16")]
    for made in (run / "model", *checkpoints[1:]):
        shutil.rmtree(made)
    assert COMMAND.main(["--resume", str(run)]) == 0
    again = load_replacement(run / "model")[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    "choice",
    [
        ["--kind", "skip-transcoder", "--gate", "jumprelu", "--penalty.kind", "l0", "--penalty.target", "20"],
        ["--kind", "mxd", "--gate", "topk:8"],
        ["--kind", "linear"],
        ["--kind", "molt-skip", "--gate", "relu", "--penalty.kind", "tanh"],
        ["--kind", "transcoder", "--gate", "batchtopk:8", "--host-dtype", "bfloat16", "--precision", "bf16"],
    ],
    ids=lambda choice: choice[1],
)
def test_baselines_by_the_same_command(choice, arguments, tmp_path):
    assert COMMAND.main([*arguments, "--tokens", "2048", *choice, "--out", str(tmp_path / "run")]) == 0
    final = metrics(tmp_path / "run")[-1]["final"]
    assert 0 < final["fit"]["nmse"] < 1.5
    if choice == ["--kind", "linear"]:
        assert final["fit"] == final["floors"]["ridge"]


@pytest.mark.parametrize("kind", ["linear", "molt"])
def test_a_run_killed_between_its_floor_and_its_first_checkpoint_goes_on_alike(kind, arguments, tmp_path):
    """Without its statistics a map would train all the same, on activations that nobody standardised."""
    run = tmp_path / "run"
    assert COMMAND.main([*arguments, "--tokens", "2048", "--kind", kind, "--out", str(run)]) == 0
    whole = load_replacement(run / "model")[0].state_dict()
    for made in ("model", "checkpoints"):
        shutil.rmtree(run / made, ignore_errors=True)
    for made in ("metrics.jsonl", "report.html"):
        (run / made).unlink()
    assert COMMAND.main(["--resume", str(run)]) == 0
    again = load_replacement(run / "model")[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_cayley_gpt_is_a_host(arguments, tmp_path):
    """A map from the norm's output stands for bottleneck and MLP together."""
    change = ["--host", "cayley-tiny-2L-sotu", "--layer", "3", "--target", "mlp_out", "--tokens", "2048"]
    assert COMMAND.main([*arguments, *change, "--out", str(tmp_path / "run")]) == 0
    record = load_replacement(tmp_path / "run" / "model")[1]
    assert record.hooks["tl_input"] == "blocks.3.ln2.hook_out"


def test_a_replacement_is_a_baseline_of_its_own_host_and_site_only(finished, arguments, tmp_path, capsys):
    same = [*arguments, "--tokens", "1024", "--kind", "linear", "--baseline", str(finished[0])]
    assert COMMAND.main([*same, "--out", str(tmp_path / "run")]) == 0
    final = metrics(tmp_path / "run")[-1]["final"]
    assert final["floors"][str(finished[0])] == metrics(finished[0])[-1]["final"]["fit"]
    assert COMMAND.main([*same, "--layer", "2", "--out", str(tmp_path / "other")]) == 2
    assert "this run is of Site(layer=2" in " ".join(capsys.readouterr().err.split())


def test_help_names_every_recipe():
    result = run_molt("--help")
    assert result.returncode == 0
    for name in MOLT_RECIPES:
        assert name in " ".join(result.stdout.split())
    flags = ("host", "layer", "kind", "gate", "n", "tokens", "out", "optim.lr", "penalty.kind", "penalty.norms-every")
    for flag in (*flags, "resume"):
        assert f"--{flag}" in result.stdout, flag


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["no-such-recipe"], "the recipes are gemma-3-270m-L9-N1"),
        (["--layer", "3"], "has layers 0 to 2, got layer 3"),
        (["--gate", "topk:40"], "expected k from 1 to the 31 units"),
        (["--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["--penalty.kind", "l0"], "--gate jumprelu"),
        (["--penalty.norms-every", "0"], "--penalty.norms-every 0: expected at least 1"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--tokens", "10_000_000"], "or give more text"),
        (["--buffer-tokens", "700"], "must hold a batch of 256 and a forward pass of 512 tokens"),
        (["--resume", "/nonexistent"], "is not a run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line(change, message, arguments, tmp_path, capsys):
    given = (
        change if change[0] in ("--resume", "no-such-recipe") else [*arguments, *change, "--out", str(tmp_path / "r")]
    )
    assert COMMAND.main(given) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_backend_is_set_and_recorded_or_refused(arguments, tmp_path):
    out = tmp_path / "run"
    short = [*arguments, "--tokens", "512", "--epochs", "1", "--out", str(out)]
    result = run_molt(*short, "--backend", "triton")
    assert result.returncode == 2
    assert "--backend auto" in result.stderr
    assert not out.exists()
    result = run_molt(*short, "--backend", "torch")
    assert result.returncode == 0, result.stderr
    described = json.loads((out / "environment.json").read_text())
    assert described["kernels"]["backend"] == "torch"
    assert described["cpu"]["flush_denormal"] is True

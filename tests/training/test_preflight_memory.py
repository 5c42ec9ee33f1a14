"""Memory of the preflight: the estimate against autograd and a real run, and the batch it advises."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from cayley_interp import CayleyGPT, CayleyGPTConfig
from tests.training.configs import LEVELS, TINY, gpt
from training import preflight as checks
from training.optim import make_optimizers
from training.preflight import count_parameters, estimate_memory
from training.recipes import RECIPES, OptimConfig

SMALL = RECIPES["cayley-small-2L-mlp_in-20B"][1]


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

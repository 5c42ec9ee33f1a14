"""Honest timing: implementations of one operation interleaved in one process, medians, the bound beside them.

A benchmark module has `groups(device)`: what is measured against what. Setting a case up is left to the one who runs
it, so that the groups of a device that is not here can be listed.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from training.environment import cpu_model, peak_resident_memory
from training.flops import measured_flops

Call = Callable[[], object]
"""What is timed; a whole number it returns is the tokens it went through."""

LEAST_SECONDS = 0.005
"""Of one sample: a shorter call is repeated."""

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Bound:
    """The least an operation can take: the copy of what it must read and write, and products at a plain GEMM's rate."""

    bytes: float = 0
    flops: float = 0


@dataclass(frozen=True)
class Group:
    """Implementations of one operation at one shape; the first is the baseline of the others."""

    operation: str
    shape: str
    dtype: str
    cases: dict[str, Callable[[], Call]]
    """What sets up each: its time is not measured."""
    bound: Bound | None = None
    """Of a call of `tokens` tokens."""
    tokens: int = 0
    """A call goes through so many, where it does not say."""
    rounds: int = 7
    memory: bool = False
    """Also measure each case's peak memory, parameters and set-up included."""


@dataclass
class Sample:
    seconds: float
    tokens: int


def measure(group: Group, device: str, rounds: int | None = None) -> list[dict]:
    """A row for each case: figures, or the error in their place."""
    samples, errors = interleaved(group, device, rounds or group.rounds)
    base = next(iter(group.cases))
    bound = bound_seconds(group, device)
    rows = []
    for name in group.cases:
        row: dict = {**described(group), "device": device, "implementation": name, "baseline": base}
        if name in errors:
            rows.append(row | {"error": errors[name]})
            continue
        seconds = [sample.seconds for sample in samples[name]]
        row |= {"ms": 1e3 * statistics.median(seconds), "ms_range": [1e3 * min(seconds), 1e3 * max(seconds)]}
        if samples[name][0].tokens:
            row["tokens_per_second"] = statistics.median(s.tokens / s.seconds for s in samples[name])
        if base in samples:
            row["ratio"] = cost(samples[base]) / cost(samples[name])
        if bound is not None:
            share = samples[name][0].tokens / group.tokens if group.tokens else 1.0
            row |= {"bound": bound[0], "of_bound": share * bound[1] / statistics.median(seconds)}
        if group.memory:
            row["memory_mb"] = peak_memory(group, name, device) / 1e6
        rows.append(row)
    return rows


def described(group: Group) -> dict[str, str]:
    return {"operation": group.operation, "shape": group.shape, "dtype": group.dtype}


def cost(samples: list[Sample]) -> float:
    """Median seconds, of a token where tokens are known: cases may go through different numbers."""
    return statistics.median(sample.seconds / (sample.tokens or 1) for sample in samples)


def interleaved(group: Group, device: str, rounds: int) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """Samples of each case, one after the other in turn after two calls to warm up; and what failed, and why."""
    calls: dict[str, tuple[Call, int]] = {}
    errors: dict[str, str] = {}
    for name, make in group.cases.items():
        try:
            call = make()
            call()
            once = timed(call, 1, device, group.tokens).seconds
            calls[name] = call, max(1, round(LEAST_SECONDS / max(once, 1e-7)))
        except Exception as error:  # whatever one implementation does, the others go on, and its row says it
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else repr(error)
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, repeats) in calls.items():
            samples[name].append(timed(call, repeats, device, group.tokens))
    return samples, errors


def timed(call: Call, repeats: int, device: str, tokens: int) -> Sample:
    """The mean of some calls in a row."""
    synchronise(device)
    start, seen = time.perf_counter(), 0
    for _ in range(repeats):
        counted = call()
        seen += counted if isinstance(counted, int) else tokens
    synchronise(device)
    return Sample((time.perf_counter() - start) / repeats, round(seen / repeats))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- Bounds ----


def bound_seconds(group: Group, device: str) -> tuple[str, float] | None:
    """The higher of the two bounds: which, and its time on this device."""
    if group.bound is None:
        return None
    both = {
        "copy": copy_seconds(int(group.bound.bytes), device),
        "GEMM": group.bound.flops / gemm_rate(device, group.dtype) if group.bound.flops else 0.0,
    }
    name = max(both, key=lambda which: both[which])
    return name, both[name]


@cache
def copy_seconds(n_bytes: int, device: str) -> float:
    """To read half of so many bytes and write them elsewhere."""
    if n_bytes < 2:
        return 0.0
    source = torch.ones(n_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), device)


@cache
def gemm_rate(device: str, dtype: str) -> float:
    return measured_flops(torch.device(device), DTYPES[dtype])


def median_seconds(call: Call, device: str) -> float:
    group = Group("", "", "", {"": lambda: call}, rounds=15)
    return cost(interleaved(group, device, group.rounds)[0][""])


# ---- Memory ----


def peak_memory(group: Group, name: str, device: str) -> int:
    """Bytes that a case adds to the peak: on a CPU in a fresh process, because a process never gives its peak back.

    There the median of three: how far an allocator reuses what it has moves a peak by a third.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call = group.cases[name]()
        call()
        call()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, "-m", "tests.benchmarks.peak", group.operation, group.shape, group.dtype, name]
    peaks = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        peaks.append(int(done.stdout.split()[-1]))
    return int(statistics.median(peaks))


def resident_growth(setup: Callable[[], Call]) -> int:
    """Bytes by which the resident peak grows while `setup` builds a case and its call runs twice.

    torch loads 40 MB of Python modules at the first `backward(grad)`, whatever the model: they are loaded before.
    """
    x = torch.randn(8, 8, requires_grad=True)
    (x @ x).backward(torch.ones(8, 8))
    before = peak_resident_memory()
    call = setup()
    call()
    call()
    return peak_resident_memory() - before


def hardware(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}"

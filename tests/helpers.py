"""Runs of the real training script, small enough for tests; cases of kernels in a process of their own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "training" / "train_cayley.py")
MOLT_SCRIPT = str(ROOT / "training" / "train_molt.py")
# A model of a few thousand parameters on a few speeches: seconds, but every part of a real run.
SMALL_RUN = [
    *("--n-layers", "2", "--n-heads", "2", "--d-model", "16", "--n-ctx", "16", "--d-vocab", "300"),
    *("--levels", "4,3,0;6,4,4", "--batch-size", "4", "--warmup", "5", "--val-tokens", "512"),
    *("--log-every", "1", "--device", "cpu", "--data"),
]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux only")


def small_corpus(folder: Path, documents: int = 60) -> Path:
    """Text files of distinct sentences, enough for both splits."""
    folder.mkdir(parents=True)
    words = "the union of these states shall endure while free people keep its laws and its peace".split()  # noqa: SIM905
    for i in range(documents):
        text = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(120))
        (folder / f"{i:03d}.txt").write_text(f"Speech {i}. {text.capitalize()}.")
    return folder


def train_command(*arguments: str, processes: int = 1) -> list[str]:
    """The command line of a run; more than one process goes through torchrun on gloo."""
    if processes == 1:
        return [sys.executable, SCRIPT, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, SCRIPT, *arguments]


def environment() -> dict[str, str]:
    """One thread a process, so that sums run in one order, and no hub."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_training(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return run(train_command(*arguments, processes=processes))


def run_molt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, MOLT_SCRIPT, *arguments])


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), cwd=ROOT)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_losses(run: Path) -> list[float]:
    return [record["train_loss"] for record in metrics(run) if "train_loss" in record]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def run_kernel_cases(folder: Path, **variables: str) -> str:
    """What pytest says of a folder's cases; Triton must be told of its interpreter before it is imported."""
    cases = sorted(map(str, folder.glob("*_cases.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_for_gpu(
    kernel: Any, types: dict[str, str], constants: dict[str, Any] | None = None, *, capability: int, warps: int = 4
) -> Any:
    """A Triton kernel as machine code of a GPU that need not be here; set TRITON_CACHE_DIR to an empty folder first."""
    import triton
    from triton.backends.compiler import GPUTarget

    constants = constants or {}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})

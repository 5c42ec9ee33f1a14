"""The kernels in a process of their own: Triton must be told of its interpreter before it is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cayley_interp.kernels import backend, set_backend, takes_triton

CASES = sorted(Path(__file__).parent.glob("*_cases.py"))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux only")


def run_cases(**variables: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, CASES)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_in_the_interpreter():
    assert "74 passed" in run_cases(TRITON_INTERPRET="1", KERNEL_DEVICE="cpu")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu():
    assert "74 passed" in run_cases(TRITON_INTERPRET="0", KERNEL_DEVICE="cuda")


def test_on_a_cpu_torch_runs_unless_told_otherwise():
    assert backend() == "auto"
    assert not takes_triton(torch.zeros(2))
    with pytest.raises(ValueError, match="backend 'cuda': expected one of auto, torch, triton"):
        set_backend("cuda")

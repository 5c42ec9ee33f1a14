"""The kernels: in Triton's interpreter, on a GPU where there is one, and which of them runs."""

from pathlib import Path

import pytest
import torch

from cayley_interp.kernels import backend, set_backend, takes_triton
from tests.helpers import needs_triton, run_kernel_cases

HERE = Path(__file__).parent


@needs_triton
def test_in_the_interpreter():
    assert "74 passed" in run_kernel_cases(HERE, TRITON_INTERPRET="1", KERNEL_DEVICE="cpu")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu():
    assert "74 passed" in run_kernel_cases(HERE, TRITON_INTERPRET="0", KERNEL_DEVICE="cuda")


def test_on_a_cpu_torch_runs_unless_told_otherwise():
    assert backend() == "auto"
    assert not takes_triton(torch.zeros(2))
    with pytest.raises(ValueError, match="backend 'cuda': expected one of auto, torch, triton"):
        set_backend("cuda")

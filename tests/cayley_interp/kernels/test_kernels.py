"""The kernels: in Triton's interpreter, on a GPU where there is one, and which of them runs."""

import importlib
from pathlib import Path

import pytest
import torch

from cayley_interp.kernels import backend, set_backend, takes_triton
from tests.helpers import compile_for_gpu, needs_triton, run_kernel_cases

HERE = Path(__file__).parent


@needs_triton
def test_in_the_interpreter():
    assert "75 passed" in run_kernel_cases(HERE, TRITON_INTERPRET="1", KERNEL_DEVICE="cpu")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu():
    assert "75 passed" in run_kernel_cases(HERE, TRITON_INTERPRET="0", KERNEL_DEVICE="cuda")


LARGEST_SHARED_MEMORY = 160 * 1024
"""Bytes of one program on an A100, less what the system keeps; on an H100 there are more."""
TYPES = {
    **dict.fromkeys(("x_pointer", "y_pointer", "f_pointer", "score_pointer"), "*fp32"),
    **dict.fromkeys(("scale_pointer", "shift_pointer", "offset_pointer"), "*fp32"),
    **dict.fromkeys(("u_pointer", "index_pointer", "open_pointer", "parent_pointer"), "*i64"),
    **dict.fromkeys(("s_pointer", "bucket_pointer"), "*i32"),
    **dict.fromkeys(("k", "n_rows", "n_open", "most", "n_parents", "shift_by", "per_parent", "depth"), "i32"),
    **dict.fromkeys(("row_stride", "stride"), "i64"),
    **dict.fromkeys(("scale", "root_d"), "fp32"),
}
LEVEL = {"by_feature": True, "has_offset": False, "signed": False}
COMPILED = [
    ("walsh", "_walsh_rows", {"d": 16, "bits": 4, "rows": 256}, 4),
    ("walsh", "_walsh_rows", {"d": 1_024, "bits": 10, "rows": 4}, 4),
    ("walsh", "_walsh_rows", {"d": 32_768, "bits": 15, "rows": 1}, 32),
    ("atoms", "_analyse", {"d": 1024}, 4),
    ("atoms", "_synthesise", {"d": 1024}, 4),
    ("selection", "_root", {"d": 1024, "bits": 10, **LEVEL}, 4),
    *(
        ("selection", "_children", {"d": 1024, "block": block, "rows": rows, **LEVEL, **rest}, warps)
        for rest in ({"n_children": 32, "bits": 5, "limited": True}, {"n_children": 32, "bits": 5, "limited": False})
        for rows, block, warps in ((16, 4, 8), (256, 1, 16))
    ),
]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("module", "name", "constants", "warps"), COMPILED, ids=str)
def test_they_compile_for_gpus(module, name, constants, warps, capability, tmp_path, monkeypatch):
    """To machine code, which needs no GPU, at the published shapes: every program fits its multiprocessor."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(importlib.import_module(f"cayley_interp.kernels.{module}"), name)
    compiled = compile_for_gpu(kernel, TYPES, constants, capability=capability, warps=warps)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= LARGEST_SHARED_MEMORY


def test_on_a_cpu_torch_runs_unless_told_otherwise():
    assert backend() == "auto"
    assert not takes_triton(torch.zeros(2))
    with pytest.raises(ValueError, match="backend 'cuda': expected one of auto, torch, triton"):
        set_backend("cuda")

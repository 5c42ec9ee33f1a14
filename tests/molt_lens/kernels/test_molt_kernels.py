"""The kernels of maps: in Triton's interpreter, compiled for GPUs, and on a GPU where there is one."""

from pathlib import Path

import pytest
import torch

from tests.helpers import compile_for_gpu, needs_triton, run_kernel_cases

HERE = Path(__file__).parent
FLOATS = {"_down": "x w h", "_up": "h gate w", "_outer": "h gate x g", "_inner": "c h s"}


@needs_triton
def test_in_the_interpreter():
    assert "27 passed, 1 skipped" in run_kernel_cases(HERE, TRITON_INTERPRET="1", KERNEL_DEVICE="cpu")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu():
    assert "28 passed" in run_kernel_cases(HERE, TRITON_INTERPRET="0", KERNEL_DEVICE="cuda")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", FLOATS)
def test_they_compile_for_gpus(name, dtype, capability, tmp_path, monkeypatch):
    """To machine code, which needs no GPU; half precision goes to tensor cores."""
    from molt_lens.kernels import grouped

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(grouped, name)
    known = {"token_pointer": "*i64", "tile_pointer": "*i64", "y_pointer": "*fp32", "d": "i32"}
    types = known | {f"{short}_pointer": f"*{dtype}" for short in FLOATS[name].split()}
    compiled = compile_for_gpu(kernel, types, capability=capability)
    assert compiled.asm["cubin"]
    assert ("mma" in compiled.asm["ptx"]) == (name != "_inner" and dtype != "fp32")

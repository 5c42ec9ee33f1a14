"""Triton kernels, each beside its torch reference, and which of the two runs.

    set_backend("torch")        # or "triton", or "auto", the default: Triton for tensors on a GPU where it is installed

`set_backend` is for the whole process; `environment.json` of a run says what it was.
"""

import importlib.util
from functools import cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

WITHOUT_TRITON = "backend 'triton' needs Triton: pip install triton (it comes with torch's CUDA build)"

_backend: Backend = "auto"


def set_backend(backend: str) -> None:
    """Of this process: auto, torch or triton.

    Raises:
        ValueError: another name.
        ImportError: Triton is asked for by name and not installed.
    """
    global _backend
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(get_args(Backend))}")
    if backend == "triton" and not has_triton():
        raise ImportError(WITHOUT_TRITON)
    _backend = cast(Backend, backend)


def backend() -> Backend:
    return _backend


def takes_triton(x: Tensor) -> bool:
    """Whether a kernel runs on this tensor; one in float64 always goes to torch."""
    if x.dtype not in DTYPES or _backend == "torch":
        return False
    return _backend == "triton" or (x.is_cuda and has_triton())


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None

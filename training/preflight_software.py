"""Preflight of what a run asks of other software: a tracker, a compiler, Triton. A message each, or None."""

import importlib.util
import os
import shutil

from cayley_interp.kernels import WITHOUT_TRITON, Backend


def missing_tracker(kind: str) -> str | None:
    """An experiment tracker that is asked for and not installed."""
    if kind == "none" or importlib.util.find_spec(kind):
        return None
    return f"--track {kind}: the package is not installed: pip install 'cayley-interp[tracking]', or use --track none"


def missing_compiler(compiler: str) -> str | None:
    """torch.compile turns a model on the CPU into C++."""
    if shutil.which(compiler):
        return None
    return (
        f"--compile on the CPU needs a C++ compiler, and there is no `{compiler}`: leave out --compile, install one "
        "(`apt install g++`), or name it in the environment variable CXX"
    )


def unusable_backend(backend: Backend, device: str, installed: bool, interpreted: bool) -> str | None:
    """Triton by name where it cannot run; `auto` and `torch` run everywhere."""
    if backend != "triton":
        return None
    if not installed:
        return f"--backend triton: {WITHOUT_TRITON}, or use --backend auto"
    if device == "cpu" and not interpreted:
        return (
            "--backend triton: Triton's kernels run on a GPU, and this run is on the CPU: use --backend auto, or "
            "--device cuda (TRITON_INTERPRET=1 runs them on a CPU, slowly: for tests)"
        )
    return None


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, as Triton itself decides it."""
    return os.environ.get("TRITON_INTERPRET") == "1"

"""Shapes annotated with jaxtyping are checked at run time, in tests only; hypothesis runs without time limits."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker and its children: threads that share one spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before anything imports the packages: the hook wraps every annotated function as its module is loaded. Not those of
# kernels/, whose source Triton reads.
OF_PACKAGES = [
    f"{package}.{path.stem}"
    for package in ("cayley_interp", "molt_lens")
    for path in (Path(__file__).parents[1] / package).glob("*.py")
]
install_import_hook([*OF_PACKAGES, "training", "analysis"], "beartype.beartype")

settings.register_profile(
    "two-cores", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("two-cores")


@pytest.fixture(autouse=True)
def denormals_are_not_flushed():
    """Training commands run in this process flush them in its threads, which hypothesis rightly refuses."""
    yield
    torch.set_flush_denormal(False)

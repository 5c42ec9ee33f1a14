"""The Walsh-Hadamard transform by each way that there is, at every length."""

from collections.abc import Callable

import torch
from torch import Tensor

from cayley_interp.kernels import set_backend
from cayley_interp.walsh import hadamard_matrix, walsh_hadamard, walsh_hadamard_reference
from tests.benchmarks.measure import DTYPES, Bound, Call, Group

NOTES = ["Walsh-Hadamard: butterflies is the textbook's loop over log2(d) passes; its bound is a copy of x."]

LENGTHS = {"cpu": (16, 128, 1_024, 8_192, 32_768), "cuda": tuple(2**bits for bits in range(4, 16))}
NUMBERS = {"cpu": 2**20, "cuda": 2**26}
"""Of one batch: of 4 MB on a processor, and more than a GPU's cache holds."""
LONGEST_PRODUCT = 1_024
"""Longest transform that is also timed as one product with the whole Hadamard matrix."""


def batch(device: str, d: int, dtype: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(NUMBERS[device] // d, d, device=device, dtype=DTYPES[dtype])


def by(transform: Callable[[Tensor], Tensor], device: str, d: int, dtype: str) -> Call:
    x = batch(device, d, dtype)
    return lambda: transform(x)


def by_product(device: str, d: int, dtype: str) -> Call:
    x = batch(device, d, dtype)
    h = hadamard_matrix(d, x.device, x.dtype)
    return lambda: x @ h


def with_backend(backend: str, device: str, d: int, dtype: str) -> Call:
    x = batch(device, d, dtype)

    def call() -> None:
        set_backend(backend)
        walsh_hadamard(x)
        set_backend("auto")

    return call


def group(device: str, d: int, dtype: str) -> Group:
    where = device, d, dtype
    cases: dict[str, Callable[[], Call]] = {"butterflies": lambda: by(walsh_hadamard_reference, *where)}
    if d <= LONGEST_PRODUCT:
        cases["one matrix product"] = lambda: by_product(*where)
    cases["walsh_hadamard, torch"] = lambda: with_backend("torch", *where)
    if device == "cuda":
        cases["walsh_hadamard, Triton"] = lambda: with_backend("triton", *where)
    n_bytes = 2 * NUMBERS[device] * DTYPES[dtype].itemsize
    return Group("Walsh-Hadamard transform", f"{NUMBERS[device] // d:,} x {d:,}", dtype, cases, Bound(bytes=n_bytes))


def groups(device: str) -> list[Group]:
    dtypes = ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32",)
    return [group(device, d, dtype) for dtype in dtypes for d in LENGTHS[device]]

"""Model FLOPs of a token and the utilisation of the device: MFU = tokens/s x FLOPs per token / peak FLOP/s.

FLOPs as PaLM's appendix B (arXiv:2204.02311) and nanoGPT count them, forward and backward: 6 for each parameter of a
matrix product, with the tied head as one and embeddings as none, and 12 n_layers d_model n_ctx for attention, whose
mask is not taken off. The arithmetic of bottlenecks is not in it: MFU compares with the same backbone without them.
"""

import statistics
import time
from typing import NamedTuple

import torch

from cayley_interp import CayleyGPTConfig
from cayley_interp.bottleneck import parse_levels

# Dense FLOP/s without sparsity: A100 data sheet (NVIDIA, 2022), H100 (2024) and H200 (2024). The first name that is
# part of the device's; a plain H100 is SXM5. fp32 is without tensor cores, and tf32 what a user may have switched on.
DATASHEET: dict[str, dict[str, float]] = {
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12},
    "H100 NVL": {"bf16": 835e12, "tf32": 417.5e12, "fp32": 60e12},
    "H100": {"bf16": 989e12, "tf32": 494.5e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "tf32": 494.5e12, "fp32": 67e12},
}
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


class Peak(NamedTuple):
    """Most FLOP/s of one process's device in a precision, and whether that is of its `datasheet` or `measured`."""

    flops: float
    source: str


def flops_per_token(model: CayleyGPTConfig) -> int:
    d = model.d_model
    products = model.n_layers * 12 * d * d + model.d_vocab * d
    return 6 * products + 12 * model.n_layers * d * model.n_ctx


def bottleneck_flops_per_token(model: CayleyGPTConfig) -> int:
    """Of all bottlenecks, forward and backward, by their definition; not a part of model FLOPs.

    Scores of the first level are one transform, d log2 d, and each candidate of a deeper one is a product with an atom,
    2 d. An active feature is three more products: into the output, and back to its value and to the input.
    """
    levels, d = parse_levels(model.levels) if model.levels else (), model.d_model
    flops = 0
    for i, level in enumerate(levels):
        if i == 0:
            flops += d * level.n
        else:
            opened = levels[i - 1].k if model.routing == "per_parent" else level.budget
            flops += 2 * d * (opened << (level.n - levels[i - 1].n))
        flops += 6 * d * level.k
    return model.n_layers * flops


def peak_flops(device: torch.device, precision: str) -> Peak:
    """Args: `precision` of the run's matrix products: fp32, bf16 or fp64."""
    if device.type == "cuda":
        if precision == "fp32" and torch.backends.cuda.matmul.allow_tf32:
            precision = "tf32"
        if (known := datasheet_flops(torch.cuda.get_device_name(device), precision)) is not None:
            return Peak(known, "datasheet")
    return Peak(measured_flops(device, DTYPES[precision]), "measured")


def datasheet_flops(name: str, precision: str) -> float | None:
    """None for a device or a precision that is not in the table."""
    return next((peaks.get(precision) for part, peaks in DATASHEET.items() if part in name), None)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the median of seven, in about a fifth of a second."""
    n = 8192 if device.type == "cuda" else 768
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)  # not the run's generator

    def seconds() -> float:
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _synchronise(device)
        return time.perf_counter() - start

    seconds()
    return 2 * n**3 / statistics.median(seconds() for _ in range(7))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

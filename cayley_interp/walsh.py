"""Walsh-Hadamard transform: y[u] = sum over x of (-1)^<u, x> x[x] / sqrt(d), in natural order along the last dimension.

The matrix is a Kronecker power of [[1, 1], [1, -1]], so a transform of length d is a few products with small Hadamard
matrices, one for each group of bits. It is symmetric and orthonormal: its own inverse, and its own gradient.
"""

from functools import lru_cache
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from cayley_interp.chunks import row_chunks
from cayley_interp.graphs import constant_in_graphs
from cayley_interp.kernels import takes_triton

# Bits handled by one matrix product. A 64 x 64 product costs more additions than six butterflies but runs at the speed
# of a matrix multiply; up to 7 bits a single product is the fastest split on a CPU.
BITS_PER_FACTOR = 7


def walsh_hadamard(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Orthonormal Walsh-Hadamard transform along the last dimension.

    Raises:
        ValueError: the last dimension is not a power of two.
    """
    _check_length(x.shape[-1])
    if takes_triton(x):
        from cayley_interp.kernels import walsh

        if x.shape[-1] <= walsh.MAX_LENGTH:
            return walsh.walsh_hadamard_triton(x)
    return _WalshHadamard.apply(x)


def walsh_hadamard_reference(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """The same by log2(d) butterflies, as in any textbook: the truth that fast paths are tested against."""
    d = x.shape[-1]
    _check_length(d)
    y, half = x, 1
    while half < d:
        pairs = y.reshape(*x.shape[:-1], d // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        half *= 2
    return y / d**0.5


def hadamard_matrix(d: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "d d"]:
    """Orthonormal Sylvester-Hadamard matrix: entry (u, x) is (-1)^<u, x> / sqrt(d)."""
    _check_length(d)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device, dtype=dtype)
    h = torch.ones(1, 1, device=device, dtype=dtype)
    while h.shape[0] < d:
        h = torch.kron(h, two)
    return h / d**0.5


class _WalshHadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ARG004
        rows = x.reshape(-1, x.shape[-1])
        chunks = row_chunks(len(rows), x.shape[-1] * x.element_size(), x.device)
        if len(chunks) <= 1 or len(_factors(x.shape[-1])) == 1:  # one product holds nothing in between
            return _by_factors(x)
        y = torch.empty_like(rows)
        for chunk in chunks:
            y[chunk] = _by_factors(rows[chunk])
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return _WalshHadamard.apply(grads[0])


_cached_hadamard = lru_cache(maxsize=64)(hadamard_matrix)


@constant_in_graphs
def _factor_matrix(d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _cached_hadamard(d, device, dtype)


def _by_factors(x: Tensor) -> Tensor:
    """Multiply each group of bits of the index by its own small Hadamard matrix, lowest bits first."""
    factors = _factors(x.shape[-1])
    y = x.contiguous()
    for i, size in enumerate(factors):
        h = _factor_matrix(size, x.device, x.dtype)
        inner = prod(factors[:i])  # the bits below this group, already transformed
        y = y.reshape(-1, size) @ h if inner == 1 else h @ y.reshape(-1, size, inner)
    return y.reshape(x.shape)


def _factors(d: int) -> list[int]:
    """d as a product of nearly equal powers of two of at most BITS_PER_FACTOR bits, lowest bits first."""
    bits = d.bit_length() - 1
    groups = max(1, -(-bits // BITS_PER_FACTOR))
    return [2 ** (bits // groups + (i < bits % groups)) for i in range(groups)]


def _check_length(d: int) -> None:
    if d < 1 or d & (d - 1):
        raise ValueError(f"the Walsh-Hadamard transform needs a length that is a power of two, got {d}")

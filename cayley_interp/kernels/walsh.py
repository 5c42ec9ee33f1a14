"""The Walsh-Hadamard transform of rows in registers: y = x H / sqrt(d), one read and one write of memory.

Each program holds some whole rows and does log2(d) butterflies on them in float32, whatever the dtype in memory.

    traffic   2 n d elements, the least possible
    bound     the time to copy x: 2 n d size / bandwidth; arithmetic, n d log2(d) additions, is far below that

A step takes neighbours (a, b) to the two halves (a + b, a - b): the index's lowest bit becomes its highest. After
log2(d) such steps every bit has been transformed and is back in its place, and all steps are the same.
Reference: `cayley_interp.walsh.walsh_hadamard_reference`.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (what is decorated is compiled by Triton and only looks like Python)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

MAX_LENGTH = 32_768
"""Of a row: 128 kB of float32 in the registers of one program, half of a multiprocessor's."""
ELEMENTS = 4_096
"""Of a program, where rows are shorter: enough loads in flight to keep memory busy."""
ELEMENTS_PER_WARP = 1_024


@triton.jit
def butterflies(values, rows: tl.constexpr, d: tl.constexpr, bits: tl.constexpr):
    """The transform of each row times sqrt(d)."""
    for _ in tl.static_range(bits):
        a, b = tl.split(tl.reshape(values, (rows, d // 2, 2)))
        values = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (rows, d))
    return values


@triton.jit
def _walsh_rows(
    x_pointer, y_pointer, n_rows, row_stride, stride, scale, d: tl.constexpr, bits: tl.constexpr, rows: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    column = tl.arange(0, d)[None, :]
    inside = row < n_rows
    values = tl.load(x_pointer + row * row_stride + column * stride, mask=inside, other=0.0).to(tl.float32)
    values = butterflies(values, rows, d, bits)
    tl.store(y_pointer + row * d + column, (values * scale).to(y_pointer.dtype.element_ty), mask=inside)


@torch.library.custom_op("cayley_interp::walsh_hadamard", mutates_args=())
def walsh_hadamard_triton(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform along the last dimension, contiguous; x may be strided.

    Raises:
        ValueError: a length that is no power of two, or above MAX_LENGTH.
    """
    d = x.shape[-1]
    if d < 1 or d & (d - 1) or d > MAX_LENGTH:
        raise ValueError(f"the Walsh-Hadamard kernel needs a length that is a power of two up to {MAX_LENGTH}, got {d}")
    rows_of = x.reshape(-1, d)  # a view where strides allow
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n = len(rows_of)
    if n == 0:
        return y
    rows = max(1, min(ELEMENTS // d, triton.next_power_of_2(n)))
    warps = max(1, min(32, rows * d // ELEMENTS_PER_WARP))
    _walsh_rows[(triton.cdiv(n, rows),)](
        rows_of,
        y,
        n,
        rows_of.stride(0),
        rows_of.stride(1),
        d**-0.5,
        d=d,
        bits=d.bit_length() - 1,
        rows=rows,
        num_warps=warps,
    )
    return y


@walsh_hadamard_triton.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward(_ctx: object, grad: Float[Tensor, "*batch d"]) -> Tensor:
    return walsh_hadamard_triton(grad)  # the transform is symmetric: it is its own adjoint


walsh_hadamard_triton.register_autograd(_backward)

"""Sparse products with atoms whose signs are parities of bits, computed where they are needed.

    analyse      f_j = sum_x x[x] (-1)^<u_j, s(x)> / sqrt(d)        for the k atoms u_j of each token
    synthesise   y[x] = sum_j f_j (-1)^<u_j, s(x)> / sqrt(d)

    traffic   n (d + 2 k) numbers: x or y once, indices and values once, no table of signs
    bound     of n k d signs, each eight integer operations on registers: above a copy of x from k of about 16 on

Each is the other's adjoint, and so the other's gradient. Reference: `cayley_interp.atoms`, by rows of two sign tables.
"""
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (what is decorated is compiled by Triton and only looks like Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_PER_WARP = 256


@triton.jit
def parity(bits):
    """1 where an odd number of the 32 bits is set."""
    bits = bits ^ (bits >> 16)
    bits = bits ^ (bits >> 8)
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    return (bits ^ (bits >> 1)) & 1


@triton.jit
def _analyse(x_pointer, u_pointer, s_pointer, f_pointer, scale, k, d: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, d)
    x = tl.load(x_pointer + token * d + column) * scale
    s = tl.load(s_pointer + column)
    for j in range(k):
        u = tl.load(u_pointer + token * k + j).to(tl.int32)
        tl.store(f_pointer + token * k + j, tl.sum(tl.where(parity(u & s) == 1, -x, x), axis=0))


@triton.jit
def _synthesise(u_pointer, f_pointer, s_pointer, y_pointer, scale, k, d: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, d)
    s = tl.load(s_pointer + column)
    y = tl.zeros((d,), tl.float32)
    for j in range(k):
        u = tl.load(u_pointer + token * k + j).to(tl.int32)
        f = tl.load(f_pointer + token * k + j)
        y += tl.where(parity(u & s) == 1, -f, f)
    tl.store(y_pointer + token * d + column, y * scale)


@torch.library.custom_op("cayley_interp::analyse", mutates_args=())
def analyse(x: Tensor, indices: Tensor, generators: Tensor) -> Tensor:
    """<x_i, D_u> for each u in indices_i, float32: x [n, d], indices [n, k] -> [n, k]."""
    n, d = x.shape
    scores = torch.empty(indices.shape, dtype=torch.float32, device=x.device)
    if scores.numel():
        _analyse[(n,)](
            x.contiguous(), indices.contiguous(), generators, scores, d**-0.5, indices.shape[1], d=d, num_warps=warps(d)
        )
    return scores


@analyse.register_fake
def _(x, indices, generators):  # noqa: ARG001
    return torch.empty(indices.shape, dtype=torch.float32, device=x.device)


@torch.library.custom_op("cayley_interp::synthesise", mutates_args=())
def synthesise(indices: Tensor, values: Tensor, generators: Tensor) -> Tensor:
    """Sum over the k columns of values_i * D_u, float32: indices and values [n, k] -> [n, d]."""
    n, k = indices.shape
    d = len(generators)
    total = torch.empty(n, d, dtype=torch.float32, device=values.device)
    if n:
        _synthesise[(n,)](
            indices.contiguous(), values.contiguous(), generators, total, d**-0.5, k, d=d, num_warps=warps(d)
        )
    return total


@synthesise.register_fake
def _(indices, values, generators):
    return torch.empty(len(indices), len(generators), dtype=torch.float32, device=values.device)


def warps(elements: int) -> int:
    """Of a program that holds so many numbers."""
    return max(1, min(16, elements // ELEMENTS_PER_WARP))

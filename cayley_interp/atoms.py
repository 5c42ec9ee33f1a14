"""Products of a batch with a few atoms per row: `analyse` takes inner products, `synthesise` takes sums.

They are adjoint, <analyse(x), f> = <x, synthesise(f)>, and each is the other's gradient, so a backward pass touches the
k active atoms of a token and no score matrix. Where a level's atoms are few enough to be kept, a product looks its rows
up; else it multiplies rows of two small sign tables, a cache-sized chunk of tokens at a time.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from cayley_interp.chunks import row_chunks
from cayley_interp.kernels import takes_triton
from cayley_interp.sign_tables import SignTables


def analyse(x: Float[Tensor, "n d"], indices: Int64[Tensor, "n k"], tables: SignTables) -> Float[Tensor, "n k"]:
    """<x_i, D_u> for each u in indices_i; differentiable in x."""
    with torch.no_grad():
        scores = _analyse(x, indices, tables)
    return attach_scores(x, indices, scores, tables)


def attach_scores(
    x: Float[Tensor, "n d"], indices: Int64[Tensor, "n k"], scores: Float[Tensor, "n k"], tables: SignTables
) -> Float[Tensor, "n k"]:
    """Scores that selection has already computed, made differentiable in x as `analyse` would have."""
    return _Analysis.apply(x, indices, scores, tables)


def synthesise(indices: Int64[Tensor, "n k"], values: Float[Tensor, "n k"], tables: SignTables) -> Float[Tensor, "n d"]:
    """Sum over the k columns of values_i * D_u; differentiable in values."""
    return _Synthesis.apply(indices, values, tables)


class _Analysis(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, indices: Tensor, scores: Tensor, tables: SignTables) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(indices)
        ctx.tables = tables
        return scores.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (indices,) = ctx.saved_tensors
        return synthesise(indices, grads[0], ctx.tables), None, None, None


class _Synthesis(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices: Tensor, values: Tensor, tables: SignTables) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.tables = tables
        return _synthesise(indices, values, tables)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (indices,) = ctx.saved_tensors
        return None, analyse(grads[0], indices, ctx.tables), None


def _analyse(x: Tensor, indices: Tensor, tables: SignTables) -> Tensor:
    if takes_triton(x) and tables.generators is not None:
        from cayley_interp.kernels import atoms

        return atoms.analyse(x, indices, tables.generators).to(x.dtype)
    scores = x.new_empty(indices.shape)
    if tables.atoms is not None:
        scores = _inner_products(x, indices, tables.atoms)
    else:
        for rows in _chunks(indices, tables):
            # Not a batched product with one column: that takes three times as long.
            torch.sum(_signs(indices[rows], tables).mul_(x[rows, None, :]), -1, out=scores[rows])
    return scores.div_(x.shape[-1] ** 0.5)


def _synthesise(indices: Tensor, values: Tensor, tables: SignTables) -> Tensor:
    if takes_triton(values) and tables.generators is not None:
        from cayley_interp.kernels import atoms

        return atoms.synthesise(indices, values, tables.generators).to(values.dtype)
    d = tables.walsh.shape[-1]
    values = values / d**0.5
    if tables.atoms is not None:
        return F.embedding_bag(indices, tables.atoms, per_sample_weights=values, mode="sum")
    total = values.new_empty(len(values), d)
    for rows in _chunks(indices, tables):
        torch.bmm(values[rows, None, :], _signs(indices[rows], tables), out=total[rows, None, :])
    return total


def _inner_products(x: Tensor, indices: Tensor, atoms: Tensor) -> Tensor:
    """<x_i, atoms[u]> for each u in indices_i: what embedding_bag does for the gradient of its weights, in one pass."""
    n, k = indices.shape
    first = torch.arange(0, n * k, k, device=x.device)
    row = torch.arange(n, device=x.device).repeat_interleave(k)
    of_sum = 0
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, atoms, indices.flatten(), first, row, of_sum)
    return found.view(n, k)


def _signs(indices: Tensor, tables: SignTables) -> Tensor:
    """The +-1 rows sqrt(d) D_u of a chunk of indices, [n, k, d]."""
    n, k = indices.shape
    d = tables.walsh.shape[-1]
    u = indices.flatten()
    signs = tables.walsh.index_select(0, u & (d - 1))
    signs *= tables.patterns.index_select(0, u >> (d.bit_length() - 1))
    return signs.view(n, k, d)


def _chunks(indices: Tensor, tables: SignTables) -> list[slice]:
    atoms_bytes = indices.shape[-1] * tables.walsh.shape[-1] * tables.walsh.element_size()
    return row_chunks(len(indices), atoms_bytes, indices.device)

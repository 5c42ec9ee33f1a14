"""Which leaves a token may use, and which it does: scores of the children of open parents, and the k best of them.

Nothing here is differentiable: it picks indices. `bottleneck.py` says what is then done with them.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cayley_interp.chunks import row_chunks
from cayley_interp.dictionary import CayleyDictionary
from cayley_interp.kernels import takes_triton
from cayley_interp.sign_tables import ChildTables, SignTables, child_tables, sign_tables
from cayley_interp.walsh import walsh_hadamard


class Standardiser(NamedTuple):
    """z = scale * s + shift (+ offset): scale is per feature or per token, shift per feature, offset per token."""

    scale: Float[Tensor, "#n #size"]
    shift: Float[Tensor, "1 size"]
    offset: Float[Tensor, "n 1"] | None = None

    def z(self, scores: Float[Tensor, "n k"], indices: Int64[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """z of the given features; differentiable in scores and in whatever the fields were made from."""
        scale = _at(self.scale, indices) if self.scale.shape[1] > 1 else self.scale
        z = scores * scale + _at(self.shift, indices)
        return z if self.offset is None else z + self.offset


class Selection(NamedTuple):
    indices: Int64[Tensor, "n k"]
    scores: Float[Tensor, "n k"]
    open: Int64[Tensor, "n p"]
    """Features whose children are candidates at the next level."""


def select_root(
    x: Float[Tensor, "n d"], standardiser: Standardiser, k: int, open_next: int | None, signed: bool
) -> Selection:
    """The k best of the whole Walsh basis; `open_next` best-scoring parents open (None: the active ones)."""
    if takes_triton(x):
        from cayley_interp.kernels import selection

        best, scores, opened = selection.root(x, *standardiser, k, open_next or 0, signed)
        return Selection(best, scores, best if open_next is None else opened)
    scores = walsh_hadamard(x)
    keys = torch.addcmul(standardiser.shift, scores, standardiser.scale)
    if standardiser.offset is not None:
        keys += standardiser.offset
    if signed:
        keys.abs_()
    best = keys.topk(k, sorted=False).indices
    opened = best if open_next is None else keys.topk(open_next, sorted=False).indices
    return Selection(best, scores.gather(-1, best), opened)


def select_children(
    x: Float[Tensor, "n d"],
    parents: Int64[Tensor, "n p"],
    n_parent: int,
    n: int,
    dictionary: CayleyDictionary,
    standardiser: Standardiser,
    *,
    k: int,
    per_parent: int | None,
    open_next: int | None,
    signed: bool,
) -> Selection:
    """The k best children, at level n, of the open parents, at most `per_parent` of each; in chunks of tokens."""
    n_children = 1 << (n - n_parent)
    tables = sign_tables(dictionary, n, x.device, x.dtype)
    by_bucket = child_tables(dictionary, n_parent, n, x.device, x.dtype)
    if takes_triton(x) and tables.generators is not None:
        from cayley_interp.kernels import selection

        if selection.fits(parents.shape[-1], n_children):
            signs, most = (tables.generators, by_bucket.buckets), n_children if per_parent is None else per_parent
            best, scores, opened = selection.children(
                x, parents, n_parent, *signs, *standardiser, k, most, open_next or 0, signed
            )
            return Selection(best, scores, best if open_next is None else opened)
    scale, shift = (_by_parent(a, n_parent) for a in standardiser[:2])
    parts = []
    for rows in _chunks(parents, n_children, tables):
        opened = parents[rows]
        scores = child_scores(x[rows], opened, n_parent, tables, by_bucket)
        keys = torch.addcmul(_of_parents(shift, opened, rows), scores, _of_parents(scale, opened, rows))
        if standardiser.offset is not None:
            keys += standardiser.offset[rows, :, None]
        if signed:
            keys.abs_()
        if per_parent is not None and per_parent < n_children:
            allowed = torch.zeros_like(keys, dtype=torch.bool)
            allowed.scatter_(-1, keys.topk(per_parent, sorted=False).indices, True)
            keys.masked_fill_(~allowed, -torch.inf)
        keys, scores = keys.flatten(1), scores.flatten(1)
        best = keys.topk(k, sorted=False).indices
        indices = _child_index(opened, best, n_children, n_parent)
        next_open = indices
        if open_next is not None:
            wide = keys.topk(open_next, sorted=False).indices
            next_open = _child_index(opened, wide, n_children, n_parent)
        parts.append(Selection(indices, scores.gather(-1, best), next_open))
    return Selection(*(torch.cat(column) for column in zip(*parts, strict=True)))


def child_scores(
    x: Float[Tensor, "n d"], parents: Int64[Tensor, "n p"], n_parent: int, tables: SignTables, by_bucket: ChildTables
) -> Float[Tensor, "n p c"]:
    """<x, D_u> for every child u = a | c << n_parent of each open parent a.

    Either bucketed sums for each open parent, or one transform per sign pattern of the whole level: whichever is fewer.
    """
    if parents.shape[-1] <= len(tables.patterns):
        return child_scores_by_bucket(x, parents, by_bucket)
    return child_scores_by_transform(x, parents, n_parent, tables)


def child_scores_by_bucket(
    x: Float[Tensor, "n d"], parents: Int64[Tensor, "n p"], tables: ChildTables
) -> Float[Tensor, "n p c"]:
    """D_a * x summed over the coordinates whose child bits agree, then a transform over child bits."""
    n, p = parents.shape
    d, places = tables.walsh.shape
    a = parents.flatten()
    products = tables.walsh.index_select(0, a & (d - 1))
    if len(tables.patterns) > 1:
        products *= tables.patterns.index_select(0, a >> (d.bit_length() - 1))
    products.view(n, p, places).mul_(x.index_select(-1, tables.order)[:, None, :])
    sums = products.view(n * p, -1, len(tables.transform)).sum(1)
    return (sums @ tables.transform).view(n, p, -1)


def child_scores_by_transform(
    x: Float[Tensor, "n d"], parents: Int64[Tensor, "n p"], n_parent: int, tables: SignTables
) -> Float[Tensor, "n p c"]:
    level = walsh_hadamard(x[:, None, :] * tables.patterns)  # [n, patterns, d]: score of a | b << t at [b, a]
    n_children = level[0].numel() >> n_parent
    children = parents[:, :, None] | (torch.arange(n_children, device=x.device) << n_parent)
    return level.flatten(1).gather(-1, children.flatten(1)).view(children.shape)


def _at(a: Float[Tensor, "1 size"], indices: Int64[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """a[0][indices]; but of that expression threads of a CPU add up the gradient in whatever order they arrive."""
    return a[0].index_select(0, indices.flatten()).view(indices.shape)


def _by_parent(a: Tensor, n_parent: int) -> Tensor:
    """A row of per-feature numbers as a [parents, children] table, so that a parent's children are one row."""
    return a.view(-1, 1 << n_parent).T.contiguous() if a.shape[1] > 1 else a


def _of_parents(a: Tensor, parents: Tensor, rows: slice) -> Tensor:
    """Numbers of the children of each open parent, [n, p, c], or the tokens' own, [n, 1, 1]."""
    if a.shape[1] > 1:
        return a.index_select(0, parents.flatten()).view(*parents.shape, -1)
    return (a if len(a) == 1 else a[rows])[:, None, :]


def _child_index(parents: Tensor, flat: Tensor, n_children: int, n_parent: int) -> Tensor:
    return parents.gather(-1, flat // n_children) | (flat % n_children << n_parent)


def _chunks(parents: Tensor, n_children: int, tables: SignTables) -> list[slice]:
    n, p = parents.shape
    n_patterns, d = tables.patterns.shape
    floats = max(p * n_children, min(p, n_patterns) * d)
    return row_chunks(n, floats * tables.walsh.element_size() // 2, parents.device)

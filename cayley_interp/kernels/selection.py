"""Which features a token selects, level by level; scores stay in registers, indices and scores of the k best go out.

    root       scores = WHT(x); z = scores * scale + shift; the k largest
    children   for the P open parents a and C children c of each, u = a | c << m:
               score = sum_h (-1)^<c, h> sum_{x: s(x) >> m = h} x[x] (-1)^<a, s(x)>: sums over the coordinates of each
               bucket h, their signs parities made on the spot, and a transform of length C; then z, the best per
               parent, the k largest

    traffic   n (d + 3 k) numbers and the statistics of the candidates: 2^n scores are never written
    bound     a copy of x; children also P (d + C log2 C) additions a token, each beside the eight integer operations of
              a parity: at d = 1024, P = 16, C = 32 18,944 additions where the whole level is 33 million multiply-adds

One program a token. Reference: `cayley_interp.routing`. Of features that tie at the last place the kernel takes the
first, torch any; of children that tie at the last place of a parent the kernel takes all.
"""
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# (what is decorated is compiled by Triton and only looks like Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from cayley_interp.kernels.atoms import parity, warps
from cayley_interp.kernels.walsh import butterflies

SIGNS = 2_048
"""Made at a time by one program, where a token has fewer candidates."""
MOST_CANDIDATES = 16_384
"""Of a token, in the registers of one program."""


@triton.jit
def _take(
    keys, scores, features, index_pointer, score_pointer, open_pointer, token, k, n_open, most, size: tl.constexpr
):
    """The `most` largest keys, one by one: k of them selected, n_open opened."""
    place = tl.arange(0, size)
    for j in range(most):
        at = tl.argmax(keys, axis=0)
        here = place == at
        feature = tl.sum(tl.where(here, features, 0), axis=0)
        if j < k:
            tl.store(index_pointer + token * k + j, feature.to(tl.int64))
            tl.store(score_pointer + token * k + j, tl.sum(tl.where(here, scores, 0.0), axis=0))
        if j < n_open:
            tl.store(open_pointer + token * n_open + j, feature.to(tl.int64))
        keys = tl.where(here, float("-inf"), keys)


@triton.jit
def _keys(
    scores, features, scale_pointer, shift_pointer, offset_pointer, token,
    by_feature: tl.constexpr, has_offset: tl.constexpr, signed: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_pointer + features) if by_feature else tl.load(scale_pointer + token * has_offset)
    keys = scores * scale + tl.load(shift_pointer + features)
    if has_offset:
        keys += tl.load(offset_pointer + token)
    return tl.abs(keys) if signed else keys


@triton.jit
def _root(
    x_pointer, scale_pointer, shift_pointer, offset_pointer, index_pointer, score_pointer, open_pointer,
    root_d, k, n_open, most,
    d: tl.constexpr, bits: tl.constexpr, by_feature: tl.constexpr, has_offset: tl.constexpr, signed: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, d)
    x = tl.load(x_pointer + token * d + features)
    scores = tl.reshape(butterflies(tl.reshape(x, (1, d)), 1, d, bits), (d,)) * root_d
    keys = _keys(scores, features, scale_pointer, shift_pointer, offset_pointer, token, by_feature, has_offset, signed)
    _take(keys, scores, features, index_pointer, score_pointer, open_pointer, token, k, n_open, most, d)


@triton.jit
def _children(
    x_pointer, s_pointer, bucket_pointer, parent_pointer, scale_pointer, shift_pointer, offset_pointer,
    index_pointer, score_pointer, open_pointer,
    root_d, n_parents, shift_by, k, n_open, most, per_parent, depth,
    d: tl.constexpr, block: tl.constexpr, rows: tl.constexpr, n_children: tl.constexpr, bits: tl.constexpr,
    by_feature: tl.constexpr, has_offset: tl.constexpr, signed: tl.constexpr, limited: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, child = tl.arange(0, rows), tl.arange(0, n_children)
    parents = tl.load(parent_pointer + token * n_parents + row, mask=row < n_parents, other=0).to(tl.int32)
    sums = tl.zeros((rows, n_children), tl.float32)
    for start in range(0, depth, block):
        place = start + tl.arange(0, block)[:, None]
        coordinate = tl.load(bucket_pointer + place * n_children + child[None, :], mask=place < depth, other=-1)
        x = tl.load(x_pointer + token * d + coordinate, mask=coordinate >= 0, other=0.0)[None, :, :]
        s = tl.load(s_pointer + coordinate, mask=coordinate >= 0, other=0)[None, :, :]
        sums += tl.sum(tl.where(parity(parents[:, None, None] & s) == 1, -x, x), axis=1)
    scores = butterflies(sums, rows, n_children, bits) * root_d
    known = (row[:, None] < n_parents) & (child[None, :] >= 0)
    features = tl.where(known, parents[:, None] | (child[None, :] << shift_by), 0)
    keys = _keys(scores, features, scale_pointer, shift_pointer, offset_pointer, token, by_feature, has_offset, signed)
    keys = tl.where(known, keys, float("-inf"))
    if limited:
        ranked = tl.sort(keys, dim=1, descending=True)
        least = tl.sum(tl.where(child[None, :] == per_parent - 1, ranked, 0.0), axis=1)
        keys = tl.where(keys >= least[:, None], keys, float("-inf"))
    size: tl.constexpr = rows * n_children
    keys, scores, features = tl.reshape(keys, (size,)), tl.reshape(scores, (size,)), tl.reshape(features, (size,))
    _take(keys, scores, features, index_pointer, score_pointer, open_pointer, token, k, n_open, most, size)


@torch.library.custom_op("cayley_interp::select_root", mutates_args=())
def root(
    x: Tensor, scale: Tensor, shift: Tensor, offset: Tensor | None, k: int, n_open: int, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and scores of the k best of the Walsh basis, and the indices of the n_open best.

    x [n, d]; scale, shift, offset as in `cayley_interp.routing.Standardiser` -> [n, k], [n, k], [n, n_open].
    """
    n, d = x.shape
    out = _outputs(x, k, n_open)
    if n:
        _root[(n,)](
            x.contiguous(), *_standardiser(scale, shift, offset), *out, d**-0.5, k, n_open, max(k, n_open),
            d=d, bits=d.bit_length() - 1, by_feature=scale.shape[1] > 1, has_offset=offset is not None, signed=signed,
            num_warps=warps(d),
        )  # fmt: skip
    return out


@root.register_fake
def _(x, scale, shift, offset, k, n_open, signed):  # noqa: ARG001
    return _outputs(x, k, n_open)


@torch.library.custom_op("cayley_interp::select_children", mutates_args=())
def children(
    x: Tensor, parents: Tensor, n_parent: int, generators: Tensor, buckets: Tensor,
    scale: Tensor, shift: Tensor, offset: Tensor | None, k: int, per_parent: int, n_open: int, signed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same of the children of the open parents, at most `per_parent` of each.

    x [n, d]; parents [n, p], of a level of 2^n_parent features; generators [d]; buckets [depth, child] as in
    `cayley_interp.sign_tables.ChildTables` -> [n, k], [n, k], [n, n_open].
    """
    n, d = x.shape
    depth, n_children = buckets.shape
    rows = triton.next_power_of_2(parents.shape[1])
    out = _outputs(x, k, n_open)
    if n:
        _children[(n,)](
            x.contiguous(), generators, buckets, parents.contiguous(), *_standardiser(scale, shift, offset), *out,
            d**-0.5, parents.shape[1], n_parent, k, n_open, max(k, n_open), per_parent, depth,
            d=d, block=max(1, SIGNS // (rows * n_children)), rows=rows, n_children=n_children,
            bits=n_children.bit_length() - 1, by_feature=scale.shape[1] > 1, has_offset=offset is not None,
            signed=signed, limited=per_parent < n_children, num_warps=warps(max(SIGNS, rows * n_children)),
        )  # fmt: skip
    return out


@children.register_fake
def _(x, parents, n_parent, generators, buckets, scale, shift, offset, k, per_parent, n_open, signed):  # noqa: ARG001
    return _outputs(x, k, n_open)


def fits(n_parents: int, n_children: int) -> bool:
    """Whether one program holds a token's candidates."""
    return triton.next_power_of_2(n_parents) * n_children <= MOST_CANDIDATES


def _outputs(x: Tensor, k: int, n_open: int) -> tuple[Tensor, Tensor, Tensor]:
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    return indices, torch.empty_like(indices, dtype=torch.float32), indices.new_empty(len(x), n_open)


def _standardiser(scale: Tensor, shift: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return scale.contiguous(), shift.contiguous(), scale if offset is None else offset.contiguous()

"""Active-only MOLTs by grouped matrix products: only reachable (token, transform) pairs are computed, both ways.

    down    h[p, r] = sum_d x[token(p), d] W_t[r, d]            for each pair p of a transform t, and each r < rank(t)
    up      y[token(p), d] += a[p] sum_r h[p, r] W_t[r, d]
    outer   G_t[r, d] = sum_p a[p] h[p, r] x[token(p), d]       over the pairs of t; 0 where it has none
    inner   s[p] = sum_r c[p, r] h[p, r]

    forward     h = down(x, V); y = up(h, U)
    backward    c = down(grad_y, U); grad_a = inner(c, h); grad_x = up(c, V); grad_U = outer(h, grad_y);
                grad_V = outer(c, x)

Pairs are sorted by transform, latents lie row after row: P pairs hold L = sum_p rank(t(p)) of them. A tile is a block
of one transform's pairs by a block of its ranks or of coordinates, in outer a block of ranks by one of coordinates.
Each loads its transform's numbers from a table of tiles, which torch makes on the device: the host learns P and L, in
one transfer, and nothing else.

    traffic   down: a pair's row of x for each of its blocks of ranks, W_t for each block of pairs, L written
              up: L for each block of coordinates, W_t for each block of pairs, P d float32 added
              outer: L for each block of coordinates, a pair's row of x for each block of ranks, G written once
    bound     2 L d operations a product, two forward and three or four backward, where transforms have pairs enough
              for a block; with few, the bytes of U and V

Sums are in float32 and go to memory in the inputs' dtype, but for y. `up` adds atomically, in no fixed order, as
index_add_ does on a GPU: its last bits differ from run to run. Reference: `molt_lens.transforms`.
"""
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportIncompatibleMethodOverride=false
# (what is decorated is compiled by Triton and only looks like Python)

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Sides of tiles. Not tuned: no GPU has run them. A transform has few pairs where many share a batch.
PAIRS = tl.constexpr(32)
RANKS = tl.constexpr(64)
COORDINATES = tl.constexpr(64)
DEPTH = tl.constexpr(32)
"""Of one step of a sum."""


@triton.jit
def _tile(pointer):
    """A row of a table of tiles."""
    row = pointer + tl.program_id(0) * 6
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)


@triton.jit
def _gated(latents, gates):
    """Rounded as torch rounds the product."""
    return (latents.to(tl.float32) * gates.to(tl.float32)).to(latents.dtype)


@triton.jit
def _down(x_pointer, token_pointer, w_pointer, h_pointer, tile_pointer, d):
    pair, pairs, latent, rank, row, _ = _tile(tile_pointer)
    if tl.program_id(1) * RANKS >= rank:
        return
    i = tl.arange(0, PAIRS)[:, None]
    r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)[None, :]
    tokens = tl.load(token_pointer + pair + i, mask=i < pairs, other=0)
    total = tl.zeros((PAIRS, RANKS), tl.float32)
    for start in range(0, d, DEPTH):
        across, along = start + tl.arange(0, DEPTH)[None, :], start + tl.arange(0, DEPTH)[:, None]
        x = tl.load(x_pointer + tokens * d + across, mask=(i < pairs) & (across < d), other=0.0)
        w = tl.load(w_pointer + (row + r) * d + along, mask=(r < rank) & (along < d), other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    h = total.to(h_pointer.dtype.element_ty)
    tl.store(h_pointer + latent + i * rank + r, h, mask=(i < pairs) & (r < rank))


@triton.jit
def _up(h_pointer, gate_pointer, token_pointer, w_pointer, y_pointer, tile_pointer, d):
    pair, pairs, latent, rank, row, _ = _tile(tile_pointer)
    if pairs == 0:
        return
    i = tl.arange(0, PAIRS)[:, None]
    column = tl.program_id(1) * COORDINATES + tl.arange(0, COORDINATES)[None, :]
    tokens = tl.load(token_pointer + pair + i, mask=i < pairs, other=0)
    gates = tl.load(gate_pointer + pair + i, mask=i < pairs, other=0.0)
    total = tl.zeros((PAIRS, COORDINATES), tl.float32)
    for start in range(0, rank, DEPTH):
        across, along = start + tl.arange(0, DEPTH)[None, :], start + tl.arange(0, DEPTH)[:, None]
        h = tl.load(h_pointer + latent + i * rank + across, mask=(i < pairs) & (across < rank), other=0.0)
        w = tl.load(w_pointer + (row + along) * d + column, mask=(along < rank) & (column < d), other=0.0)
        total = tl.dot(_gated(h, gates), w, total, input_precision="ieee")
    tl.atomic_add(y_pointer + tokens * d + column, total, mask=(i < pairs) & (column < d), sem="relaxed")


@triton.jit
def _outer(h_pointer, gate_pointer, x_pointer, token_pointer, g_pointer, tile_pointer, d):
    pair, pairs, latent, rank, row, first = _tile(tile_pointer)
    r = first + tl.arange(0, RANKS)[:, None]
    column = tl.program_id(1) * COORDINATES + tl.arange(0, COORDINATES)[None, :]
    total = tl.zeros((RANKS, COORDINATES), tl.float32)
    for start in range(0, pairs, DEPTH):
        across, along = start + tl.arange(0, DEPTH)[None, :], start + tl.arange(0, DEPTH)[:, None]
        gates = tl.load(gate_pointer + pair + across, mask=across < pairs, other=0.0)
        h = tl.load(h_pointer + latent + across * rank + r, mask=(across < pairs) & (r < rank), other=0.0)
        tokens = tl.load(token_pointer + pair + along, mask=along < pairs, other=0)
        x = tl.load(x_pointer + tokens * d + column, mask=(along < pairs) & (column < d), other=0.0)
        total = tl.dot(_gated(h, gates), x, total, input_precision="ieee")
    g = total.to(g_pointer.dtype.element_ty)
    tl.store(g_pointer + (row + r) * d + column, g, mask=(r < rank) & (column < d))


@triton.jit
def _inner(c_pointer, h_pointer, s_pointer, tile_pointer):
    pair, pairs, latent, rank, _, _ = _tile(tile_pointer)
    i = tl.arange(0, PAIRS)
    total = tl.zeros((PAIRS,), tl.float32)
    for start in range(0, rank, DEPTH):
        r = start + tl.arange(0, DEPTH)[None, :]
        inside = (i[:, None] < pairs) & (r < rank)
        c = tl.load(c_pointer + latent + i[:, None] * rank + r, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_pointer + latent + i[:, None] * rank + r, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(c * h, axis=1)
    tl.store(s_pointer + pair + i, total.to(s_pointer.dtype.element_ty), mask=i < pairs)


class Pairs(NamedTuple):
    """Reachable pairs, sorted by transform, and the tiles that cover them.

    A row of a table is a tile: its first pair, its number of pairs, its first latent, the rank of its transform, that
    transform's first row of U and V, and the tile's first rank.
    """

    units: Int64[Tensor, " pair"]
    tokens: Int64[Tensor, " pair"]
    of_pairs: Int64[Tensor, "tile 6"]
    """A block of one transform's pairs each, with all its ranks; the table ends with tiles of no pairs and rank 0."""
    of_ranks: Int64[Tensor, "block 6"]
    """A block of one transform's ranks each, with all its pairs."""
    n_latents: int
    most_ranks: int


def pairs_of(reachable: Bool[Tensor, "token unit"], ranks: tuple[int, ...]) -> Pairs:
    """The host waits for two numbers, how many pairs there are and how many latents."""
    rank, row, transform_of_block, first_of_block = _blocks_of_ranks(ranks, reachable.device)
    count = reachable.sum(0)
    n_pairs, n_latents = torch.stack([count.sum(), (count * rank).sum()]).tolist()
    units, tokens = torch.nonzero_static(reachable.T, size=n_pairs).unbind(1)
    first_pair, first_latent = count.cumsum(0) - count, (count * rank).cumsum(0) - count * rank
    of_transforms = torch.stack([first_pair, count, first_latent, rank, row, torch.zeros_like(row)], dim=1)
    of_ranks = of_transforms[transform_of_block]
    of_ranks[:, 5] = first_of_block

    # The last block of a transform may be short: as many blocks as if none were, and one more for each with pairs.
    size = PAIRS.value
    blocks = (count + size - 1) // size
    ends = blocks.cumsum(0)
    number = torch.arange(triton.cdiv(n_pairs, size) + min(n_pairs, len(ranks)), device=reachable.device)
    transform = torch.searchsorted(ends, number, right=True)  # that is len(ranks) where no block is left
    ahead = size * (number - nn.functional.pad(ends - blocks, (0, 1))[transform])
    of_pairs = nn.functional.pad(of_transforms, (0, 0, 0, 1))[transform]
    of_pairs[:, 0] += ahead
    of_pairs[:, 1] = (of_pairs[:, 1] - ahead).clamp(0, size)
    of_pairs[:, 2] += ahead * of_pairs[:, 3]
    return Pairs(units, tokens.contiguous(), of_pairs, of_ranks, n_latents, max(ranks))


@lru_cache(maxsize=16)
def _blocks_of_ranks(ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of transforms: rank and first row. Of blocks of their ranks: transform and first rank. Copied to a GPU once."""
    rank = torch.tensor(ranks)
    blocks = (rank + RANKS.value - 1) // RANKS.value
    transform = torch.arange(len(ranks)).repeat_interleave(blocks)
    first = RANKS.value * (torch.arange(len(transform)) - (blocks.cumsum(0) - blocks)[transform])
    return rank.to(device), (rank.cumsum(0) - rank).to(device), transform.to(device), first.to(device)


def down(x: Float[Tensor, "token d"], W: Float[Tensor, "row d"], pairs: Pairs) -> Float[Tensor, " latent"]:
    h = x.new_empty(pairs.n_latents)
    d = x.shape[1]
    if len(pairs.of_pairs):
        grid = (len(pairs.of_pairs), triton.cdiv(pairs.most_ranks, RANKS.value))
        _down[grid](x, pairs.tokens, W, h, pairs.of_pairs, d)
    return h


def up(
    h: Float[Tensor, " latent"],
    gates: Float[Tensor, " pair"],
    W: Float[Tensor, "row d"],
    pairs: Pairs,
    n_tokens: int,
) -> Float[Tensor, "token d"]:
    """In float32."""
    d = W.shape[1]
    y = torch.zeros(n_tokens, d, dtype=torch.float32, device=h.device)
    if len(pairs.of_pairs):
        grid = (len(pairs.of_pairs), triton.cdiv(d, COORDINATES.value))
        _up[grid](h, gates, pairs.tokens, W, y, pairs.of_pairs, d)
    return y


def outer(
    h: Float[Tensor, " latent"],
    gates: Float[Tensor, " pair"],
    x: Float[Tensor, "token d"],
    pairs: Pairs,
    n_rows: int,
) -> Float[Tensor, "row d"]:
    d = x.shape[1]
    G = x.new_empty(n_rows, d)
    grid = (len(pairs.of_ranks), triton.cdiv(d, COORDINATES.value))
    _outer[grid](h, gates, x, pairs.tokens, G, pairs.of_ranks, d)
    return G


def inner(c: Float[Tensor, " latent"], h: Float[Tensor, " latent"], pairs: Pairs) -> Float[Tensor, " pair"]:
    s = h.new_empty(len(pairs.tokens))
    if len(pairs.of_pairs):
        _inner[(len(pairs.of_pairs),)](c, h, s, pairs.of_pairs)
    return s


def grouped_transforms(
    acts: Float[Tensor, "token unit"],
    x: Float[Tensor, "token d_in"],
    U: Float[Tensor, "row d_out"],
    V: Float[Tensor, "row d_in"],
    ranks: list[int],
    reachable: Bool[Tensor, "token unit"],
) -> Float[Tensor, "token d_out"]:
    """sum_t g_t U_t V_t x over the reachable pairs, float32; all inputs in one dtype."""
    return _GroupedTransforms.apply(acts, x.contiguous(), U.contiguous(), V.contiguous(), ranks, reachable)


class _GroupedTransforms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, acts, x, U, V, ranks, reachable):
        pairs = pairs_of(reachable, tuple(ranks))
        gates = acts[pairs.tokens, pairs.units]
        h = down(x, V, pairs)
        ctx.save_for_backward(x, U, V, gates, h)
        ctx.pairs, ctx.acts_shape = pairs, acts.shape
        return up(h, gates, U, pairs, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, U, V, gates, h = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        grad_y = grads[0].to(x.dtype).contiguous()
        c = down(grad_y, U, pairs)
        grad_acts = gates.new_zeros(ctx.acts_shape)
        grad_acts[pairs.tokens, pairs.units] = inner(c, h, pairs)
        grad_x = up(c, gates, V, pairs, len(x)).to(x.dtype) if ctx.needs_input_grad[1] else None
        return (
            grad_acts, grad_x, outer(h, gates, grad_y, pairs, len(U)), outer(c, gates, x, pairs, len(V)), None, None
        )  # fmt: skip

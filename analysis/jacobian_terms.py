"""Jacobians of many tokens as sums of static factors and dyads, and their inner products without a matrix per token.

Here the Jacobian of every map at a token is

    J = sum_i c_i w_i r_i^T + sum_j p_j q_j^T

with writes w_i [d_out] and reads r_i [d_in] that no token changes, coefficients c that they do, and a few dyads (p, q)
that are the token's own. Hence

    <J, J'> = c^T ((W W'^T) * (R R'^T)) c' + sum_j' p_j' . J_static q_j' + sum_j p_j . J'_static q_j
              + sum_jj' (p_j . p_j')(q_j . q_j'),

where the kernel, the first bracket, is made once. Dyads that are sums over a few open rows of static factors, as those
of a MOLT are, have a kernel with other static factors too, of whose rows each token meets its own. A map whose
outputs a token scales, diag(l) sum_i c_i w_i r_i^T, has none: `row_products` takes its rows a few at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

NUMBERS_AT_A_TIME = 2**23
"""Size of the largest temporary tensor: 64 MiB in float64."""

TRIANGLE_ROWS = 256
"""Rows of a symmetric kernel that are kept whole; left of them it is not kept."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The static part of a map's Jacobian, sum_i c_i w_i r_i^T.

    Attributes:
        writes: w_i as rows.
        reads: r_i as rows; twice as many as `writes` where each is written by two branches, as in a gated MLP.
        ranks: how many rows in a row share a coefficient, as those of a MOLT's transform do; None: each has its own.
    """

    writes: Float[Tensor, "row d_out"]
    reads: Float[Tensor, "branch_row d_in"]
    ranks: tuple[int, ...] | None = None

    @property
    def n_units(self) -> int:
        """Number of coefficients."""
        return len(self.reads) if self.ranks is None else len(self.ranks)

    def row_coefficients(self, c: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch branch_row"]:
        """A coefficient for each row of `reads`."""
        if self.ranks is None:
            return c
        return c.repeat_interleave(torch.tensor(self.ranks, device=c.device), dim=-1, output_size=len(self.reads))

    def apply(self, c: Float[Tensor, "pair branch_row"], v: Float[Tensor, "pair d_in"]) -> Float[Tensor, "pair d_out"]:
        """sum_i c_i w_i (r_i . v), for factors without ranks."""
        return self._over_branches((v @ self.reads.T).mul_(c)) @ self.writes

    def pairing(
        self, c: Float[Tensor, "pair unit"], p: Float[Tensor, "pair d_out"], q: Float[Tensor, "pair d_in"]
    ) -> Float[Tensor, " pair"]:
        """sum_i c_i (w_i . p)(r_i . q); of units with ranks, for the open ones only."""
        if self.ranks is None:
            return (self._over_branches((q @ self.reads.T).mul_(c)) * (p @ self.writes.T)).sum(-1)
        total, start = p.new_zeros(len(p)), 0
        for unit, rank in enumerate(self.ranks):
            pairs, rows = c[:, unit].nonzero()[:, 0], slice(start, start + rank)
            if len(pairs):
                along = ((p[pairs] @ self.writes[rows].T) * (q[pairs] @ self.reads[rows].T)).sum(-1)
                total.index_add_(0, pairs, c[pairs, unit] * along)
            start += rank
        return total

    def _over_branches(self, rows: Float[Tensor, "*batch branch_row"]) -> Float[Tensor, "*batch row"]:
        return rows.unflatten(-1, (-1, len(self.writes))).sum(-2)

    def read_back(
        self, c: Float[Tensor, "token branch_row"], u: Float[Tensor, "token d_out"]
    ) -> Float[Tensor, "token d_in"]:
        """sum_i c_i r_i (w_i . u), for factors without ranks."""
        written = c.unflatten(-1, (-1, len(self.writes))) * (u @ self.writes.T)[..., None, :]
        return written.flatten(-2) @ self.reads


@dataclass(frozen=True, eq=False)
class Dyads:
    """sum_j p_j q_j^T, the token's own; a row that is not present is 0 in both."""

    writes: Float[Tensor, "token dyad d_out"]
    reads: Float[Tensor, "token dyad d_in"]
    present: Bool[Tensor, "token dyad"]
    rows: "OpenRows | None" = None
    """The same sum over rows of static factors, where it is one."""


class OpenGroup(NamedTuple):
    """Tokens at which the same rows are open, and their coefficients there."""

    tokens: Int64[Tensor, " pair"]
    rows: slice
    c: Float[Tensor, "pair row"]


@dataclass(frozen=True, eq=False)
class OpenRows:
    """sum_i c_i w_i r_i^T over a few rows at each token, of factors without ranks."""

    factors: Factors
    groups: list[OpenGroup]


@dataclass(frozen=True, eq=False)
class Term:
    """diag(row_scale) sum_i c_i w_i r_i^T; no scale where it is None."""

    factors: Factors
    c: Float[Tensor, "token unit"]
    row_scale: Float[Tensor, "token d_out"] | None = None


@dataclass(frozen=True, eq=False)
class Jacobians:
    """The Jacobian of one map at each token of a block."""

    n_tokens: int
    terms: list[Term] = field(default_factory=list)
    dyads: list[Dyads] = field(default_factory=list)

    @property
    def has_row_scale(self) -> bool:
        return any(term.row_scale is not None for term in self.terms)


class Kernels:
    """The static matrices of pairs of factors, made when first asked for and kept.

    Of r coefficients with r' others r r' numbers; with themselves about r^2 / 2, for a symmetric kernel is kept as its
    upper triangle.
    """

    def __init__(self):
        self._pairs: dict[tuple[int, int], Tensor] = {}
        self._triangles: dict[int, list[Tensor]] = {}
        self._alive: dict[int, object] = {}  # so that no id is given to another object

    def bilinear(self, one: Term, other: Term) -> Float[Tensor, " token"]:
        """Inner products of two terms, token by token."""
        if (id(other.factors), id(one.factors)) in self._pairs:
            return self.bilinear(other, one)
        kernel = self._pair(one.factors, other.factors)
        if kernel.shape[0] < kernel.shape[1]:
            return ((one.c @ kernel) * other.c).sum(-1)
        return ((other.c @ kernel.T) * one.c).sum(-1)

    def with_rows(self, term: Term, opened: OpenRows) -> Float[Tensor, " token"]:
        """Inner products of a term with open rows: of the kernel each token meets its own."""
        kernel = self._pair(opened.factors, term.factors)
        total = term.c.new_zeros(len(term.c))
        for tokens, rows, c in opened.groups:
            total.index_add_(0, tokens, ((term.c[tokens] @ kernel[rows].T) * c).sum(-1))
        return total

    def quadratic(self, term: Term) -> Float[Tensor, " token"]:
        """Squared norms of a term."""
        key = id(term.factors)
        if key not in self._triangles:
            self._keep(term.factors)
            self._triangles[key] = _triangle(term.factors)
        total = term.c.new_zeros(len(term.c))
        start = 0
        for rows in self._triangles[key]:
            total += ((term.c[:, start:] @ rows.T) * term.c[:, start : start + len(rows)]).sum(-1)
            start += len(rows)
        return total

    def nbytes(self) -> int:
        kept = [
            *self._pairs.values(),
            *(rows for triangle in self._triangles.values() for rows in triangle),
        ]
        return sum(kernel.nbytes for kernel in kept)

    def _pair(self, one: Factors, other: Factors) -> Float[Tensor, "unit other_unit"]:
        key = (id(one), id(other))
        if key not in self._pairs:
            self._keep(one, other)
            self._pairs[key] = _kernel(one, other)
        return self._pairs[key]

    def _keep(self, *objects: object) -> None:
        self._alive |= {id(o): o for o in objects}


def inner(one: Jacobians, other: Jacobians, kernels: Kernels) -> Float[Tensor, " token"]:
    """<J, J'>_F at each token, of Jacobians without row scales."""
    total = _zeros(one)
    for a in one.terms:
        for b in other.terms:
            total = total + kernels.bilinear(a, b)
    for mine, theirs in ((one, other), (other, one)):
        for term in mine.terms:
            for dyads in theirs.dyads:
                total = total + _term_with_dyads(term, dyads, kernels)
    for a in one.dyads:
        for b in other.dyads:
            total = total + _dyads_with_dyads(a, b)
    return total


def squared_norm(one: Jacobians, kernels: Kernels) -> Float[Tensor, " token"]:
    """|J|_F^2 at each token, of Jacobians without row scales."""
    total = _zeros(one)
    for i, a in enumerate(one.terms):
        total = total + kernels.quadratic(a)
        for b in one.terms[i + 1 :]:
            total = total + 2 * kernels.bilinear(a, b)
        for dyads in one.dyads:
            total = total + 2 * _term_with_dyads(a, dyads, kernels)
    for i, a in enumerate(one.dyads):
        total = total + _dyads_with_dyads(a, a)
        for b in one.dyads[i + 1 :]:
            total = total + 2 * _dyads_with_dyads(a, b)
    return total


def row_products(maps: list[Jacobians], d_out: int) -> Float[Tensor, "map map token"]:
    """<J, J'>_F of all pairs from the Jacobians' own rows, a few at a time: what row scales need.

    Per token d_out d_in multiply-adds for each row of each map's reads, as much as building the Jacobians.
    """
    n = maps[0].n_tokens
    widest = max([len(term.factors.reads) for jacobians in maps for term in jacobians.terms], default=1)
    at_a_time = max(1, NUMBERS_AT_A_TIME // (n * max(widest, d_out)))
    total = None
    for start in range(0, d_out, at_a_time):
        outputs = slice(start, min(start + at_a_time, d_out))
        rows = torch.stack([_rows(jacobians, outputs) for jacobians in maps])
        products = torch.einsum("antd,bntd->abn", rows, rows)
        total = products if total is None else total + products
    assert total is not None
    return total


def sum_over_tokens(one: Jacobians, d_out: int, d_in: int) -> Float[Tensor, "d_out d_in"]:
    """The sum of the Jacobians of all tokens, of those without row scales."""
    first = one.terms[0].c if one.terms else one.dyads[0].writes
    total = first.new_zeros(d_out, d_in)
    for term in one.terms:
        rows = term.factors.row_coefficients(term.c.sum(0))[:, None] * term.factors.reads
        total += term.factors.writes.T @ rows.unflatten(0, (-1, len(term.factors.writes))).sum(0)
    for dyads in one.dyads:
        total += dyads.writes.flatten(0, 1).T @ dyads.reads.flatten(0, 1)
    return total


def open_units(acts: Float[Tensor, "token unit"]) -> tuple[Int64[Tensor, "token dyad"], Bool[Tensor, "token dyad"]]:
    """Indices of the open units of each token, as many columns as the token with most has, and which of them are."""
    most = int((acts != 0).sum(-1).max()) if acts.shape[1] else 0
    index = acts.abs().topk(most, dim=-1).indices
    return index, acts.gather(-1, index) != 0


def _zeros(one: Jacobians) -> Tensor:
    first = one.terms[0].c if one.terms else one.dyads[0].writes
    return first.new_zeros(one.n_tokens)


def _term_with_dyads(term: Term, dyads: Dyads, kernels: Kernels) -> Float[Tensor, " token"]:
    """sum_j p_j . (J q_j): only dyads that are there are multiplied, some at a time."""
    if dyads.rows is not None:
        return kernels.with_rows(term, dyads.rows)
    factors, total = term.factors, term.c.new_zeros(len(term.c))
    tokens, columns = dyads.present.nonzero(as_tuple=True)
    at_a_time = max(1, NUMBERS_AT_A_TIME // len(factors.reads))
    for token, column in zip(tokens.split(at_a_time), columns.split(at_a_time), strict=True):
        p, q = dyads.writes[token, column], dyads.reads[token, column]
        total.index_add_(0, token, factors.pairing(term.c[token], p, q))
    return total


def _dyads_with_dyads(a: Dyads, b: Dyads) -> Float[Tensor, " token"]:
    return ((a.writes @ b.writes.mT) * (a.reads @ b.reads.mT)).sum((-2, -1))


def _rows(one: Jacobians, outputs: slice) -> Float[Tensor, "token row d_in"]:
    parts = []
    for term in one.terms:
        c, writes = term.factors.row_coefficients(term.c), term.factors.writes[:, outputs]
        reads = term.factors.reads.split(len(writes))
        branches = zip(c.split(len(writes), dim=-1), reads, strict=True)
        rows = sum(((writes.T * some_c[:, None, :]) @ read for some_c, read in branches), start=_NOTHING)
        parts.append(rows if term.row_scale is None else term.row_scale[:, outputs, None] * rows)
    parts += [dyads.writes[..., outputs].mT @ dyads.reads for dyads in one.dyads]
    return sum(parts, start=_NOTHING)


_NOTHING = torch.zeros(())


def _kernel(f: Factors, g: Factors) -> Float[Tensor, "unit other_unit"]:
    return torch.cat([_block(f, some, g, (0, g.n_units)) for some in _unit_blocks(f, len(g.reads))])


def _triangle(f: Factors) -> list[Tensor]:
    """Rows of f's kernel with itself from the diagonal on; what stands right of a diagonal block counts twice."""
    blocks = []
    for start, stop in _unit_blocks(f, len(f.reads), TRIANGLE_ROWS):
        rows = _block(f, (start, stop), f, (start, f.n_units))
        rows[:, stop - start :] *= 2
        blocks.append(rows)
    return blocks


def _block(f: Factors, units: tuple[int, int], g: Factors, others: tuple[int, int]) -> Tensor:
    """sum over the rows i of a unit and i' of another of (w_i . w_i')(r_i . r_i')."""
    (w, r, ranks), (w_other, r_other, other_ranks) = _rows_of(f, *units), _rows_of(g, *others)
    products = (w @ w_other.T).mul_(r @ r_other.T)
    return _sum_ranks(_sum_ranks(products, other_ranks).T, ranks).T.contiguous()


def _rows_of(f: Factors, start: int, stop: int) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
    if f.ranks is None:
        first, last, ranks = start, stop, None
    else:
        first, last, ranks = sum(f.ranks[:start]), sum(f.ranks[:stop]), f.ranks[start:stop]
    rows = torch.arange(first, last, device=f.writes.device)
    return f.writes[rows % len(f.writes)], f.reads[first:last], ranks


def _sum_ranks(products: Tensor, ranks: tuple[int, ...] | None) -> Tensor:
    if ranks is None:
        return products
    units = torch.arange(len(ranks), device=products.device).repeat_interleave(products.new_tensor(ranks).long())
    return products.new_zeros(len(products), len(ranks)).index_add_(1, units, products)


def _unit_blocks(f: Factors, n_columns: int, most: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of units of which no product is larger than NUMBERS_AT_A_TIME, but for a single unit."""
    rows = max(1, NUMBERS_AT_A_TIME // n_columns)
    start = filled = 0
    for unit in range(f.n_units):
        rank = 1 if f.ranks is None else f.ranks[unit]
        if unit > start and (filled + rank > rows or unit - start == most):
            yield start, unit
            start, filled = unit, 0
        filled += rank
    if f.n_units:
        yield start, f.n_units

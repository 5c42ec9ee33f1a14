"""The algebra of static factors and dyads, against the matrices it never builds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analysis import jacobian_terms
from analysis.jacobian_terms import (
    Dyads,
    Factors,
    Jacobians,
    Kernels,
    OpenGroup,
    OpenRows,
    Term,
    inner,
    open_units,
    row_products,
    squared_norm,
    sum_over_tokens,
)

N, D_OUT, D_IN = 5, 6, 7


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def sparse(*shape: int) -> Tensor:
    return randn(*shape).relu()


def term(kind: str) -> Term:
    if kind == "ranks":
        ranks = (3, 1, 4, 2)
        return Term(Factors(randn(10, D_OUT), randn(10, D_IN), ranks), sparse(N, 4))
    branches = {"plain": 1, "gated": 2}[kind]
    return Term(Factors(randn(9, D_OUT), randn(9 * branches, D_IN)), randn(N, 9 * branches))


def dyads(kind: str) -> Dyads:
    present = torch.rand(N, 3) < 0.6
    writes = randn(N, 3, D_OUT) * present[..., None]
    if kind == "rows":
        return dyads_of_open_rows()
    return Dyads(writes, randn(N, 3, D_IN) * present[..., None], present)


def dyads_of_open_rows() -> Dyads:
    """Three units of 2, 1 and 3 rows; the rows of a unit share what they read, so that a unit is one dyad."""
    present = torch.rand(N, 3) < 0.6
    factors = Factors(randn(6, D_OUT), randn(3, D_IN)[torch.tensor([0, 0, 1, 2, 2, 2])])
    writes, groups = torch.zeros(N, 3, D_OUT, dtype=torch.float64), []
    for unit, rows in enumerate((slice(0, 2), slice(2, 3), slice(3, 6))):
        tokens = present[:, unit].nonzero()[:, 0]
        c = randn(len(tokens), rows.stop - rows.start)
        writes[tokens, unit] = c @ factors.writes[rows]
        groups.append(OpenGroup(tokens, rows, c))
    reads = factors.reads[[0, 2, 3]] * present[..., None]
    return Dyads(writes, reads, present, OpenRows(factors, groups))


def full(one: Jacobians) -> Tensor:
    """[token, d_out, d_in]."""
    total = torch.zeros(one.n_tokens, D_OUT, D_IN, dtype=torch.float64)
    for t in one.terms:
        f = t.factors
        c = t.c if f.ranks is None else t.c.repeat_interleave(torch.tensor(f.ranks), dim=1)
        writes = f.writes.repeat(len(f.reads) // len(f.writes), 1)
        part = torch.einsum("ni,io,id->nod", c, writes, f.reads)
        total += part if t.row_scale is None else part * t.row_scale[..., None]
    for d in one.dyads:
        total += torch.einsum("njo,njd->nod", d.writes, d.reads)
    return total


parts = st.tuples(
    st.lists(st.sampled_from(["plain", "gated", "ranks"]), max_size=3),
    st.lists(st.sampled_from(["own", "rows"]), max_size=2),
).filter(lambda lists: bool(lists[0] or lists[1]))


@given(one=parts, other=parts, seed=st.integers(0, 1000), small=st.booleans())
def test_products_are_those_of_the_matrices(one, other, seed, small):
    """`small` makes every loop over blocks go round more than once."""
    torch.manual_seed(seed)
    a, b = (Jacobians(N, [term(k) for k in terms], [dyads(k) for k in own]) for terms, own in (one, other))
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(jacobian_terms, "NUMBERS_AT_A_TIME", 20)
            patch.setattr(jacobian_terms, "TRIANGLE_ROWS", 2)
        kernels = Kernels()
        for _ in range(2):  # as kernels are made, and as they are kept
            assert_close(inner(a, b, kernels), (full(a) * full(b)).sum((1, 2)))
            assert_close(inner(b, a, kernels), inner(a, b, kernels))
            assert_close(squared_norm(a, kernels), full(a).square().sum((1, 2)))
        assert_close(row_products([a, b], D_OUT)[0, 1], (full(a) * full(b)).sum((1, 2)))
    assert_close(sum_over_tokens(a, D_OUT, D_IN), full(a).sum(0))


def test_rows_with_a_scale():
    torch.manual_seed(0)
    scaled = term("gated")
    scaled = Term(scaled.factors, scaled.c, randn(N, D_OUT))
    a, b = Jacobians(N, [scaled], [dyads("own")]), Jacobians(N, [term("ranks")])
    assert a.has_row_scale
    assert not b.has_row_scale
    J = torch.stack([full(a), full(b)])
    assert_close(row_products([a, b], D_OUT), torch.einsum("anod,bnod->abn", J, J))


def test_a_kernel_is_made_once_and_a_symmetric_one_is_kept_as_half():
    torch.manual_seed(0)
    one, other, kernels = term("gated"), term("ranks"), Kernels()
    inner(Jacobians(N, [one]), Jacobians(N, [other]), kernels)
    assert kernels.nbytes() == 8 * 18 * 4
    inner(Jacobians(N, [other]), Jacobians(N, [one]), kernels)
    assert kernels.nbytes() == 8 * 18 * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jacobian_terms, "TRIANGLE_ROWS", 1)
        squared_norm(Jacobians(N, [one]), kernels)
    assert kernels.nbytes() == 8 * (18 * 4 + 18 * 19 // 2)


def test_open_units_are_as_many_columns_as_the_token_with_most_has():
    acts = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 3.0, 0.0]])
    unit, present = open_units(acts)
    assert unit[0].tolist() == [1, 3]
    assert unit[1, 0] == 2
    assert present.tolist() == [[True, True], [True, False]]
    assert open_units(0 * acts)[1].shape == (2, 0)
    assert open_units(acts[:, :0])[1].shape == (2, 0)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

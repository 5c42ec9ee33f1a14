"""Sparse products with atoms: equal to the dense products, adjoint to each other, in any number of chunks."""

from itertools import product

import pytest
import torch

from cayley_interp import CayleyDictionary
from cayley_interp.atoms import analyse, synthesise
from cayley_interp.chunks import CHUNK_BYTES
from cayley_interp.sign_tables import sign_tables

CPU = torch.device("cpu")


@pytest.fixture(
    params=product([(4, 4, "gold"), (4, 9, "gold"), (5, 7, "random"), (4, 6, "bent")], ["kept", "computed"]), ids=str
)
def case(request):
    arguments, rows = request.param
    dictionary = CayleyDictionary(*arguments)
    tables = sign_tables(dictionary, dictionary.n, CPU, torch.float64)
    if rows == "computed":  # as for a dictionary whose atoms are too many to be kept
        tables = tables._replace(atoms=None)
    x = torch.randn(11, dictionary.d, dtype=torch.float64)
    indices = torch.stack([torch.randperm(dictionary.size)[:5] for _ in range(11)])
    values = torch.randn(11, 5, dtype=torch.float64)
    return dictionary, x, indices, values, tables


def test_products_equal_the_dense_ones(case):
    dictionary, x, indices, values, tables = case
    dense = dictionary.atoms(indices.flatten(), torch.float64).view(11, 5, -1)
    torch.testing.assert_close(analyse(x, indices, tables), torch.einsum("nd,nkd->nk", x, dense))
    torch.testing.assert_close(synthesise(indices, values, tables), torch.einsum("nk,nkd->nd", values, dense))


def test_they_are_adjoint(case):
    _, x, indices, values, tables = case
    left = (analyse(x, indices, tables) * values).sum()
    right = (x * synthesise(indices, values, tables)).sum()
    torch.testing.assert_close(left, right)


def test_each_is_the_gradient_of_the_other(case):
    _, x, indices, values, tables = case
    x.requires_grad_()
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: analyse(x, indices, tables), x)
    assert torch.autograd.gradcheck(lambda v: synthesise(indices, v, tables), values)
    assert torch.autograd.gradgradcheck(lambda x: analyse(x, indices, tables) ** 2, x)


def test_chunks_do_not_change_a_number(case, monkeypatch):
    _, x, indices, values, tables = case
    whole = analyse(x, indices, tables), synthesise(indices, values, tables)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 1)
    torch.testing.assert_close(analyse(x, indices, tables), whole[0], rtol=0, atol=1e-15)
    torch.testing.assert_close(synthesise(indices, values, tables), whole[1], rtol=0, atol=1e-15)


def test_no_tokens(case):
    _, x, indices, values, tables = case
    assert analyse(x[:0], indices[:0], tables).shape == (0, 5)
    assert synthesise(indices[:0], values[:0], tables).shape == (0, x.shape[-1])


def test_atoms_are_kept_where_a_cache_holds_them():
    small, large = CayleyDictionary(7, 12), CayleyDictionary(10, 15)
    kept = sign_tables(small, 12, CPU, torch.float64).atoms
    assert kept is not None
    torch.testing.assert_close(kept / small.d**0.5, small.atoms(torch.arange(small.size), torch.float64))
    assert sign_tables(large, 15, CPU, torch.float32).atoms is None
    assert sign_tables(large, 10, CPU, torch.float32).atoms is sign_tables(large, 15, CPU, torch.float32).walsh

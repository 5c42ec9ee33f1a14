"""Sparse products with atoms: equal to the dense products, adjoint to each other, in any number of chunks."""

import pytest
import torch

from cayley_interp import CayleyDictionary
from cayley_interp.atoms import analyse, synthesise
from cayley_interp.chunks import CHUNK_BYTES

CPU = torch.device("cpu")


@pytest.fixture(params=[(4, 4, "gold"), (4, 9, "gold"), (5, 7, "random"), (4, 6, "bent")], ids=str)
def case(request):
    dictionary = CayleyDictionary(*request.param)
    x = torch.randn(11, dictionary.d, dtype=torch.float64)
    indices = torch.stack([torch.randperm(dictionary.size)[:5] for _ in range(11)])
    values = torch.randn(11, 5, dtype=torch.float64)
    return dictionary, x, indices, values, dictionary.sign_tables(CPU, torch.float64)


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

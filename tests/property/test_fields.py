"""GF(2^t) is a field with the tabled polynomials, and x generates it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cayley_interp import fields

DEGREES = st.integers(1, 16)


def elements(t: int):
    return st.integers(0, 2**t - 1)


@pytest.mark.parametrize("t", range(1, 17))
def test_every_polynomial_is_primitive(t):
    # x of order 2^t - 1 modulo f of degree t makes every non-zero residue a power of x: f is irreducible and primitive.
    polynomial = fields.PRIMITIVE_POLYNOMIALS[t]
    assert polynomial.bit_length() == t + 1
    x, powers = 1, set()
    for _ in range(2**t - 1):
        powers.add(x)
        x <<= 1
        x ^= polynomial if x >> t else 0
    assert x == 1
    assert powers == set(range(1, 2**t))


@given(st.data(), DEGREES)
def test_multiplication_is_that_of_a_field(data, t):
    a, b, c = (torch.tensor([data.draw(elements(t))]) for _ in range(3))
    one = torch.tensor([1])
    assert torch.equal(fields.multiply(a, b, t), fields.multiply(b, a, t))
    assert torch.equal(fields.multiply(a, fields.multiply(b, c, t), t), fields.multiply(fields.multiply(a, b, t), c, t))
    assert torch.equal(fields.multiply(a, b ^ c, t), fields.multiply(a, b, t) ^ fields.multiply(a, c, t))
    assert torch.equal(fields.multiply(a, one, t), a)
    assert 0 <= fields.multiply(a, b, t) < 2**t


@given(st.data(), DEGREES)
def test_powers(data, t):
    a = torch.tensor([data.draw(elements(t).filter(bool))])
    assert fields.power(a, 2**t - 1, t) == 1  # Lagrange: every non-zero element has an inverse
    assert torch.equal(fields.power(a, 3, t), fields.multiply(a, fields.multiply(a, a, t), t))


@given(st.data(), DEGREES)
def test_trace_is_a_linear_map_onto_one_bit(data, t):
    a, b = (torch.tensor([data.draw(elements(t))]) for _ in range(2))
    assert torch.equal(fields.trace(a ^ b, t), fields.trace(a, t) ^ fields.trace(b, t))
    assert torch.equal(fields.trace(fields.multiply(a, a, t), t), fields.trace(a, t))
    assert set(fields.trace(torch.arange(2**t), t).tolist()) == {0, 1}


@given(st.integers(0, 2**62 - 1))
def test_parity_counts_bits(a):
    assert fields.parity(torch.tensor([a])).item() == bin(a).count("1") % 2

"""Arithmetic in GF(2^t), t = 1..16. A field element is an integer whose bit i is its coefficient of x^i."""

import torch
from jaxtyping import Int64
from torch import Tensor

# One primitive polynomial per degree (bit i is the coefficient of x^i): x generates every non-zero element, which
# `tests/property/test_fields.py` proves for each. The dictionary, and so every checkpoint, depends on this table.
PRIMITIVE_POLYNOMIALS: dict[int, int] = {
    1: 0b11,
    2: 0b111,
    3: 0b1011,
    4: 0b10011,
    5: 0b100101,
    6: 0b1000011,
    7: 0b10000011,
    8: 0b100011101,
    9: 0b1000010001,
    10: 0b10000001001,
    11: 0b100000000101,
    12: 0b1000001010011,
    13: 0b10000000011011,
    14: 0b100010001000011,
    15: 0b1000000000000011,
    16: 0b10001000000001011,
}


def multiply(a: Int64[Tensor, "*n"], b: Int64[Tensor, "*n"], t: int) -> Int64[Tensor, "*n"]:
    """Product in GF(2^t) by shift and add, reducing modulo the field's polynomial at every shift."""
    polynomial = PRIMITIVE_POLYNOMIALS[t]
    product = torch.zeros_like(a)
    for i in range(t):
        product = product ^ torch.where((b >> i) & 1 == 1, a, 0)
        a = a << 1
        a = a ^ torch.where((a >> t) & 1 == 1, polynomial, 0)
    return product


def power(a: Int64[Tensor, "*n"], exponent: int, t: int) -> Int64[Tensor, "*n"]:
    """a^exponent in GF(2^t), by squaring; a^0 = 1."""
    result = torch.ones_like(a)
    while exponent:
        if exponent & 1:
            result = multiply(result, a, t)
        a = multiply(a, a, t)
        exponent >>= 1
    return result


def trace(a: Int64[Tensor, "*n"], t: int) -> Int64[Tensor, "*n"]:
    """Absolute trace a + a^2 + a^4 + ... + a^(2^(t-1)), an F_2-linear map onto {0, 1}."""
    total = torch.zeros_like(a)
    for _ in range(t):
        total = total ^ a
        a = multiply(a, a, t)
    return total


def parity(a: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """Sum modulo 2 of the bits of a (a < 2^63): the inner product <u, v> over F_2 is parity(u & v)."""
    for shift in (32, 16, 8, 4, 2, 1):
        a = a ^ (a >> shift)
    return a & 1

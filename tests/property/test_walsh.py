"""The Walsh-Hadamard transform: fast equals reference equals dense, an orthonormal involution, its own adjoint."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cayley_interp import fields, walsh_hadamard
from cayley_interp.chunks import CHUNK_BYTES
from cayley_interp.walsh import hadamard_matrix, walsh_hadamard_reference

CPU = torch.device("cpu")
LENGTHS = st.integers(0, 12).map(lambda bits: 2**bits)


def batch(d: int, seed: int, n: int = 3) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(16))
def test_fast_equals_reference(bits):
    x = batch(2**bits, seed=bits)
    torch.testing.assert_close(walsh_hadamard(x), walsh_hadamard_reference(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", range(9))
def test_reference_equals_the_definition(bits):
    u = torch.arange(2**bits)
    signs = 1.0 - 2.0 * fields.parity(u[:, None] & u[None, :]).double()
    x = batch(2**bits, seed=bits)
    torch.testing.assert_close(walsh_hadamard_reference(x), x @ signs / 2 ** (bits / 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_matrix(2**bits, CPU, torch.float64), signs / 2 ** (bits / 2))


@given(LENGTHS, st.integers(0, 2**32))
def test_orthonormal_involution(d, seed):
    x, y = batch(d, seed), batch(d, seed + 1)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(walsh_hadamard(x).norm(), x.norm())
    torch.testing.assert_close((walsh_hadamard(x) * y).sum(), (x * walsh_hadamard(y)).sum())


@given(st.integers(1, 10), st.data())
def test_translation_becomes_a_sign(bits, data):
    # The characters diagonalise the group: a shift by s multiplies coefficient u by (-1)^<u, s>.
    d = 2**bits
    s = data.draw(st.integers(0, d - 1))
    x, u = batch(d, seed=bits), torch.arange(d)
    signs = 1.0 - 2.0 * fields.parity(u & s).double()
    torch.testing.assert_close(walsh_hadamard(x[:, u ^ s]), walsh_hadamard(x) * signs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(8,), (2, 16), (2, 3, 256), (0, 8)])
def test_gradients_and_shapes(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert walsh_hadamard(x).shape == x.shape
    assert torch.autograd.gradcheck(walsh_hadamard, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(walsh_hadamard, x, fast_mode=True)


def test_chunks_do_not_change_a_number(monkeypatch):
    x = batch(1024, seed=0, n=9).view(3, 3, 1024)
    whole = walsh_hadamard(x)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 16_384)
    torch.testing.assert_close(walsh_hadamard(x), whole, rtol=0, atol=1e-13)


def test_strided_input():
    x = batch(64, seed=0, n=64).T
    torch.testing.assert_close(walsh_hadamard(x), walsh_hadamard_reference(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_torchs_dense_product(dtype):
    x = batch(1024, seed=0, n=64)
    truth = walsh_hadamard_reference(x)
    fast = (walsh_hadamard(x.to(dtype)).double() - truth).abs().max()
    dense = ((x.to(dtype) @ hadamard_matrix(1024, CPU, dtype)).double() - truth).abs().max()
    assert fast <= 2 * dense


@pytest.mark.parametrize("d", [0, 3, 6, 100])
def test_a_length_that_is_no_power_of_two_is_refused(d):
    with pytest.raises(ValueError, match=f"power of two, got {d}"):
        walsh_hadamard(torch.zeros(2, d))

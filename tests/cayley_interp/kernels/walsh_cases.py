"""Cases of the Walsh-Hadamard kernel, run by test_walsh.py: in Triton's interpreter, or on a GPU where there is one."""

import os

import pytest
import torch
from torch import Tensor

from cayley_interp.kernels import set_backend
from cayley_interp.kernels.walsh import MAX_LENGTH, walsh_hadamard_triton
from cayley_interp.walsh import walsh_hadamard, walsh_hadamard_reference

DEVICE = os.environ["KERNEL_DEVICE"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def backend_of_others():
    yield
    set_backend("auto")


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def error(y: Tensor, x: Tensor) -> float:
    return (y.double() - walsh_hadamard_reference(x.double())).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(16))
def test_the_error_is_at_most_twice_that_of_torch(bits, dtype):
    x = batch(max(3, 4096 >> bits), 2**bits, dtype=dtype)  # enough numbers that both meet their worst
    y = walsh_hadamard_triton(x)
    assert y.dtype == dtype
    own = error(walsh_hadamard_reference(x), x)
    assert error(y, x) <= max(2 * own, 1e-7)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 3, 64), (300, 32), (5000, 2), (0, 8)])
def test_any_batch(shape):
    x = batch(*shape)
    y = walsh_hadamard_triton(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, walsh_hadamard_reference(x))


def test_strides_are_followed():
    wide = batch(6, 64, 10)
    for x in (wide.transpose(1, 2), wide[:, :, 3], wide[::2, :, 0], wide.permute(2, 0, 1)):
        torch.testing.assert_close(walsh_hadamard_triton(x), walsh_hadamard_reference(x))


def test_it_is_its_own_inverse_and_its_own_gradient():
    x = batch(5, 128).requires_grad_()
    y = walsh_hadamard_triton(x)
    torch.testing.assert_close(walsh_hadamard_triton(y), x)
    grad = batch(5, 128)
    (found,) = torch.autograd.grad(y, x, grad, create_graph=True)
    torch.testing.assert_close(found, walsh_hadamard_reference(grad))
    (second,) = torch.autograd.grad(
        torch.autograd.grad(walsh_hadamard_triton(x).square().sum(), x, create_graph=True)[0].sum(), x
    )
    torch.testing.assert_close(second, torch.full_like(x, 2))


def test_the_registration_is_sound():
    checked = ("test_schema", "test_autograd_registration", "test_faketensor")
    found = torch.library.opcheck(walsh_hadamard_triton, (batch(4, 32).requires_grad_(),), test_utils=checked)
    assert set(found.values()) == {"SUCCESS"}


def test_a_compiled_function_has_no_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: 2 * walsh_hadamard_triton(x) + 1, fullgraph=True, backend="aot_eager")
    x = batch(3, 16)
    torch.testing.assert_close(compiled(x), 2 * walsh_hadamard_reference(x) + 1)


def test_lengths_that_cannot_be_are_refused():
    for d in (0, 3, 48, 2 * MAX_LENGTH):
        with pytest.raises(ValueError, match=f"power of two up to 32768, got {d}"):
            walsh_hadamard_triton(torch.zeros(1, d, device=DEVICE))


def test_the_backend_decides_what_runs(monkeypatch):
    ran = []
    monkeypatch.setattr("cayley_interp.kernels.walsh.walsh_hadamard_triton", lambda x: ran.append(x.dtype) or x)
    for backend in ("torch", "triton"):
        set_backend(backend)
        for dtype in (torch.float32, torch.float64):
            walsh_hadamard(batch(2, 8, dtype=dtype))
    assert ran == [torch.float32]


def test_what_is_too_long_for_the_kernel_goes_to_torch():
    set_backend("triton")
    x = batch(1, 2 * MAX_LENGTH)
    torch.testing.assert_close(walsh_hadamard(x), walsh_hadamard_reference(x))

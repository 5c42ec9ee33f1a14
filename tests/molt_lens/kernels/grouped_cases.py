"""Cases of the grouped kernels, run by test_molt_kernels.py: values and all gradients against torch, in float64."""

import os
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from cayley_interp.kernels import set_backend
from molt_lens import Molt
from molt_lens.kernels import grouped
from molt_lens.transforms import active_transforms, dense_transforms

DEVICE = os.environ["KERNEL_DEVICE"]
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = [70, 8, 5, 3, 4, 2]  # one of more than a block, odd ones
TOKENS, D_IN, D_OUT = 45, 70, 66  # more than a block each
REACHABLE = {
    "some": lambda n: torch.rand(n, 6) < torch.tensor([1.0, 0.5, 0.9, 0.0, 0.1, 0.5]),
    "all": lambda n: torch.ones(n, 6, dtype=torch.bool),
    "none": lambda n: torch.zeros(n, 6, dtype=torch.bool),
    "one pair": lambda n: torch.arange(6 * n).view(n, 6) == 6 * n - 1,
    "one transform of many": lambda n: (torch.arange(6) == 2).expand(n, 6),
}


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    set_backend("triton")
    if INTERPRETED:
        monkeypatch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_dot", product)
    yield
    set_backend("auto")


def product(_, a, b, total, *__):
    """Triton's interpreter multiplies bfloat16 as the integers that hold its bits."""
    from triton.runtime.interpreter import TensorHandle

    a, b = (t.data for t in (a, b))
    if a.dtype == np.uint16:
        a, b = (np.left_shift(bits, 16, dtype=np.uint32).view(np.float32) for bits in (a, b))
    return TensorHandle(np.matmul(a, b, dtype=np.float32) + total.data, total.dtype.scalar)


def inputs(n_tokens: int = TOKENS, pattern: str = "some", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Acts, x, U, V, what is reachable, and the gradient of y; some reachable acts are 0, as in a JumpReLU's window."""
    torch.manual_seed(0)
    reachable = REACHABLE[pattern](n_tokens)
    acts = torch.rand(n_tokens, 6) * reachable * (torch.rand(n_tokens, 6) < 0.7)
    U, V = torch.randn(sum(RANKS), D_OUT), torch.randn(sum(RANKS), D_IN)
    floats = (acts, torch.randn(n_tokens, D_IN), U, V)
    return *(t.to(DEVICE, dtype) for t in floats), reachable.to(DEVICE), torch.randn(n_tokens, D_OUT).to(DEVICE)


def with_gradients(way, leaves: list[Tensor], upstream: Tensor, *arguments) -> list[Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = way(*leaves, *arguments)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def in_float64(leaves: list[Tensor], reachable: Tensor, upstream: Tensor) -> list[Tensor]:
    y, grad_acts, *others = with_gradients(dense_transforms, [t.double() for t in leaves], upstream.double(), RANKS)
    return [y, grad_acts * reachable, *others]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", REACHABLE)
def test_values_and_all_gradients(pattern, dtype):
    """Sums of products in which at most four roundings to the dtype meet, and float32 adds up to 200 of them: their
    error is within so many units of the same sums of absolute values."""
    *leaves, reachable, upstream = inputs(pattern=pattern, dtype=dtype)
    found = with_gradients(active_transforms, leaves, upstream, RANKS, reachable)
    assert [t.dtype for t in found] == [torch.float32, *[dtype] * 4]
    expected = in_float64(leaves, reachable, upstream)
    sizes = in_float64([t.abs() for t in leaves], reachable, upstream.abs())
    unit = 4 * torch.finfo(dtype).eps + 200 * torch.finfo(torch.float32).eps
    for name, got, truth, size in zip(["y", "acts", "x", "U", "V"], found, expected, sizes, strict=True):
        assert got.isfinite().all(), name
        assert ((got - truth).abs() <= unit * size).all(), name
    closed = reachable & (leaves[0] == 0)
    assert found[1][closed].count_nonzero() == closed.sum()
    assert found[1][~reachable].count_nonzero() == 0


def test_it_is_the_loop_over_transforms():
    *leaves, reachable, upstream = inputs()
    sizes = in_float64([t.abs() for t in leaves], reachable, upstream.abs())
    kernels = with_gradients(active_transforms, leaves, upstream, RANKS, reachable)
    set_backend("torch")
    loop = with_gradients(active_transforms, leaves, upstream, RANKS, reachable)
    for got, expected, size in zip(kernels, loop, sizes, strict=True):
        assert got.dtype == expected.dtype
        assert ((got - expected).abs() <= 200 * torch.finfo(torch.float32).eps * size).all()


def test_only_what_is_reachable_is_read():
    """Poison in a closed transform's weights, and in the inputs of tokens that reach none, comes out nowhere."""
    acts, x, U, V, reachable, upstream = inputs(pattern="one transform of many")
    reachable = reachable.clone()
    reachable[7] = False
    arguments = acts * reachable, x, U, V
    expected = with_gradients(active_transforms, list(arguments), upstream, RANKS, reachable)
    rows = slice(sum(RANKS[:2]), sum(RANKS[:3]))
    poisoned = [torch.full_like(weight, torch.nan) for weight in (U, V)]
    for weight, poison in zip((U, V), poisoned, strict=True):
        poison[rows] = weight[rows]
    x[7] = torch.nan
    found = with_gradients(active_transforms, [arguments[0], x, *poisoned], upstream, RANKS, reachable)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_tokens_are_no_pairs():
    *leaves, reachable, upstream = inputs(n_tokens=0)
    y, *gradients = with_gradients(active_transforms, leaves, upstream, RANKS, reachable)
    assert y.shape == (0, D_OUT)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


def test_tiles_cover_every_pair_and_every_rank_once():
    reachable = inputs()[4]
    pairs = grouped.pairs_of(reachable, tuple(RANKS))
    assert torch.equal(torch.stack([pairs.tokens, pairs.units]).T, reachable.T.nonzero().flip(1))
    of_pairs = [tile for tile in pairs.of_pairs.tolist() if tile[1]]
    assert len(of_pairs) < len(pairs.of_pairs)  # the bound was not met, and the table is padded
    covered = [(first + i, latent + i * rank) for first, n, latent, rank, _, _ in of_pairs for i in range(n)]
    rank_of_pair = torch.tensor(RANKS)[pairs.units.cpu()]
    assert [pair for pair, _ in covered] == list(range(len(pairs.tokens)))
    assert [latent for _, latent in covered] == (rank_of_pair.cumsum(0) - rank_of_pair).tolist()
    assert pairs.n_latents == rank_of_pair.sum()
    rows = [row + r for *_, rank, row, first in pairs.of_ranks.tolist() for r in range(first, min(rank, first + 64))]
    assert rows == list(range(sum(RANKS)))


def test_the_gradient_of_x_costs_nothing_where_nobody_asks(monkeypatch):
    ran = []
    up = grouped.up
    monkeypatch.setattr(grouped, "up", lambda *arguments: ran.append(0) or up(*arguments))
    acts, x, U, V, reachable, upstream = inputs()
    y = active_transforms(acts, x, U.requires_grad_(), V, RANKS, reachable)
    y.backward(upstream)
    assert len(ran) == 1


def test_strides_are_followed():
    acts, x, U, V, reachable, upstream = inputs()
    expected = active_transforms(acts, x, U, V, RANKS, reachable)
    strided = [t.T.contiguous().T for t in (acts, x, U, V)]
    torch.testing.assert_close(active_transforms(*strided, RANKS, reachable.T.contiguous().T), expected)
    U = U.requires_grad_()
    gradients = [
        torch.autograd.grad(active_transforms(acts, x, U, V, RANKS, reachable), U, g)[0]
        for g in (upstream, upstream.T.contiguous().T)
    ]
    torch.testing.assert_close(*gradients)


def test_a_second_derivative_is_refused_and_not_wrong():
    acts, x, U, V, reachable, _ = inputs()
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(
        active_transforms(acts, x, U, V, RANKS, reachable).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("gate", ["relu", "jumprelu", "topk:2", "batchtopk:2"])
def test_a_molt_has_its_values_and_gradients_and_does_not_count_what_is_open(gate, monkeypatch):
    torch.manual_seed(0)
    molt = Molt(20, 18, gate=gate, ladder=((8, 1), (4, 2), (2, 4)), skip=True).to(DEVICE)
    x, upstream = torch.randn(2, 5, 20).to(DEVICE), torch.randn(2, 5, 18).to(DEVICE)
    molt.calibrate(x.flatten(0, 1), 0.3, 1.0)
    seen = []
    for backend in ("torch", "triton"):
        set_backend(backend)
        monkeypatch.setattr("molt_lens.molt.DENSE_ABOVE", {"torch": 1.0, "triton": -1.0}[backend])
        y = molt(x)
        seen.append([y.detach(), *torch.autograd.grad(y, list(molt.parameters()), upstream)])
        monkeypatch.setattr("molt_lens.molt.dense_transforms", None)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)


def test_under_autocast_products_are_low_and_sums_and_gradients_of_weights_are_not():
    molt = Molt(20, 18, gate="topk:2", ladder=((8, 1), (4, 2))).to(DEVICE)
    x = torch.randn(5, 20).to(DEVICE)
    expected = molt(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        acts = molt.encode(x)
        written = molt.write(acts, x, acts != 0)
    written.sum().backward()
    assert written.dtype == torch.float32
    assert molt.U.grad is not None
    assert molt.U.grad.dtype == torch.float32
    assert molt.U.grad.count_nonzero() > 0
    assert 0 < (written - expected).norm() < 0.05 * expected.norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU is not waited for")
def test_the_host_waits_once():
    *leaves, reachable, upstream = inputs()
    with_gradients(active_transforms, leaves, upstream, RANKS, reachable)  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with_gradients(active_transforms, leaves, upstream, RANKS, reachable)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) == 1

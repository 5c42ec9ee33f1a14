"""Histogram of frequencies, active parameters against gradients, bits per token against coding by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.sparsity import active_parameters, bits_per_token, frequency_histogram
from analysis.units import UnitCounter
from molt_lens import matched_map


def counted(acts: torch.Tensor) -> UnitCounter:
    counter = UnitCounter([1] * acts.shape[1])
    counter.add(acts)
    return counter


def test_histogram_holds_every_unit_that_is_not_dead():
    tokens = torch.arange(1000)
    histogram = frequency_histogram(counted(torch.stack([tokens >= 0, tokens < 10, tokens < 1, tokens < 0], 1).float()))
    assert sum(histogram.counts) == 3
    assert histogram.counts[-1] == 1  # always open
    assert histogram.counts[0] == 1  # once in 1000
    assert histogram.edges[0] == -3
    assert histogram.edges[-1] == 0


@pytest.mark.parametrize("kind", ["molt", "molt-skip", "transcoder", "skip-transcoder", "mxd", "linear"])
def test_active_parameters_of_a_token_are_all_but_those_without_a_gradient(kind):
    """Reference: at one token, of what belongs to a single unit the open ones have a gradient that is not 0."""
    torch.manual_seed(0)
    sparse_map = matched_map(kind, 12, 10, n=1, gate="topk:3")
    x = torch.randn(1, 12)
    acts = sparse_map.encode(x)
    counter = UnitCounter(sparse_map.ranks)
    counter.add(acts)
    sparse_map.decode(acts, x).square().sum().backward()
    owned = {"molt": ("U", "V"), "transcoder": ("W_dec",), "mxd": ("C",), "linear": ()}[sparse_map.kind]
    expected = sum(
        int((p.grad != 0).sum()) if name in owned and p.grad is not None else p.numel()
        for name, p in sparse_map.named_parameters()
    )
    assert active_parameters(sparse_map, counter) == expected


def test_active_parameters_of_every_unit_open_are_all_parameters():
    sparse_map = matched_map("molt", 8, 8, n=1, gate="relu")
    counter = UnitCounter(sparse_map.ranks)
    counter.add(torch.ones(4, sparse_map.n_units))
    assert active_parameters(sparse_map, counter) == sum(p.numel() for p in sparse_map.parameters())
    with pytest.raises(ValueError, match="counter of 2 units"):
        active_parameters(sparse_map, counted(torch.ones(3, 2)))


def test_bits_by_hand():
    """One unit open at a quarter of the tokens, one at half, one always, one never."""
    acts = torch.tensor([[1.0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]])
    which = 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3) + 1
    assert bits_per_token(counted(acts), value_bits=0) == pytest.approx(which, rel=1e-12)
    assert bits_per_token(counted(acts), value_bits=8) == pytest.approx(which + 1.75 * 8, rel=1e-12)
    with pytest.raises(ValueError, match="value_bits = -1"):
        bits_per_token(counted(acts), value_bits=-1)


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.01, 0.99), value_bits=st.integers(0, 16))
def test_bits_are_at_most_those_of_equal_frequencies_and_know_neither_order_nor_scale(seed, share, value_bits):
    generator = torch.Generator().manual_seed(seed)
    rates = share * torch.rand(12, generator=generator)
    acts = (torch.rand(50, 12, generator=generator) < rates).float()
    counter = counted(acts)
    bits, l0 = bits_per_token(counter, value_bits), counter.l0()
    p = l0 / 12
    entropy = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
    assert value_bits * l0 - 1e-9 <= bits <= 12 * entropy + value_bits * l0 + 1e-9
    shuffled = acts[torch.randperm(50, generator=generator)]
    assert bits_per_token(counted(shuffled * 3), value_bits) == bits

"""Gates against their definitions, and the gradients of JumpReLU against the formulas of the paper."""

import pytest
import torch

from molt_lens import make_gate
from molt_lens.gates import BatchTopKGate, JumpReLUGate

SPECS = ["relu", "jumprelu", "topk:3", "batchtopk:3"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("training", [True, False])
def test_acts_are_pre_where_open_and_never_negative(spec, training):
    torch.manual_seed(0)
    gate = make_gate(spec, 8).train(training)
    pre = torch.randn(5, 7, 8)
    acts = gate(pre)
    assert gate.spec == spec
    assert (acts >= 0).all()
    assert ((acts == 0) | (acts == pre)).all()
    assert 0 < (acts != 0).float().mean() < 1
    torch.testing.assert_close(gate.openness(pre, acts), (acts != 0).float())


def test_topk_opens_the_largest_of_each_token():
    pre = torch.tensor([[1.0, 2.0, 3.0, -4.0], [-1.0, -2.0, 0.5, -3.0]])
    assert make_gate("topk:2", 4)(pre).tolist() == [[0.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.5, 0.0]]


def test_batchtopk_opens_k_a_token_over_the_batch():
    gate = make_gate("batchtopk:2", 3)
    pre = torch.tensor([[5.0, 4.0, 3.0], [0.5, 2.0, -1.0]])
    assert gate(pre).tolist() == [[5.0, 4.0, 3.0], [0.0, 2.0, 0.0]]


def test_batchtopk_outside_training_sees_each_token_alone():
    torch.manual_seed(0)
    gate = make_gate("batchtopk:4", 32)
    assert isinstance(gate, BatchTopKGate)
    for _ in range(50):
        gate(torch.randn(256, 32))
    gate.eval()
    pre = torch.randn(512, 32)
    together = gate(pre)
    torch.testing.assert_close(torch.cat([gate(row) for row in pre.split(1)]), together)
    assert (together != 0).sum(-1).float().mean() == pytest.approx(4, rel=0.1)


def test_jumprelu_gradients_are_those_of_the_paper():
    gate = JumpReLUGate(2, threshold=0.5, bandwidth=0.4).double()
    pre = torch.tensor([[0.6, 0.31], [0.45, 0.9], [0.2, 0.69], [0.55, -0.5]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], dtype=torch.float64)
    acts = gate(pre)
    acts.backward(upstream)
    assert pre.grad is not None
    assert gate.log_threshold.grad is not None
    assert acts.tolist() == [[0.6, 0.0], [0.0, 0.9], [0.0, 0.69], [0.55, 0.0]]
    assert pre.grad.tolist() == [[1.0, 0.0], [0.0, 4.0], [0.0, 6.0], [7.0, 0.0]]
    # d acts / d theta = -theta / bandwidth within half a bandwidth of theta; the log brings another theta.
    expected = [-0.5 / 0.4 * (1 + 3 + 7) * 0.5, -0.5 / 0.4 * (2 + 6) * 0.5]
    assert gate.log_threshold.grad.tolist() == pytest.approx(expected)
    gate.log_threshold.grad = pre.grad = None
    gate.openness(pre, acts).backward(upstream)
    assert (0.4 * pre.grad).round(decimals=6).tolist() == [[1.0, 2.0], [3.0, 0.0], [0.0, 6.0], [7.0, 0.0]]
    assert gate.log_threshold.grad.tolist() == pytest.approx([-1 / 0.4 * (1 + 3 + 7) * 0.5, -1 / 0.4 * (2 + 6) * 0.5])


def test_jumprelu_reaches_what_is_open_and_what_is_in_the_window():
    gate = JumpReLUGate(1, threshold=0.5, bandwidth=0.4)
    pre = torch.tensor([[2.0], [0.6], [0.4], [0.2], [-3.0]])
    assert gate.reachable(pre, gate(pre)).flatten().tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("spec", ["", "relu:3", "topk", "topk:0", "topk:9", "batchtopk:x", "batchtopk:-1", "softmax"])
def test_what_is_no_gate_is_refused(spec):
    with pytest.raises(ValueError, match="expected"):
        make_gate(spec, 8)

"""Gates: which units of a sparse map are open at a token, and how far. One anatomy for all.

    gate = make_gate("topk:4", n_units=31)
    acts = gate(pre)                            # 0 where closed

`pre` is what a unit's detector gives. TopK and BatchTopK rank units by it. Gradients of closed units are 0, but for
JumpReLU's thresholds: `reachable` names the units whose contribution they need.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

THRESHOLD_MOMENTUM = 0.99
"""Of the running threshold by which BatchTopK opens units outside training."""


class Gate(nn.Module, ABC):
    """Values of the units at each token, at least 0."""

    spec: str

    @abstractmethod
    def forward(self, pre: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch unit"]:
        """Acts: 0 where a unit is closed."""

    def reachable(
        self,
        pre: Float[Tensor, "*batch unit"],  # noqa: ARG002  (JumpReLU's)
        acts: Float[Tensor, "*batch unit"],
    ) -> Bool[Tensor, "*batch unit"]:
        """Units whose act has a gradient: a map has to compute what they would write."""
        return acts != 0

    def openness(
        self,
        pre: Float[Tensor, "*batch unit"],  # noqa: ARG002  (JumpReLU's)
        acts: Float[Tensor, "*batch unit"],
    ) -> Float[Tensor, "*batch unit"]:
        """1 where a unit is open, else 0; for a JumpReLU with a gradient to its thresholds."""
        return (acts != 0).to(acts.dtype)

    @torch.no_grad()
    def calibrate(self, pre: Float[Tensor, "token unit"]) -> None:
        """Set what has a scale from the pre-activations of a batch; nothing unless a gate says so."""


class ReLUGate(Gate):
    def __init__(self, n_units: int):  # noqa: ARG002  (all gates are made alike)
        super().__init__()
        self.spec = "relu"

    def forward(self, pre: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch unit"]:
        return pre.relu()


class TopKGate(Gate):
    """The k units of each token whose detectors give most, those above 0."""

    def __init__(self, n_units: int, k: int):
        super().__init__()
        if not 1 <= k <= n_units:
            raise ValueError(f"topk:{k}: expected k from 1 to the {n_units} units there are")
        self.spec, self.k = f"topk:{k}", k

    def forward(self, pre: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch unit"]:
        best = pre.topk(self.k, dim=-1).indices
        return pre.relu() * torch.zeros_like(pre).scatter(-1, best, 1)


class BatchTopKGate(Gate):
    """The k * tokens largest of a batch in training; above a fixed threshold outside it.

    Bussmann et al. 2024, "BatchTopK sparse autoencoders". The threshold is a running mean of the smallest value that
    a training batch let through, so that a token's acts do not depend on its company.
    """

    threshold: Tensor

    def __init__(self, n_units: int, k: int):
        super().__init__()
        if not 1 <= k <= n_units:
            raise ValueError(f"batchtopk:{k}: expected k from 1 to the {n_units} units there are")
        self.spec, self.k = f"batchtopk:{k}", k
        self.register_buffer("threshold", torch.tensor(-1.0))  # below 0: no training batch has been seen

    def forward(self, pre: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch unit"]:
        acts = pre.relu()
        if self.training or self.threshold < 0:
            n_open = self.k * acts[..., 0].numel()
            smallest = acts.detach().flatten().topk(n_open, sorted=False).values.min()
            if self.training:
                self._follow(smallest.to(self.threshold.dtype))
        else:
            smallest = self.threshold
        return acts * (acts >= smallest)

    def _follow(self, smallest: Tensor) -> None:
        seen = self.threshold >= 0
        self.threshold.copy_(torch.where(seen, self.threshold.lerp(smallest, 1 - THRESHOLD_MOMENTUM), smallest))


class JumpReLUGate(Gate):
    """pre where it exceeds the unit's threshold, else 0 (Rajamanoharan et al. 2024, "Jumping ahead").

    The log of the threshold is learned: a threshold stays positive, and its gradient does not vanish with it. The
    gradient of the step is a rectangle of width `bandwidth` around the threshold; pre has that of what was let through.
    """

    bandwidth: Tensor

    def __init__(self, n_units: int, threshold: float = 0.03, bandwidth: float = 0.1):
        super().__init__()
        self.spec = "jumprelu"
        self.log_threshold = nn.Parameter(torch.full((n_units,), threshold).log())
        self.register_buffer("bandwidth", torch.tensor(bandwidth))

    def forward(self, pre: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch unit"]:
        return _Jump.apply(pre, self.log_threshold.exp(), self.bandwidth)

    def reachable(
        self, pre: Float[Tensor, "*batch unit"], acts: Float[Tensor, "*batch unit"]
    ) -> Bool[Tensor, "*batch unit"]:
        return (acts != 0) | _in_window(pre, self.log_threshold.exp(), self.bandwidth)

    def openness(
        self,
        pre: Float[Tensor, "*batch unit"],
        acts: Float[Tensor, "*batch unit"],  # noqa: ARG002
    ) -> Float[Tensor, "*batch unit"]:
        """The step; its gradient moves pre as well as the threshold, whose logarithm alone is slow (docs/log.md)."""
        return _Step.apply(pre, self.log_threshold.exp(), self.bandwidth)

    @torch.no_grad()
    def calibrate(self, pre: Float[Tensor, "token unit"]) -> None:
        """Threshold and window in units of the spread of a gate: a tenth and a half of a standard deviation."""
        spread = pre.std(0).mean()
        self.log_threshold.fill_((0.1 * spread).log().item())
        self.bandwidth.fill_(0.5 * spread)


class ReferenceJumpReLUGate(Gate):
    """pre where it exceeds both its threshold and 0, with the surrogate gradients of crosslayer-transcoder.

    Parts from JumpReLUGate in three ways (https://github.com/Goreg12345/crosslayer-transcoder, model/jumprelu.py): the
    threshold itself is learned and may have any sign, its gradient falls with it; every pre of at least 0 has a
    gradient, that of closed units among them; and the window is open below, closed above.
    """

    bandwidth: Tensor

    def __init__(self, n_units: int, threshold: float = 0.03, bandwidth: float = 1.0):
        super().__init__()
        self.spec = "reference"
        self.threshold = nn.Parameter(torch.full((n_units,), threshold))
        self.register_buffer("bandwidth", torch.tensor(bandwidth))

    def forward(self, pre: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch unit"]:
        return _ReferenceJump.apply(pre, self.threshold, self.bandwidth)

    def reachable(
        self,
        pre: Float[Tensor, "*batch unit"],
        acts: Float[Tensor, "*batch unit"],  # noqa: ARG002
    ) -> Bool[Tensor, "*batch unit"]:
        return (pre >= 0) | _in_reference_window(pre, self.threshold, self.bandwidth)


def make_gate(spec: str, n_units: int) -> Gate:
    """A gate from `relu`, `jumprelu`, `topk:K`, `batchtopk:K` or `reference`.

    Raises:
        ValueError: another spec, or a K that is no number from 1 to n_units.
    """
    name, _, k = spec.partition(":")
    plain = {"relu": ReLUGate, "jumprelu": JumpReLUGate, "reference": ReferenceJumpReLUGate}
    counted = {"topk": TopKGate, "batchtopk": BatchTopKGate}
    if name in plain and not k:
        return plain[name](n_units)
    if name in counted and k.isdecimal():
        return counted[name](n_units, int(k))
    raise ValueError(
        f"no gate is called {spec!r}: expected relu, jumprelu, topk:K or batchtopk:K, such as topk:4, or reference"
    )


def _in_window(pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
    return (pre - threshold).abs() < bandwidth / 2


def _to_units(grad: Tensor, threshold: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0) if grad.ndim > threshold.ndim else grad


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold, bandwidth)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        pre, threshold, bandwidth = ctx.saved_tensors
        near = grad * _in_window(pre, threshold, bandwidth)
        return grad * (pre > threshold), _to_units(-near * threshold / bandwidth, threshold), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold, bandwidth)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        pre, threshold, bandwidth = ctx.saved_tensors
        near = grad * _in_window(pre, threshold, bandwidth) / bandwidth
        return near, _to_units(-near, threshold), None


def _in_reference_window(pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
    distance = (pre - threshold) / bandwidth
    return (distance > -0.5) & (distance <= 0.5)


class _ReferenceJump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold, bandwidth)
        return pre * ((pre > threshold) & (pre > 0))

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        pre, threshold, bandwidth = ctx.saved_tensors
        near = grad * _in_reference_window(pre, threshold, bandwidth)
        return grad * (pre >= 0), _to_units(-near * threshold / bandwidth, threshold), None

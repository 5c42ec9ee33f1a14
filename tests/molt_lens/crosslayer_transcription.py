"""crosslayer-transcoder's MOLT written down anew from its formulas, in plain torch and nothing of ours: the oracle.

Every product is built: [batch, transform, d] in the forward pass, [transform, d, d] for the norms.
"""

import torch
from torch import Tensor, nn

EPSILON = 1.0
THETA = 0.03


class Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, theta, epsilon):
        ctx.save_for_backward(x, theta, epsilon)
        return torch.where((x > theta) & (x > 0), x, 0)

    @staticmethod
    def backward(ctx, *grads):
        x, theta, epsilon = ctx.saved_tensors
        to_x = torch.where(x < 0, 0, grads[0])
        u = (x - theta) / epsilon
        rectangle = (u + 0.5 > 0).to(u.dtype) - (u - 0.5 > 0).to(u.dtype)
        to_theta = -(theta / epsilon) * rectangle * grads[0]
        return to_x, to_theta.sum(0, keepdim=True), None


class JumpReLU(nn.Module):
    bandwidth: Tensor

    def __init__(self, n_units: int):
        super().__init__()
        self.theta = nn.Parameter(torch.full((1, n_units), THETA))
        self.register_buffer("bandwidth", torch.tensor(EPSILON))

    def forward(self, x: Tensor) -> Tensor:
        return Jump.apply(x, self.theta, self.bandwidth)


class Statistics(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, n_layers: int, d: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_layers, d))
        self.register_buffer("std", torch.ones(n_layers, d))


class Transcription(nn.Module):
    """One layer's MOLT; `groups` are (rank, number of transforms)."""

    def __init__(self, d: int, groups: list[tuple[int, int]], n_layers: int = 12, statistics=None):
        super().__init__()
        n_units = sum(count for _, count in groups)
        self.nonlinearity = JumpReLU(n_units)
        self.input_standardizer, self.output_standardizer = statistics or (
            Statistics(n_layers, d),
            Statistics(n_layers, d),
        )
        self.e = nn.Linear(d, n_units)
        self.Us = nn.ParameterList([torch.empty(count, rank, d) for rank, count in groups])
        self.Vs = nn.ParameterList([torch.empty(count, d, rank) for rank, count in groups])
        for parameter in (*self.Us, *self.Vs):
            nn.init.xavier_uniform_(parameter)

    def standardized(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gates [batch, T] and the output [batch, d], both in standardised coordinates."""
        gates = self.nonlinearity(self.e(z))
        written = torch.cat(
            [torch.einsum("bd,ndr,nrf->bnf", z, V, U) for U, V in zip(self.Us, self.Vs, strict=True)], 1
        )
        return gates, (gates[:, :, None] * written).sum(1)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        z = (x - self.input_standardizer.mean[layer]) / self.input_standardizer.std[layer]
        _, y = self.standardized(z)
        return y * self.output_standardizer.std[layer] + self.output_standardizer.mean[layer]

    def norms(self) -> Tensor:
        return torch.cat([(V @ U).flatten(1).norm(dim=1) for U, V in zip(self.Us, self.Vs, strict=True)])

    def loss(self, z: Tensor, target: Tensor, *, step: int, steps: int, weight: float, c: float = 100.0) -> Tensor:
        """Of a batch of standardised inputs and targets, at a step from 0 to steps - 1."""
        gates, y = self.standardized(z)
        penalty = torch.tanh(c * self.norms() * gates).sum(1).mean()
        return ((y - target) ** 2).mean() + weight * (step / steps) * penalty


class Stack(nn.Module):
    """All layers, each with its own parameters, with statistics in common."""

    def __init__(self, d: int, groups: list[tuple[int, int]], n_layers: int):
        super().__init__()
        self.input_standardizer, self.output_standardizer = Statistics(n_layers, d), Statistics(n_layers, d)
        shared = (self.input_standardizer, self.output_standardizer)
        self.molts = nn.ModuleList([Transcription(d, groups, n_layers, shared) for _ in range(n_layers)])


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Trained-looking weights in float64: thresholds of both signs and 0, gates that open, statistics of any scale."""
    model.double()
    torch.manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("theta"):
            tensor.copy_(0.3 * torch.randn_like(tensor))
            tensor[..., ::4] = 0
        elif name.endswith("std"):
            tensor.copy_(torch.exp(torch.randn_like(tensor)))
        elif not name.endswith("bandwidth"):
            tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
    return model

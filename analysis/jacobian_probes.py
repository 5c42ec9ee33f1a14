"""Jacobian faithfulness of any two functions, estimated by products with random vectors, with its standard error.

<J, J'>_F is the mean of (J v) . (J' v) over v with uncorrelated components of variance 1 (Hutchinson 1990). What
jacobian.py knows in closed form needs none of this; here both functions only have to support torch.func.jvp, which
custom autograd functions without a forward mode do not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Distribution = Literal["rademacher", "gaussian"]


@dataclass(frozen=True, eq=False)
class EstimatedFaithfulness:
    """At each token, in float64; definitions as in `JacobianFaithfulness`.

    Attributes:
        cosine_error: standard error of `cosine` over the probes, by the delta method.
        mean_cosine, mean_cosine_error: of the mean over tokens, whose probes are independent.
    """

    cosine: Float[Tensor, " token"]
    cosine_error: Float[Tensor, " token"]
    relative_error: Float[Tensor, " token"]
    norm_ratio: Float[Tensor, " token"]

    @property
    def mean_cosine(self) -> float:
        return self.cosine.mean().item()

    @property
    def mean_cosine_error(self) -> float:
        return (self.cosine_error.square().sum().sqrt() / len(self.cosine)).item()


def estimate_jacobian_faithfulness(
    true: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
    x: Float[Tensor, "token d_in"],
    *,
    probes: int = 64,
    seed: int = 0,
    distribution: Distribution = "rademacher",
) -> EstimatedFaithfulness:
    """How near the Jacobian of `other` is to that of `true`, token by token, in raw coordinates.

    Each probe costs one forward-mode pass through both functions. The ratio has a bias of the order of 1 / probes, an
    order below its standard error.

    Args:
        true, other: from [token, d_in] to [token, d_out], each row from its own row alone.
        probes: vectors at each token; at least 2, for the standard error.

    Raises:
        ValueError: fewer than two probes, no tokens, inputs or outputs that are not finite, or outputs of different
            shapes.
    """
    if distribution not in get_args(Distribution):
        raise ValueError(f"distribution must be one of {', '.join(get_args(Distribution))}, got {distribution!r}")
    if probes < 2:
        raise ValueError(f"probes must be 2 or more to have a standard error, got {probes}")
    if len(x) == 0 or not x.isfinite().all():
        raise ValueError(f"expected finite inputs at one token or more, got x of shape {tuple(x.shape)}")
    generator = torch.Generator().manual_seed(seed)
    products = []
    for _ in range(probes):
        v = _draw(x, distribution, generator)
        (y, a), (other_y, b) = torch.func.jvp(true, (x,), (v,)), torch.func.jvp(other, (x,), (v,))  # pyright: ignore[reportAssignmentType]
        if y.shape != other_y.shape:
            raise ValueError(f"the functions disagree: outputs are {tuple(y.shape)} and {tuple(other_y.shape)}")
        a, b = a.double(), b.double()
        products.append(torch.stack([a.square().sum(-1), (a * b).sum(-1), b.square().sum(-1)]))
    return _estimate(torch.stack(products))


def _draw(x: Tensor, distribution: Distribution, generator: torch.Generator) -> Tensor:
    if distribution == "gaussian":
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    return (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x)


def _estimate(products: Float[Tensor, "probe 3 token"]) -> EstimatedFaithfulness:
    true, cross, other = products.mean(0)
    if not products.isfinite().all():
        raise ValueError("a function or its derivative is not finite at these inputs")
    cosine = cross / (true * other).sqrt()
    # The linear part of the ratio in its three means.
    linear = products[:, 1] / (true * other).sqrt() - cosine / 2 * (products[:, 0] / true + products[:, 2] / other)
    error = linear.std(0) / len(products) ** 0.5
    relative = ((true - 2 * cross + other).clamp_min(0) / true).sqrt()
    return EstimatedFaithfulness(cosine.cpu(), error.cpu(), relative.cpu(), (other / true).sqrt().cpu())

"""Standardisers, and the Replacement: a sparse map that works in standardised coordinates between raw activations.

One dimension of a Gemma's MLP output can carry two fifths of its variance: a loss on raw activations fits that
dimension and little else. So maps are trained on x and y with mean 0 and deviation 1 in each dimension.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from molt_lens.sparse_map import SparseMap

ZERO_VARIANCE = 1e-6
"""A dimension whose deviation is below this share of the median one is constant: it is centred and left unscaled."""


class Standardizer(nn.Module):
    """(x - mean) / std per dimension, and back; buffers, so that they travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, d: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))

    @torch.no_grad()
    def set(self, mean: Float[Tensor, " d"], std: Float[Tensor, " d"]) -> None:
        """Take these statistics; what has no variance gets deviation 1.

        Raises:
            ValueError: statistics that are not finite, or a negative deviation.
        """
        if not (mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
            raise ValueError("expected finite means and deviations of at least 0: look for inf in the activations")
        constant = std <= ZERO_VARIANCE * std.median()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(constant, torch.ones_like(std), std))

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return (x - self.mean) / self.std

    def inverse(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return z * self.std + self.mean


class Replacement(nn.Module):
    """A sparse map with its standardisers: it reads a layer's raw input and writes its raw output."""

    def __init__(self, map: SparseMap):
        super().__init__()
        self.map = map
        self.input, self.output = Standardizer(map.d_in), Standardizer(map.d_out)

    @property
    def d_in(self) -> int:
        return self.map.d_in

    @property
    def d_out(self) -> int:
        return self.map.d_out

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch unit"]:
        return self.map.encode(self.input(x))

    def decode(
        self, acts: Float[Tensor, "*batch unit"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        return self.output.inverse(self.map.decode(acts, self.input(x)))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.output.inverse(self.map(self.input(x)))

    @torch.no_grad()
    def folded(self) -> SparseMap:
        """The same function as one sparse map in raw coordinates.

        A MOLT is quadratic in x, its gate times its transform, so scaling the input is not a scaling of its weights
        alone. Here gate values stay what they are: detectors and transforms each take the input's scale once, only the
        transforms take the output's, and the mean becomes the centre about which both read x.
        """
        folded = copy.deepcopy(self.map)
        folded.rescale_(self.input.std, self.output.std)
        folded.centre.add_(self.input.mean)
        folded.b_dec.add_(self.output.mean)
        return folded

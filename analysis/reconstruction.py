"""How well a reconstruction matches: one streaming meter, float64, the same figures whatever the batch size.

    meter = ReconstructionMeter(d)
    for y, recons in batches:
        meter.add(y, recons)
    meter.nmse(), meter.fvu(), meter.cosine()

Two conventions are public, and they differ by what a dimension of large variance weighs:
    nmse  mean over dimensions of MSE_d / Var_d: each dimension counts alike;
    fvu   sum of MSE_d / sum of Var_d, one global variance: large dimensions decide. Explained variance is 1 - fvu.
The perfect reconstruction has 0, the mean of y over the same tokens has 1 in both.
"""

import torch
from jaxtyping import Float
from torch import Tensor

CONSTANT = 1e-12
"""A dimension whose variance is below this share of the median one has nothing to explain and is left out of nmse."""


class ReconstructionMeter:
    """Sums over tokens of y, y^2, squared errors and cosines, kept on the CPU."""

    def __init__(self, d: int):
        self.tokens = 0
        self.shift: Tensor | None = None
        self.sum, self.squares, self.errors = (torch.zeros(d, dtype=torch.float64) for _ in range(3))
        self.cosines = 0.0

    def add(self, y: Float[Tensor, "*batch d"], recons: Float[Tensor, "*batch d"]) -> None:
        y, recons = (t.detach().reshape(-1, t.shape[-1]).double().cpu() for t in (y, recons))
        if self.shift is None:
            self.shift = y[0].clone()  # variances of dimensions far from 0 stay exact
        centred = y - self.shift
        self.tokens += len(y)
        self.sum += centred.sum(0)
        self.squares += centred.square().sum(0)
        self.errors += (recons - y).square().sum(0)
        self.cosines += torch.cosine_similarity(y, recons, dim=-1).sum().item()

    def variance(self) -> Float[Tensor, " d"]:
        """Of y in each dimension, over the tokens seen."""
        self._check()
        return (self.squares / self.tokens - (self.sum / self.tokens).square()).clamp_min(0)

    def mse(self) -> Float[Tensor, " d"]:
        self._check()
        return self.errors / self.tokens

    def nmse(self) -> float:
        variance = self.variance()
        varies = variance > CONSTANT * variance.median()
        return (self.mse()[varies] / variance[varies]).mean().item()

    def fvu(self) -> float:
        return (self.mse().sum() / self.variance().sum()).item()

    def explained_variance(self) -> float:
        return 1 - self.fvu()

    def cosine(self) -> float:
        """Mean over tokens of the cosine between y and its reconstruction."""
        self._check()
        return self.cosines / self.tokens

    def _check(self) -> None:
        if self.tokens < 2:
            raise ValueError(f"{self.tokens} tokens have been added: a variance needs 2 or more")

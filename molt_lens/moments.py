"""Mean and deviation of activations per dimension, gathered block by block in float64."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation (of the population) of each dimension, float64 on the CPU."""

    mean_in: Float[Tensor, " d_in"]
    std_in: Float[Tensor, " d_in"]
    mean_out: Float[Tensor, " d_out"]
    std_out: Float[Tensor, " d_out"]
    tokens: int


class RunningMoments:
    """Mean and sum of squared deviations, merged block by block (Chan, Golub and LeVeque 1983): exact for constants."""

    def __init__(self):
        self.n = 0
        self._mean = self._squares = torch.zeros(())

    def add(self, rows: Float[Tensor, "token d"]) -> None:
        rows = rows.double()
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.n == 0:
            self.n, self._mean, self._squares = len(rows), mean, squares
            return
        total = self.n + len(rows)
        delta = mean - self._mean
        self._mean = self._mean + delta * (len(rows) / total)
        self._squares = self._squares + squares + delta.square() * (self.n * len(rows) / total)
        self.n = total

    def mean_and_std(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        return self._mean.cpu(), (self._squares / self.n).sqrt().cpu()

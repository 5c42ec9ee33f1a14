"""How well a reconstruction matches: one streaming meter, float64, the same figures whatever the batch size.

    meter = ReconstructionMeter(d)
    for y, recons in batches:
        meter.add(y, recons)
    meter.nmse(), meter.fvu(), meter.cosine()

Two conventions are public, and they differ by what a dimension of large variance weighs:
    nmse  mean over dimensions of MSE_d / Var_d: each dimension counts alike;
    fvu   sum of MSE_d / sum of Var_d, one global variance: large dimensions decide. Explained variance is 1 - fvu.
The perfect reconstruction has 0, the mean of y over the same tokens has 1 in both.

SAELens 6.54's `mse` is `mse().sum()` here, its `explained_variance` is `explained_variance()` and its `cossim`
`cosine()`, where these are right. They are not where (each is pinned by a test)
    y is far from 0           its variance is a difference of sums in float32: with a mean of 1,000 deviations explained
                              variance is off by 0.01, with one of 10,000 it is noise;
    y does not vary           its explained variance is 1 or 0, here it is refused;
    a reconstruction is 0     its mean cosine is nan, here that token has cosine 0;
    the map is a transcoder   it is compared with its own input, since `run_evals` knows of no output hook.
Its `explained_variance_legacy`, the mean of a ratio a token, changes with the batch size and has no counterpart.
"""

import torch
from jaxtyping import Float
from torch import Tensor

CONSTANT = 1e-12
"""A dimension whose variance is below this share of the median one has nothing to explain and is left out of nmse."""


class ReconstructionMeter:
    """Sums over tokens of y, y^2, squared errors and cosines, kept on the CPU.

    Attributes:
        tokens: tokens seen; the figures need 2 or more and raise ValueError below that.
    """

    def __init__(self, d: int):
        self.tokens = 0
        self.shift: Tensor | None = None
        self.sum, self.squares, self.errors, self.made, self.products, self.powers = torch.zeros(6, d).double()
        self.cosines = 0.0

    def add(self, y: Float[Tensor, "*batch d"], recons: Float[Tensor, "*batch d"]) -> None:
        """Count the tokens of a batch.

        Raises:
            ValueError: shapes that differ from each other or from the meter's d, or numbers that are not finite.
        """
        if y.shape != recons.shape or y.shape[-1] != len(self.sum):
            raise ValueError(
                f"expected y and its reconstruction to have the same shape [..., {len(self.sum)}], got "
                f"{tuple(y.shape)} and {tuple(recons.shape)}: a map is measured against its own target"
            )
        y, recons = (t.detach().reshape(-1, t.shape[-1]).double().cpu() for t in (y, recons))
        for name, t in (("y", y), ("the reconstruction", recons)):
            if not t.isfinite().all():
                raise ValueError(f"{name} has numbers that are not finite at {(~t.isfinite()).any(-1).sum()} tokens")
        if not len(y):
            return
        if self.shift is None:
            self.shift = y[0].clone()  # variances of dimensions far from 0 stay exact
        centred = y - self.shift
        self.tokens += len(y)
        self.sum += centred.sum(0)
        self.squares += centred.square().sum(0)
        self.errors += (recons - y).square().sum(0)
        made = recons - self.shift
        self.made += made.sum(0)
        self.products += (made * (centred - made)).sum(0)
        self.powers += made.square().sum(0)
        self.cosines += torch.cosine_similarity(y, recons, dim=-1).sum().item()

    def variance(self) -> Float[Tensor, " d"]:
        """Of y in each dimension, over the tokens seen."""
        self._check()
        return (self.squares / self.tokens - (self.sum / self.tokens).square()).clamp_min(0)

    def mse(self) -> Float[Tensor, " d"]:
        """Mean squared error of each dimension."""
        self._check()
        return self.errors / self.tokens

    def nmse(self) -> float:
        """Mean over dimensions of MSE_d / Var_d, the per-dimension standardised error that maps are trained on."""
        weight = self._weights()
        return (self.errors * weight).sum().item()

    def affine_nmse(self) -> float:
        """`nmse` of the reconstruction times the one number and plus the one vector that make it least.

        Of a code whose scale is arbitrary and that leaves the mean of y out. About their means, the errors of 1 + s
        times the reconstruction are errors - 2 s products + s^2 powers, least at s = products / powers.
        """
        weight, missed = self._weights(), self.sum - self.made
        errors, products, powers = (
            ((sums - a * b / self.tokens) * weight).sum().item()
            for sums, a, b in (
                (self.errors, missed, missed),
                (self.products, self.made, missed),
                (self.powers, self.made, self.made),
            )
        )
        return errors - (products**2 / powers if powers > 0 else 0.0)

    def fvu(self) -> float:
        """Fraction of variance unexplained: sum of MSE_d / sum of Var_d."""
        return (self.mse().sum() / self._varying().sum()).item()

    def explained_variance(self) -> float:
        return 1 - self.fvu()

    def cosine(self) -> float:
        """Mean over tokens of the cosine between y and its reconstruction; 0 where either is 0."""
        self._check()
        return self.cosines / self.tokens

    def _weights(self) -> Float[Tensor, " d"]:
        """Of each dimension's sum in nmse: 0 where it does not vary."""
        variance = self._varying()
        varies = variance > CONSTANT * variance.median()
        return torch.where(varies, 1 / variance, 0) / (self.tokens * varies.sum())

    def _varying(self) -> Float[Tensor, " d"]:
        variance = self.variance()
        if not variance.any():
            raise ValueError(f"y is the same at all {self.tokens} tokens: there is no variance to explain")
        return variance

    def _check(self) -> None:
        if self.tokens < 2:
            raise ValueError(f"{self.tokens} tokens have been added: a variance needs 2 or more")

"""Stability of features across seeds: the units of two maps matched one to one by the correlation of their acts.

    matcher = UnitMatcher()
    for x in batches:                       # the same tokens through both
        matcher.add(a.encode(x), b.encode(x))
    matching = matcher.match()
    matching.mean(), matching.share_above(0.7), matching.control_mean()

The matching is the one of largest total correlation (Hungarian), as Paulo and Belrose (2025, arXiv 2501.16615) match
SAEs of different seeds, there by weights. By acts it serves maps of any two kinds, whose weights cannot be compared.
The best of many partners correlates by chance too, rare units most: a figure without its control says nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

TOKENS_AT_A_TIME = 1_024
"""Tokens whose acts are held in float64."""

STABLE = 0.7
"""Matched correlation from which a unit is called stable."""


@dataclass(frozen=True)
class Matching:
    """Units of `a` and `b` that vary, matched one to one: as many pairs as the smaller of the two has.

    Attributes:
        pairs: (unit of a, unit of b), by falling correlation.
        correlations: Pearson's, of the acts of each pair over all tokens.
        control: the same of the best matching after b's tokens were shuffled, by falling correlation.
        silent_a, silent_b: units left out because their act never varied.
    """

    pairs: Int64[Tensor, "pair 2"]
    correlations: Float[Tensor, " pair"]
    control: Float[Tensor, " pair"]
    silent_a: int
    silent_b: int

    def mean(self) -> float:
        """Mean matched correlation."""
        return self.correlations.mean().item()

    def share_above(self, threshold: float = STABLE) -> float:
        """Share of matched pairs whose correlation is larger."""
        return (self.correlations > threshold).double().mean().item()

    def control_mean(self) -> float:
        """What `mean` is by chance."""
        return self.control.mean().item()

    def control_share_above(self, threshold: float = STABLE) -> float:
        """What `share_above` is by chance."""
        return (self.control > threshold).double().mean().item()


class UnitMatcher:
    """Sums over tokens from which every correlation follows, in float64 where the first acts are.

    Held are two matrices of n_a x n_b numbers, for the true tokens and for the shuffled ones, whatever the number of
    tokens. The correlations do not depend on the batches. The control is a draw by `seed`: tokens are shuffled within
    each block of up to 1,024 tokens of a batch, so batches should have some hundred tokens or more.
    """

    def __init__(self, seed: int = 0):
        self.tokens = 0
        self.generator = torch.Generator().manual_seed(seed)
        # Of a and of b each. Acts are counted from the first token's, so that units that are always open keep digits.
        self.shifts: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.cross = self.shuffled_cross = torch.zeros(0, 0, dtype=torch.float64)

    @torch.no_grad()
    def add(self, a: Float[Tensor, "*batch unit_a"], b: Float[Tensor, "*batch unit_b"]) -> None:
        """Count the acts of both at the same tokens.

        Raises:
            ValueError: a and b of different tokens, other numbers of units than before, or acts that are not finite.
        """
        if a.shape[:-1] != b.shape[:-1]:
            raise ValueError(
                f"acts at tokens {tuple(a.shape[:-1])} and {tuple(b.shape[:-1])}: expected the same tokens"
            )
        acts = [t.flatten(0, -2) for t in (a, b)]
        units = tuple(t.shape[1] for t in acts)
        for name, t in zip("ab", acts, strict=True):
            if not t.isfinite().all():
                bad = int((~t.isfinite()).any(1).sum())
                raise ValueError(
                    f"acts of {name} are not finite at {bad} of {len(t)} tokens: look for nan or inf in the weights or "
                    "in what they read"
                )
        if not len(acts[0]):
            return
        if not self.tokens:
            self.shifts = [t[0].double() for t in acts]
            self.sums, self.squares = ([torch.zeros_like(t) for t in self.shifts] for _ in range(2))
            self.cross, self.shuffled_cross = (self.shifts[0].new_zeros(units) for _ in range(2))
        if units != self.cross.shape:
            raise ValueError(f"acts of {units[0]} and {units[1]} units after some of {tuple(self.cross.shape)}")
        self.tokens += len(acts[0])
        for blocks in zip(*(t.split(TOKENS_AT_A_TIME) for t in acts), strict=True):
            shifted = [block.double() - shift for block, shift in zip(blocks, self.shifts, strict=True)]
            for t, total, squares in zip(shifted, self.sums, self.squares, strict=True):
                total += t.sum(0)
                squares += t.square().sum(0)
            order = torch.randperm(len(shifted[1]), generator=self.generator).to(shifted[1].device)
            self.cross.addmm_(shifted[0].T, shifted[1])
            self.shuffled_cross.addmm_(shifted[0].T, shifted[1][order])

    def correlations(self, shuffled: bool = False) -> Float[Tensor, "unit_a unit_b"]:
        """Pearson's correlation of every unit of a with every unit of b; 0 where one never varied.

        Raises:
            ValueError: fewer than two tokens have been added.
        """
        deviations = torch.outer(*self._deviations())
        cross = self.shuffled_cross if shuffled else self.cross
        covariance = cross / self.tokens - torch.outer(*self.sums) / self.tokens**2
        return torch.where(deviations > 0, covariance / deviations, 0)

    def match(self) -> Matching:
        """The matching of largest total correlation, and that of the control; time grows with the cube of the units.

        Raises:
            ValueError: fewer than two tokens, or no unit that varies in one of the two.
        """
        varying = [deviations.gt(0).nonzero().flatten().cpu() for deviations in self._deviations()]
        silent_a, silent_b = (n - len(units) for n, units in zip(self.cross.shape, varying, strict=True))
        if not (len(varying[0]) and len(varying[1])):
            raise ValueError(
                f"{len(varying[0])} units of a and {len(varying[1])} of b vary over the {self.tokens} tokens: there is "
                "nothing to match"
            )
        correlations, pairs = _best_matching(self.correlations().cpu(), *varying)
        control, _ = _best_matching(self.correlations(shuffled=True).cpu(), *varying)
        return Matching(pairs, correlations, control, silent_a, silent_b)

    def _deviations(self) -> list[Tensor]:
        """Standard deviations of the acts of a's units and of b's."""
        if self.tokens < 2:
            raise ValueError(f"{self.tokens} tokens have been added: a correlation needs 2 or more")
        return [
            (squares / self.tokens - (total / self.tokens).square()).clamp_min(0).sqrt()
            for total, squares in zip(self.sums, self.squares, strict=True)
        ]


def _best_matching(
    correlations: Float[Tensor, "unit_a unit_b"], units_a: Int64[Tensor, " n_a"], units_b: Int64[Tensor, " n_b"]
) -> tuple[Float[Tensor, " pair"], Int64[Tensor, "pair 2"]]:
    """Correlations and pairs of the best one-to-one matching among these units, by falling correlation."""
    from scipy.optimize import linear_sum_assignment

    among = correlations[units_a][:, units_b]
    rows, columns = map(torch.from_numpy, linear_sum_assignment(among.numpy(), maximize=True))
    best, order = among[rows, columns].sort(descending=True, stable=True)
    return best, torch.stack([units_a[rows], units_b[columns]], dim=1)[order]

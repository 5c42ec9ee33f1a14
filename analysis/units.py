"""Which units of a sparse map open, how often and of what rank: one streaming counter."""

import torch
from jaxtyping import Float
from torch import Tensor


class UnitCounter:
    """Counts over acts [token, unit], on the CPU.

    L0 alone flatters a map whose units are matrices: it is never given here without the sum of active ranks.
    """

    def __init__(self, ranks: list[int]):
        self.ranks = torch.tensor(ranks, dtype=torch.int64)
        self.tokens = 0
        self.opened = torch.zeros(len(ranks), dtype=torch.int64)

    def add(self, acts: Float[Tensor, "*batch unit"]) -> None:
        acts = acts.flatten(0, -2)
        self.tokens += len(acts)
        self.opened += (acts != 0).sum(0).cpu()

    def l0(self) -> float:
        """Mean number of open units at a token."""
        return int(self.opened.sum()) / self._seen()

    def active_rank(self) -> float:
        """Mean over tokens of the sum of the ranks of the open units."""
        return int((self.opened * self.ranks).sum()) / self._seen()

    def frequency(self) -> Float[Tensor, " unit"]:
        """Share of tokens at which each unit is open."""
        return self.opened.double() / self._seen()

    def alive(self) -> float:
        """Share of units open at least once; 1 for a map without units."""
        return (self.opened > 0).double().mean().item() if len(self.opened) else 1.0

    def max_frequency(self) -> float:
        """Of the unit that is open most often; near 1 it is a linear map with a gain."""
        return self.frequency().max().item() if len(self.opened) else 0.0

    def by_rank(self) -> dict[int, dict[str, int | float]]:
        """For each rank: number of units, L0 among them, their mean and largest frequency, and the share alive."""
        groups: dict[int, dict[str, int | float]] = {}
        for rank in sorted(set(self.ranks.tolist()), reverse=True):
            frequency = self.frequency()[self.ranks == rank]
            groups[rank] = {
                "units": len(frequency),
                "l0": frequency.sum().item(),
                "mean_frequency": frequency.mean().item(),
                "max_frequency": frequency.max().item(),
                "alive": (frequency > 0).double().mean().item(),
            }
        return groups

    def _seen(self) -> int:
        if self.tokens == 0:
            raise ValueError("no tokens have been counted yet: call add(acts) first")
        return self.tokens

"""Which units open, how often and how strongly: one streaming counter, of sparse maps and of Cayley levels alike.

    counter = UnitCounter(map.ranks, map.norms())          counter = UnitCounter([1] * 2**level.n)
    counter.add(acts)                                      counter.add_codes(*codes)
    counter.l0(), counter.active_rank(), counter.frequency()

What is computed from its counts stands in sparsity.py and dead_features.py.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class UnitCounter:
    """Counts on the CPU, in int64 and float64: none depends on how tokens are batched.

    A unit is *selected* at a token when the code lists it there, *open* when its act is also not 0; dense acts list
    what is open. L0 alone flatters a map whose units are matrices: give it with the sum of active ranks.

    Args:
        ranks: of the linear map that each unit adds: 1 for a feature.
        norms: of what a unit writes per unit of its act, `SparseMap.norms()`; without them 1, as a Cayley atom has.

    Attributes:
        tokens: tokens seen.
        selected, opened: times each unit was selected, open; int64 [unit].
        magnitude: sum of |act| of each; float64 [unit].
        max_act: largest |act| of each; float64 [unit], 0 where it never opened.
    """

    def __init__(self, ranks: list[int], norms: Float[Tensor, " unit"] | None = None):
        n = len(ranks)
        self.ranks = torch.tensor(ranks, dtype=torch.int64)
        self.norms = torch.ones(n, dtype=torch.float64) if norms is None else norms.detach().double().cpu()
        if len(self.norms) != n:
            raise ValueError(f"{n} ranks and {len(self.norms)} norms: expected one of each for every unit")
        self.tokens = 0
        self.selected, self.opened = (torch.zeros(n, dtype=torch.int64) for _ in range(2))
        self.magnitude, self.max_act = (torch.zeros(n, dtype=torch.float64) for _ in range(2))

    def add(self, acts: Float[Tensor, "*batch unit"]) -> None:
        """Count dense acts, 0 where a unit is closed.

        Raises:
            ValueError: another number of units than the counter has, or acts that are not finite.
        """
        acts = acts.detach().flatten(0, -2)
        if acts.shape[-1] != len(self.ranks):
            raise ValueError(
                f"acts of {acts.shape[-1]} units for a counter of {len(self.ranks)}: give it its own map's"
            )
        tokens, units = acts.nonzero(as_tuple=True)
        self._count(len(acts), units, acts[tokens, units])

    def add_codes(self, indices: Int64[Tensor, "*batch k"], values: Float[Tensor, "*batch k"]) -> None:
        """Count a sparse code: for each token the units that were selected and their acts.

        Raises:
            ValueError: acts that are not finite.
            IndexError: an index of a unit that the counter does not have.
        """
        if indices.numel() and not 0 <= indices.min() <= indices.max() < len(self.ranks):
            raise IndexError(
                f"units are 0 to {len(self.ranks) - 1}, got {indices.min()}..{indices.max()}: make one counter a level"
            )
        self._count(indices.shape[:-1].numel(), indices.flatten(), values.detach().flatten())

    def _count(self, tokens: int, units: Tensor, acts: Tensor) -> None:
        units, magnitude = units.cpu(), acts.double().abs().cpu()
        if not magnitude.isfinite().all():
            bad = int((~magnitude.isfinite()).sum())
            raise ValueError(
                f"{bad} of {len(magnitude)} acts are not finite: look for nan or inf in the weights or in what they "
                "read"
            )
        n = len(self.ranks)
        selected = torch.bincount(units, minlength=n)
        self.tokens += tokens
        self.selected += selected
        self.opened += torch.bincount(units[magnitude != 0], minlength=n)
        self.magnitude += torch.bincount(units, weights=magnitude, minlength=n)
        self.max_act.scatter_reduce_(0, units, magnitude, "amax")

    def l0(self) -> float:
        """Mean number of open units at a token."""
        return int(self.opened.sum()) / self._seen()

    def active_rank(self) -> float:
        """Mean over tokens of the sum of the ranks of the open units."""
        return int((self.opened * self.ranks).sum()) / self._seen()

    def frequency(self) -> Float[Tensor, " unit"]:
        """Share of tokens at which each unit is open."""
        return self.opened.double() / self._seen()

    def mean_contribution(self) -> Float[Tensor, " unit"]:
        """Mean norm of what each unit writes when it is selected, |act| times its norm; nan where it never was."""
        return self.norms * self.magnitude / self.selected

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
            raise ValueError("no tokens have been counted yet: call add(acts) or add_codes(indices, values) first")
        return self.tokens

"""Streaming counts of which features fire, how often and how strongly: what every sparsity figure is computed from."""

import torch
from jaxtyping import Float
from torch import Tensor

from cayley_interp import LevelCodes


class ActivityCounter:
    """Counts over the codes of one layer, per level and feature; on the CPU, in int64 and float64.

    A feature is *selected* at a token when its index is listed there, *active* when its value is also not 0. Atoms have
    unit norm, so |value| is the norm of what the feature writes: its contribution.

        counter = ActivityCounter([1 << level.n for level in sae.levels])
        counter.add(sae.encode(x))
        counter.l0(0), counter.frequency(1)

    Attributes, the lists with one entry per level:
        tokens: tokens seen.
        selected, active: times each feature was selected, active; int64 [size].
        contribution: sum of |value| over selections; float64 [size].
        max_value: largest |value|; float64 [size], 0 where never active.
    """

    def __init__(self, level_sizes: list[int]):
        self.level_sizes = list(level_sizes)
        self.tokens = 0
        self.selected = [torch.zeros(size, dtype=torch.int64) for size in level_sizes]
        self.active = [torch.zeros(size, dtype=torch.int64) for size in level_sizes]
        self.contribution = [torch.zeros(size, dtype=torch.float64) for size in level_sizes]
        self.max_value = [torch.zeros(size, dtype=torch.float64) for size in level_sizes]

    def add(self, codes: tuple[LevelCodes, ...]) -> None:
        """Count the codes of one layer, one (indices, values) of shape [*batch, k] per level.

        Raises:
            ValueError: another number of levels than the counter has, or levels that disagree on the tokens.
            IndexError: an index outside its level.
        """
        tokens = {level.indices.shape[:-1].numel() for level in codes}
        if len(codes) != len(self.level_sizes) or len(tokens) != 1:
            raise ValueError(
                f"expected the codes of {len(self.level_sizes)} levels over the same tokens, got {len(codes)} levels "
                f"over {sorted(tokens)} tokens: make one counter per layer and give it that layer's codes"
            )
        flat = [(level.indices.flatten().cpu(), level.values.detach().flatten().cpu()) for level in codes]
        for i, (indices, _) in enumerate(flat):  # all checked before any is counted
            if indices.numel() and not 0 <= indices.min() <= indices.max() < self.level_sizes[i]:
                raise IndexError(
                    f"level {i} has features 0 to {self.level_sizes[i] - 1}, got {indices.min()}..{indices.max()}"
                )
        self.tokens += tokens.pop()
        for i, (indices, values) in enumerate(flat):
            size, magnitude = self.level_sizes[i], values.double().abs()
            self.selected[i] += torch.bincount(indices, minlength=size)
            self.active[i] += torch.bincount(indices[values != 0], minlength=size)
            self.contribution[i] += torch.bincount(indices, weights=magnitude, minlength=size)
            self.max_value[i].scatter_reduce_(0, indices, magnitude, "amax")

    def l0(self, level: int) -> float:
        """Mean number of nonzero values per token. Every feature writes one direction, so active rank <= L0."""
        return int(self.active[level].sum()) / self._seen()

    def frequency(self, level: int) -> Float[Tensor, " size"]:
        """Share of tokens at which each feature is active."""
        return self.active[level].double() / self._seen()

    def mean_contribution(self, level: int) -> Float[Tensor, " size"]:
        """Mean |value| of each feature over its selections; nan where it was never selected."""
        return self.contribution[level] / self.selected[level]

    def _seen(self) -> int:
        if self.tokens == 0:
            raise ValueError("no tokens have been counted yet: call add(codes) first")
        return self.tokens

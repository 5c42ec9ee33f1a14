"""Dead, zombie and dense features: one definition each, over the tokens an ActivityCounter has seen."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from analysis.sparsity import ActivityCounter

ZOMBIE_SHARE = 0.01
DENSE_FREQUENCY = 0.1


def dead(counter: ActivityCounter, level: int) -> Bool[Tensor, " size"]:
    """Features never active."""
    return counter.active[level] == 0


def zombie(counter: ActivityCounter, level: int) -> Bool[Tensor, " size"]:
    """Features that are selected, yet write under 1 % of what the level's median selected feature writes.

    Compared are mean contributions per selection; the median is over features selected at least once. One that is
    selected only ever with value 0 is a zombie and dead.
    """
    contribution = counter.mean_contribution(level)
    return contribution < ZOMBIE_SHARE * contribution.nanmedian()  # nan, never selected, compares as False


def dense(counter: ActivityCounter, level: int) -> Bool[Tensor, " size"]:
    """Features active at over 10 % of tokens."""
    return counter.frequency(level) > DENSE_FREQUENCY


@dataclass(frozen=True)
class LevelSummary:
    """What one level of one layer did: counts of features, L0 in features per token, frequency as a share of tokens."""

    n_features: int
    l0: float
    dead: int
    zombie: int
    dense: int
    median_frequency: float


def summarise(counter: ActivityCounter, level: int) -> LevelSummary:
    return LevelSummary(
        n_features=counter.level_sizes[level],
        l0=counter.l0(level),
        dead=int(dead(counter, level).sum()),
        zombie=int(zombie(counter, level).sum()),
        dense=int(dense(counter, level).sum()),
        median_frequency=counter.frequency(level).median().item(),
    )

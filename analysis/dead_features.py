"""Dead, zombie and dense features: one definition each, over the tokens that a UnitCounter has seen."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from analysis.sparsity import bits_per_token
from analysis.units import UnitCounter

ZOMBIE_SHARE = 0.01
DENSE_FREQUENCY = 0.1


def dead(counter: UnitCounter) -> Bool[Tensor, " unit"]:
    """Units never open."""
    return counter.opened == 0


def zombie(counter: UnitCounter) -> Bool[Tensor, " unit"]:
    """Units that are selected, yet write under 1 % of what the median selected unit writes.

    Compared are mean contributions per selection, in the norm of what is written; the median is over units selected at
    least once. One that is selected only ever with act 0 is a zombie and dead; dense acts have no such selections.
    """
    contribution = counter.mean_contribution()
    return contribution < ZOMBIE_SHARE * contribution.nanmedian()  # nan, never selected, compares as False


def dense(counter: UnitCounter) -> Bool[Tensor, " unit"]:
    """Units open at over 10 % of tokens."""
    return counter.frequency() > DENSE_FREQUENCY


@dataclass(frozen=True)
class LevelSummary:
    """What one level of one layer did: counts of features; L0 in features and code length in bits, both per token;
    frequency as a share of tokens.
    """

    n_features: int
    l0: float
    dead: int
    zombie: int
    dense: int
    median_frequency: float
    bits_per_token: float


def summarise(counter: UnitCounter) -> LevelSummary:
    return LevelSummary(
        n_features=len(counter.ranks),
        l0=counter.l0(),
        dead=int(dead(counter).sum()),
        zombie=int(zombie(counter).sum()),
        dense=int(dense(counter).sum()),
        median_frequency=counter.frequency().median().item(),
        bits_per_token=bits_per_token(counter),
    )

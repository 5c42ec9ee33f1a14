"""What keeps gates closed where nothing else does: penalties on the acts of ReLU and JumpReLU gates.

A unit's contribution is its gate times the Frobenius norm of what it writes: a penalty on gates alone would be escaped
by small gates and large transforms (Lindsey et al. 2025). TopK gates need none.

    norms = norms_at(penalty, map, step, held)      # exact every `norms_every` steps, `held` between them
    loss = mse + penalty_weight(penalty, step, steps) * penalty_of(penalty, map, pre, acts, norms)

A MOLT's norms cost sum_t rank_t^2 d products forward and again backward, whatever the gates: for many transforms more
than the transforms that are open. Held norms are lazy regularisation (Karras et al. 2020, "Analyzing and improving the
image quality of StyleGAN", appendix B) of the gradient that goes through them.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from molt_lens.sparse_map import SparseMap


@dataclass(frozen=True)
class Penalty:
    """One term of a training loss."""

    kind: Literal["none", "tanh", "l1", "l0"] = "none"
    """`tanh` of scale times contribution; `l1` of contributions; `l0`: squared distance to a target L0 (JumpReLU)."""
    weight: float = 1e-3
    """Weight of the penalty, from the end of its warm-up on."""
    warmup: float = 0.1
    """Share of the run over which the weight rises linearly from 0."""
    scale: float = 4.0
    """`tanh`: contributions well above 1 / scale all cost the same."""
    target: float = 8.0
    """`l0`: units open at a token."""
    norms_every: int = 1
    """`tanh`, `l1`: steps from one exact computation of the norms to the next; their gradient, then so many times as
    large, is the same on average."""


def starting_open_rate(penalty: Penalty, n_units: int, otherwise: float) -> float:
    """Share of tokens at which a unit opens before training: for a target L0, what it asks of each unit."""
    return min(otherwise, penalty.target / n_units) if penalty.kind == "l0" else otherwise


def penalty_weight(penalty: Penalty, step: int, total: int) -> float:
    """The weight at a step from 0 to total - 1."""
    rising = penalty.warmup * total
    return penalty.weight * (min(1.0, step / rising) if rising else 1.0)


def norms_at(penalty: Penalty, map: SparseMap, step: int, held: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """The norms that a penalty takes at a step.

    Every `norms_every` steps they are exact, `held` is set to them, and their gradient counts `norms_every` times; in
    between they are `held`, a constant. So are those of a penalty without norms.
    """
    if penalty.kind not in ("tanh", "l1") or step % penalty.norms_every:
        return held
    norms = map.norms()
    held.copy_(norms.detach())
    return held + penalty.norms_every * (norms - norms.detach())


def penalty_of(
    penalty: Penalty,
    map: SparseMap,
    pre: Float[Tensor, "token unit"],
    acts: Float[Tensor, "token unit"],
    norms: Float[Tensor, " unit"] | None = None,
) -> Float[Tensor, ""]:
    """The unweighted penalty, summed over units, mean over tokens.

    `l0` is (2 / target) (L0 - target)^2 of the batch's mean L0, as in the Gemma Scope 2 report.

    Args:
        norms: by default the map's, exact and with their gradient.

    Raises:
        ValueError: no such penalty, or `l0` for a gate without thresholds to move.
    """
    match penalty.kind:
        case "none":
            return acts.new_zeros(())
        case "l1" | "tanh":
            norms = map.norms() if norms is None else norms
            cost = acts * norms if penalty.kind == "l1" else (penalty.scale * acts * norms).tanh()
            return cost.sum(-1).mean()
        case "l0":
            if map.gate.spec != "jumprelu":
                raise ValueError(f"an l0 penalty moves the thresholds of a jumprelu gate, and {map.gate.spec} has none")
            l0 = map.gate.openness(pre, acts).sum(-1).mean()
            return 2 / penalty.target * (l0 - penalty.target).square()
    raise ValueError(f"no penalty is called {penalty.kind!r}: expected none, tanh, l1 or l0")

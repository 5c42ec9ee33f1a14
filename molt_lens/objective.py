"""What every replacement is trained on: its error in standardised coordinates; and what brings silent units back."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from molt_lens.sparse_map import SparseMap
from molt_lens.standardize import Replacement

REVIVAL = 0.02
"""By how much a silent unit's bias rises at a step: pre-activations start with deviation 1."""


class Fit(NamedTuple):
    """A batch on its way through a replacement, in standardised coordinates and with gradients."""

    mse: Float[Tensor, ""]
    """Mean over tokens and dimensions; the mean predictor has about 1."""
    pre: Float[Tensor, "token unit"]
    acts: Float[Tensor, "token unit"]
    recons: Float[Tensor, "token d_out"]
    target: Float[Tensor, "token d_out"]


def fit_of(replacement: Replacement, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> Fit:
    """What a replacement makes of raw pairs, the error included; under autocast it is taken in the dtype of y."""
    map = replacement.map
    x, target = replacement.input(x), replacement.output(y)
    pre = map.pre_acts(x)
    acts = map.gate(pre)
    recons = map.decode_reachable(acts, x, map.gate.reachable(pre, acts))
    mse = (recons.to(target.dtype) - target).square().mean()
    return Fit(mse, pre, acts, recons, target)


@torch.no_grad()
def revive_(map: SparseMap, silent: Bool[Tensor, " unit"]) -> None:
    """Raise the biases of units that have been closed for long: a closed unit has no gradient that could."""
    map.b_enc.add_(REVIVAL * silent)

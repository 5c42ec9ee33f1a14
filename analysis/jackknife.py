"""Standard errors over sequences: leave one out, and see by how much a figure moves.

Tokens of one sequence share their context and errors go together, so sequences are the independent units; a standard
error over tokens would be too small. The jackknife holds for any smooth figure of the sums over sequences, ratios such
as NMSE with the variance they divide by among them (Efron and Tibshirani 1993, ch. 11).
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def jackknife_error(left_out: Float[Tensor, " sequence"]) -> float:
    """Standard error of a figure, from its values with each sequence left out; nan for fewer than two.

    sqrt((S - 1) / S * sum_s (figure_s - their mean)^2): of a mean over sequences, std / sqrt(S).
    """
    S = len(left_out)
    if S < 2:
        return math.nan
    left_out = left_out.double()
    return ((S - 1) / S * (left_out - left_out.mean()).square().sum()).sqrt().item()


def ratio_error(sums: Float[Tensor, " sequence"], counts: Float[Tensor, " sequence"]) -> float:
    """Standard error of sum(sums) / sum(counts), both sums over each sequence: of a mean over tokens, or of a share."""
    return jackknife_error(leave_one_out(sums) / leave_one_out(counts))


def leave_one_out(sums: Float[Tensor, " sequence"]) -> Float[Tensor, " sequence"]:
    """The total without each sequence."""
    return sums.double().sum() - sums.double()


def sums_by_sequence(
    values: Float[Tensor, " token"], sequence: Int64[Tensor, " token"], n: int
) -> Float[Tensor, " sequence"]:
    """Float64 sums of a figure of each token over its sequence, 0 to n - 1."""
    return torch.zeros(n, dtype=torch.float64).index_add_(0, sequence.cpu(), values.double().cpu())

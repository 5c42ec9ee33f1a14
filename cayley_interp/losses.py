"""Losses of a model token by token, and how two models' losses on the same tokens differ."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from cayley_interp.model import token_losses


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over tokens, in nats, with its standard error."""

    mean: float
    standard_error: float
    n_sequences: int
    n_tokens: int


@torch.no_grad()
def window_losses(
    model: nn.Module,
    windows: Int64[Tensor, "n pos_plus_1"],
    batch_size: int,
    device: torch.device | str | None = None,
) -> Float64[Tensor, "n pos"]:
    """Loss of every predicted token in nats, float64, on the CPU.

    The model maps token ids to logits, bare or wrapped. It runs in eval mode, on `device` if one is given, and comes
    back in the mode it was in.

    Raises:
        ValueError: windows that are not [n, pos + 1] with n, pos >= 1.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"expected windows of shape [n, pos + 1] with n, pos >= 1, got {tuple(windows.shape)}")
    device = next(model.parameters()).device if device is None else device
    was_training = model.training
    model.to(device).eval()
    try:
        return torch.cat(
            [token_losses(model(w[:, :-1]), w[:, 1:]).cpu().double() for w in windows.to(device).split(batch_size)]
        )
    finally:
        model.train(was_training)


def paired_difference(a: Float64[Tensor, "n pos"], b: Float64[Tensor, "n pos"]) -> PairedDifference:
    """Mean of a - b and its standard error over sequence means.

    Tokens within a sequence share their context, so the sequences are the independent units: a standard error over
    tokens would be too small. It is nan for a single sequence.

    Raises:
        ValueError: losses of different shapes.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"expected losses of the same windows, both [n, pos]; got {tuple(a.shape)}, {tuple(b.shape)}")
    by_sequence = (a - b).mean(dim=1)
    n = len(by_sequence)
    error = (by_sequence.std() / n**0.5).item() if n > 1 else float("nan")
    return PairedDifference(by_sequence.mean().item(), error, n, a.numel())

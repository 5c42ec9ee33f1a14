"""What each MLP of a model is worth: the loss with that MLP's output at zero, above the model's own.

    losses = window_losses(model, val_windows, 16)
    for layer, worth in enumerate(mlp_worths(model, val_windows, losses, 16)):
        print(layer, worth.mean, worth.standard_error, worth_nothing(worth))

Sparsity cannot tell: a bottleneck may feed an MLP with lively features though the MLP writes nothing to the residual
stream. Zero ablation of one layer at a time; layers that stand in for one another are each worth less than together.
"""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from analysis.features import Progress
from cayley_interp import CayleyGPT
from cayley_interp.losses import PairedDifference, paired_difference, window_losses

WORTH_TOKENS = 16_384
"""Predicted tokens at most, in whole windows."""

STANDARD_ERRORS = 3
"""An MLP worth no more than so many of its standard errors has not been seen to lower the loss."""


def mlp_worths(
    model: CayleyGPT,
    windows: Int64[Tensor, "n pos_plus_1"],
    losses: Float64[Tensor, "n pos"],
    batch_size: int,
    progress: Progress | None = None,
) -> list[PairedDifference]:
    """For each layer, cross entropy with its MLP's output at zero minus the model's own, in nats per token.

    Over windows spread evenly over all, paired by sequence; one forward pass of these a layer. The model comes back as
    it was.

    Args:
        losses: the model's own on `windows`, what `window_losses` gives.

    Raises:
        ValueError: no windows, or losses of other windows.
    """
    if len(windows) == 0 or losses.shape != (len(windows), windows.shape[1] - 1):
        raise ValueError(
            f"windows of shape {tuple(windows.shape)} and losses of {tuple(losses.shape)}: expected [n, pos + 1] and "
            "[n, pos] with n >= 1, the losses of these windows"
        )
    n = min(len(windows), max(1, WORTH_TOKENS // (windows.shape[1] - 1)))
    rows = torch.arange(n) * len(windows) // n
    worths = []
    for block in model.blocks():
        handle = block.mlp.register_forward_hook(_to_zero)
        try:
            worths.append(paired_difference(window_losses(model, windows[rows], batch_size), losses[rows]))
        finally:
            handle.remove()
        if progress is not None:
            progress("worth of each MLP", len(worths) / len(model.blocks()))
    return worths


def _to_zero(_mlp: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def worth_nothing(worth: PairedDifference) -> bool:
    """Whether the loss does not notice the MLP; never where a single sequence leaves the standard error unknown."""
    return worth.mean <= STANDARD_ERRORS * worth.standard_error

"""Optimisers and their schedule: Muon for 2-D hidden weights, AdamW for embeddings, norms and biases."""

import torch
from torch import nn

from training.recipes import OptimConfig


def make_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW] over the trainable parameters; each group knows its `peak_lr` and `min_lr`.

    An embedding is 2-D but is a table of vectors, not a map between spaces: orthogonalising it makes no sense, so it
    goes to AdamW with the norms and the bottleneck's biases (Keller Jordan, Muon, 2024).
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in tables]
    others = [p for p in trainable if p.ndim != 2 or id(p) in tables]
    muon = torch.optim.Muon(
        matrices,
        lr=config.muon_lr,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,  # torch's default is 0.1, the reference implementation's 0
    )
    adamw = torch.optim.AdamW(others, lr=config.adamw_lr, betas=config.adamw_betas, weight_decay=0.0)
    muon.param_groups[0].update(peak_lr=config.muon_lr, min_lr=config.muon_min_lr)
    adamw.param_groups[0].update(peak_lr=config.adamw_lr, min_lr=config.adamw_min_lr)
    return [muon, adamw]


def warmdown_start(total: int, warmdown_frac: float) -> int:
    """First step of the warm-down: the published 12,716 steps with frac 0.9 start at 1,271."""
    return int(total * (1 - warmdown_frac) + 1e-9)


def linear_warmdown(step: int, total: int, *, warmup: int, warmdown_frac: float, peak: float, minimum: float) -> float:
    """Learning rate of step `step` of `total`: 0 -> peak over `warmup` steps, flat, then linear to `minimum`.

    Step 0 has the rate of the end of its interval, peak / warmup, so that no step is wasted; step `total` would have
    exactly `minimum`.
    """
    start = warmdown_start(total, warmdown_frac)
    rate = peak
    if step >= start and total > start:
        rate = peak + (minimum - peak) * (step - start) / (total - start)
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate


def set_learning_rates(
    optimizers: list[torch.optim.Optimizer], config: OptimConfig, step: int, total: int
) -> list[float]:
    """Put every group at its rate of this step; returns them, Muon's first."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = linear_warmdown(
            step,
            total,
            warmup=config.warmup,
            warmdown_frac=config.warmdown_frac,
            peak=group["peak_lr"],
            minimum=group["min_lr"],
        )
    return [group["lr"] for group in groups]

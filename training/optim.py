"""Optimisers and their schedule: Muon for 2-D hidden weights, AdamW for embeddings, norms and biases."""

from dataclasses import dataclass

import torch
from torch import nn

from training.recipes import OptimConfig, RunConfig


@dataclass(frozen=True)
class Schedule:
    """The steps between which the learning rates fall from their peak to their minimum; at `end` the run stops."""

    start: int
    end: int


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


def first_schedule(config: RunConfig) -> Schedule:
    """The schedule at step 0: the planned one, or for a cold stop a flat one until `cold_stop` gives it an end."""
    if config.target_val_loss is not None:
        return Schedule(config.max_steps, config.max_steps)
    return Schedule(warmdown_start(config.max_steps, config.optim.warmdown_frac), config.max_steps)


def cold_stop(schedule: Schedule, config: RunConfig, step: int, val_loss: float) -> tuple[Schedule, str | None]:
    """What the validation loss after `step` steps makes of a run that is to end, annealed, at `target_val_loss`.

    Flat until the loss is within `target_margin` of the target; then a warm-down that is `warmdown_frac` of the whole
    run as it will have been (less if `max_steps` cuts it); the end when that is done or the target is reached.

    Returns:
        The schedule from here on, and a sentence for the log if something was decided.
    """
    target = config.target_val_loss
    if target is None:
        return schedule, None
    if step < schedule.start:
        if step < config.optim.warmup or not val_loss <= target + config.target_margin:
            return schedule, None
        frac = config.optim.warmdown_frac
        end = min(step + max(1, round(step * frac / (1 - frac))), config.max_steps)
        cut = " (cut short by max_steps)" if end == config.max_steps else ""
        return Schedule(step, end), (
            f"cold stop: within {config.target_margin} of the target {target}, warm-down to step {end:,}{cut}"
        )
    if schedule.start == schedule.end:
        return schedule, (
            f"NOT ANNEALED: max_steps reached, and no validation loss was within {config.target_margin} of the target "
            f"{target}: raise --max-steps or --target-val-loss in a new run"
        )
    if val_loss <= target:
        return Schedule(schedule.start, step), f"cold stop: the target {target} is reached"
    if step == schedule.end:
        return schedule, f"cold stop: the warm-down is done, {val_loss - target:.4f} above the target {target}"
    return schedule, None


def linear_warmdown(step: int, schedule: Schedule, *, warmup: int, peak: float, minimum: float) -> float:
    """Learning rate of a step: 0 -> peak over `warmup` steps, flat, then linear to `minimum` by the schedule.

    Step 0 has the rate of the end of its interval, peak / warmup, so that no step is wasted; step `schedule.end` would
    have exactly `minimum`.
    """
    start, end = schedule.start, schedule.end
    rate = peak
    if step >= start and end > start:
        rate = peak + (minimum - peak) * (step - start) / (end - start)
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate


def set_learning_rates(
    optimizers: list[torch.optim.Optimizer], warmup: int, schedule: Schedule, step: int
) -> list[float]:
    """Put every group at its rate of this step; returns them, Muon's first."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = linear_warmdown(step, schedule, warmup=warmup, peak=group["peak_lr"], minimum=group["min_lr"])
    return [group["lr"] for group in groups]

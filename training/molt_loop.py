"""Training a replacement: steps on standardised activations that can be killed at any moment and go on bit for bit."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.units import UnitCounter
from molt_lens.activations import ActivationStore
from molt_lens.objective import fit_of, revive_
from molt_lens.penalties import norms_at, penalty_of, penalty_weight
from molt_lens.standardize import Replacement
from training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from training.loop import TrainingDiverged
from training.molt_recipes import MoltRun
from training.optim import Schedule, linear_warmdown


class MoltTrainer:
    """One run: `MoltTrainer(config, replacement, store, run_dir).run(log, progress)`."""

    def __init__(self, config: MoltRun, replacement: Replacement, store: ActivationStore, run_dir: Path):
        self.config, self.replacement, self.store, self.run_dir = config, replacement, store, run_dir
        self.map = replacement.map
        self.device = self.map.b_dec.device
        self.optimizer = torch.optim.Adam(self.map.parameters(), lr=config.peak_lr, betas=config.optim.betas)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.silent = torch.zeros(self.map.n_units, dtype=torch.int64, device=self.device)
        self.norms = self.map.b_dec.new_zeros(self.map.n_units)  # as the penalty last saw them
        self.step = 0

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none yet."""
        found = checkpoints(self.run_dir)
        if not found:
            return False
        state = load_checkpoint(found[-1], self.replacement)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.silent.copy_(state["silent"])
        self.norms.copy_(state["norms"])
        self.store.load_state_dict(state["store"])
        self.step = state["step"]
        return True

    def run(
        self,
        log: Callable[[dict[str, Any]], None] = lambda _: None,
        progress: Callable[[int, float, float], None] = lambda *_: None,
    ) -> None:
        """Train to the end; `log` takes a record a line, `progress` (step, standardised MSE, tokens a second).

        Raises:
            TrainingDiverged: before any weight is touched by the step that went wrong.
        """
        config = self.config
        self.replacement.train()
        batches: Iterator[tuple[Tensor, Tensor]] = iter(self.store)
        counter, seconds = UnitCounter(self.map.ranks), 0.0
        while self.step < config.steps:
            x, y = next(batches)
            start = time.perf_counter()  # the host's own forward passes are the store's to time
            record = self._train_step(x.to(self.device), y.to(self.device), counter)
            self.step += 1
            seconds += time.perf_counter() - start
            progress(self.step, record["mse"], counter.tokens / seconds)
            if self._is_due(config.log_every):
                tokens = {"step": self.step, "tokens": self.step * config.batch_size}
                log(tokens | record | gates_record(counter) | {"tokens_per_second": counter.tokens / seconds})
                counter, seconds = UnitCounter(self.map.ranks), 0.0
            if self._is_due(config.checkpoint_every):
                self.save()
        self.replacement.eval()

    def _is_due(self, every: int) -> bool:
        return self.step == self.config.steps or self.step % every == 0

    def _train_step(self, x: Tensor, y: Tensor, counter: UnitCounter) -> dict[str, float]:
        config = self.config
        lr = self._set_learning_rate()
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        with torch.autocast(self.device.type, dtype=low, enabled=low is not None):
            fit = fit_of(self.replacement, x, y)
            norms = norms_at(config.penalty, self.map, self.step, self.norms)
            penalty = penalty_of(config.penalty, self.map, fit.pre, fit.acts, norms)
            weight = penalty_weight(config.penalty, self.step, config.steps)
            loss = fit.mse + weight * penalty
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.map.parameters(), config.optim.clip or math.inf).item()
        if not math.isfinite(loss.item()) or not (math.isfinite(grad_norm) or self.scaler.is_enabled()):
            raise TrainingDiverged(self._divergence_message(loss.item(), grad_norm))
        self.scaler.step(self.optimizer)  # skips a step whose scaled gradients overflowed
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._revive((fit.acts != 0).any(0))
        counter.add(fit.acts.detach())
        return {
            "loss": loss.item(),
            "mse": fit.mse.item(),
            "penalty": penalty.item(),
            "penalty_weight": weight,
            "grad_norm": grad_norm,
            "lr": lr,
        }

    def _set_learning_rate(self) -> float:
        optim, steps = self.config.optim, self.config.steps
        schedule = Schedule(round(steps * (1 - optim.decay)), steps)
        rate = linear_warmdown(
            self.step, schedule, warmup=max(1, round(optim.warmup * steps)), peak=self.config.peak_lr, minimum=0.0
        )
        self.optimizer.param_groups[0]["lr"] = rate
        return rate

    @torch.no_grad()
    def _revive(self, opened: Tensor) -> None:
        """Raise the biases of units that have been closed for long."""
        self.silent.add_(self.config.batch_size).mul_(~opened)
        if self.config.revive_after:
            revive_(self.map, self.silent >= self.config.revive_after)

    def save(self) -> None:
        """Write a checkpoint of the state between two steps."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "silent": self.silent,
            "norms": self.norms,
            "store": self.store.state_dict(),
        }
        save_checkpoint(self.run_dir, self.step, self.replacement, state, self.config.keep_checkpoints)

    def _divergence_message(self, loss: float, grad_norm: float) -> str:
        found = checkpoints(self.run_dir)
        kept = f"The last good checkpoint is {found[-1]}." if found else "There was no checkpoint yet."
        return (
            f"the loss of step {self.step} is {loss} and its gradient norm {grad_norm}: stopped before the weights "
            f"were touched. {kept}\nTry a lower --optim.lr, or --precision fp32, in a new run."
        )


def gates_record(counter: UnitCounter) -> dict[str, Any]:
    """L0 with the active rank beside it, by rank where ranks differ, and the share of units that opened."""
    record: dict[str, Any] = {
        "l0": counter.l0(),
        "active_rank": counter.active_rank(),
        "opened": counter.alive(),
        "max_frequency": counter.max_frequency(),
    }
    if len(groups := counter.by_rank()) > 1:
        record["l0_by_rank"] = {str(rank): group["l0"] for rank, group in groups.items()}
    return record

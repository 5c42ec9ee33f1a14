"""The training loop: steps that do not depend on how many processes share them, and that can be killed at any moment.

A step reads `batch_size * grad_accum` sequences at one position of the data, whatever the number of processes; the
bottleneck's statistics move once a step, over all of it. So the state between steps is complete: weights, optimisers,
RNG and one integer for the data.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from cayley_interp import CayleyGPT
from cayley_interp.model import token_losses
from training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from training.data import Corpus
from training.flops import flops_per_token, peak_flops
from training.optim import Schedule, cold_stop, first_schedule, make_optimizers, set_learning_rates
from training.recipes import RunConfig

SILENT_TOKENS = 100_000
"""A feature that no token of the last so many activated counts as silent in the training log."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer finite; the last checkpoint is from before."""


class Trainer:
    """One run: `Trainer(config, corpus, run_dir, accelerator).run(log, progress)`."""

    def __init__(self, config: RunConfig, corpus: Corpus, run_dir: Path, accelerator: Accelerator):
        self.config, self.corpus, self.run_dir, self.accelerator = config, corpus, run_dir, accelerator
        torch.manual_seed(config.seed)
        self.model = CayleyGPT(config.model).to(accelerator.device)
        if config.precision == "fp64":
            self.model.double()
        self.flops_per_token = flops_per_token(config.model)
        self.optimizers = make_optimizers(self.model, config.optim)
        compiled = torch.compile(self.model, fullgraph=True) if config.compile else self.model
        self.forward: Callable[[Tensor], Tensor] = accelerator.prepare(compiled)
        self.peak = peak_flops(accelerator.device, run_precision(config, accelerator.device.type))
        self.step = 0
        self.schedule = first_schedule(config)

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none yet."""
        found = checkpoints(self.run_dir)
        if not found:
            return False
        state = load_checkpoint(found[-1], self.model)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.corpus.train.load_state_dict(state["data"])
        self.step = state["step"]
        if self.config.target_val_loss is not None:
            self.schedule = Schedule(*state["schedule"])
        return True

    def run(
        self,
        log: Callable[[dict[str, Any]], None] = lambda _: None,
        progress: Callable[[int, float, float], None] = lambda *_: None,
    ) -> None:
        """Train to the end of the schedule; `log` takes a record a line, `progress` (step, loss, tokens a second).

        Raises:
            TrainingDiverged: before any weight is touched by the step that went wrong.
        """
        config = self.config
        self.model.train()
        losses: list[float] = []
        seconds = 0.0
        while self.step < self.schedule.end:
            start = time.perf_counter()
            rates = set_learning_rates(self.optimizers, config.optim.warmup, self.schedule, self.step)
            loss, grad_norm = self._train_step()
            self.step += 1
            losses.append(loss)
            seconds += time.perf_counter() - start
            speed = len(losses) * config.tokens_per_step / seconds
            progress(self.step, loss, speed)
            # Before the step is logged or saved: a cold stop can make it the last.
            validation = self._validate() if self._is_due(config.eval_every) else None
            if self._is_due(config.log_every):
                record = {
                    "step": self.step,
                    "tokens": self.step * config.tokens_per_step,
                    "train_loss": sum(losses) / len(losses),
                    "lr_muon": rates[0],
                    "lr_adamw": rates[1],
                    "grad_norm": grad_norm,
                    "tokens_per_second": speed,
                    "mfu": speed * self.flops_per_token / (self.peak.flops * self.accelerator.num_processes),
                }
                log(record | self._silent_features())
                losses, seconds = [], 0.0
            if validation is not None:
                log(validation)
            if self._is_due(config.checkpoint_every):
                self.save()

    def _is_due(self, every: int) -> bool:
        return self.step == self.schedule.end or self.step % every == 0

    def _validate(self) -> dict[str, Any]:
        """The record of a validation, after the schedule has heard of it."""
        val_loss = self.validation_loss()
        self.schedule, decision = cold_stop(self.schedule, self.config, self.step, val_loss)
        record = {"step": self.step, "val_loss": val_loss}
        if decision is not None:
            start, end = self.schedule.start, self.schedule.end
            return record | {"decision": decision, "warmdown_start": start, "warmdown_end": end}
        return record

    def _train_step(self) -> tuple[float, float]:
        """One optimiser step; its mean loss over all processes and its gradient norm."""
        config, accelerator = self.config, self.accelerator
        micro_steps = config.grad_accum // accelerator.num_processes
        position = self.step * config.batch_size * config.grad_accum
        position += accelerator.process_index * micro_steps * config.batch_size
        total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        for i in range(micro_steps):
            windows = self.corpus.train.batch(position + i * config.batch_size, config.batch_size)
            windows = windows.to(accelerator.device)
            # Gradients are averaged over the processes once, with the last micro-batch.
            with nullcontext() if i == micro_steps - 1 else accelerator.no_sync(self.forward):
                with accelerator.autocast():
                    loss = token_losses(self.forward(windows[:, :-1]), windows[:, 1:]).mean() / micro_steps
                accelerator.backward(loss)
            total += loss.detach()
        loss = self._over_processes(total, "mean").item()
        limit = config.optim.clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingDiverged(self._divergence_message(loss, grad_norm))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for bottleneck in self.model.bottlenecks():
            bottleneck.update_statistics()
        return loss, grad_norm

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over the first `val_tokens` of the validation split, shared among the processes."""
        self.model.eval()
        accelerator, size = self.accelerator, self.config.batch_size
        mine = self.validation_windows()[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        for batch in mine.split(size):
            with accelerator.autocast():
                losses = self.model.loss(batch.to(accelerator.device))
            total += torch.stack((losses.double().sum(), losses.new_tensor(losses.numel()).double()))
        self.model.train()
        loss, tokens = self._over_processes(total, "sum").tolist()
        return loss / tokens

    def validation_windows(self) -> Tensor:
        """[n, n_ctx + 1] windows of the validation split, as many as `val_tokens` asks for or there are."""
        n = max(1, self.config.data.val_tokens // self.config.model.n_ctx)
        return torch.stack([self.corpus.val[i] for i in range(min(n, len(self.corpus.val)))])

    def save(self) -> None:
        """Write a checkpoint of the state between two steps."""
        if self.accelerator.is_main_process:
            state = {
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "data": self.corpus.train.state_dict(),
                "schedule": [self.schedule.start, self.schedule.end],
            }
            save_checkpoint(self.run_dir, self.step, self.model, state, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _over_processes(self, total: Tensor, how: str) -> Tensor:
        reduced = self.accelerator.reduce(total, how)
        assert isinstance(reduced, Tensor)  # accelerate's signature covers nested containers
        return reduced

    def _silent_features(self) -> dict[str, dict[str, float]]:
        """Share of the features of each "layer.level" that the last SILENT_TOKENS tokens left unused."""
        if self.step * self.config.tokens_per_step < SILENT_TOKENS:
            return {}
        shares: dict[str, float] = {}
        for layer, bottleneck in enumerate(self.model.bottlenecks()):
            silent = bottleneck.tokens_since_active >= SILENT_TOKENS
            for level, part in enumerate(silent.split([1 << level.n for level in bottleneck.levels])):
                shares[f"{layer}.{level}"] = part.float().mean().item()
        return {"silent": shares} if shares else {}

    def _divergence_message(self, loss: float, grad_norm: float) -> str:
        found = checkpoints(self.run_dir)
        kept = f"The last good checkpoint is {found[-1]}." if found else "There was no checkpoint yet."
        return (
            f"the loss of step {self.step} is {loss} and its gradient norm {grad_norm}: stopped before the weights "
            f"were touched. {kept}\nTry a lower --muon-lr and --adamw-lr, a longer --warmup, --clip 1.0, or "
            f"--precision fp32, in a new run."
        )


def run_precision(config: RunConfig, device: str) -> str:
    """bf16, fp32 or fp64: `auto` is bf16 on a GPU and fp32 elsewhere."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device == "cuda" else "fp32"


def make_accelerator(config: RunConfig) -> Accelerator:
    """Processes, device and precision; statistics are synchronised by the bottlenecks themselves."""
    gpu = torch.cuda.is_available() and config.device in ("auto", "cuda")
    precision = run_precision(config, "cuda" if gpu else "cpu")
    return Accelerator(
        cpu=config.device == "cpu" or (config.device == "auto" and not gpu),
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )

"""Tokens a second of the tiny recipe's training step against the same backbone without the bottleneck.

python -m tests.benchmarks.bench_training
"""

import statistics
from collections.abc import Callable

import torch

from cayley_interp import CayleyGPT
from cayley_interp.model import token_losses
from tests.benchmarks.measure import interleaved, milliseconds, publish
from training.optim import make_optimizers
from training.recipes import RECIPES

CASES = ("tiny-vanilla", "tiny", "tiny-random")


def step_of(recipe: str) -> Callable[[], None]:
    """A whole optimiser step: forward, backward, clipping, Muon, AdamW, statistics."""
    _, run = RECIPES[recipe]
    torch.manual_seed(0)
    model = CayleyGPT(run.model).train()
    optimizers = make_optimizers(model, run.optim)
    windows = torch.randint(run.model.d_vocab, (run.batch_size, run.model.n_ctx + 1))

    def step() -> None:
        token_losses(model(windows[:, :-1]), windows[:, 1:]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for bottleneck in model.bottlenecks():
            bottleneck.update_statistics()

    return step


def main() -> None:
    times = interleaved({case: step_of(case) for case in CASES}, rounds=40)
    base = statistics.median(times["tiny-vanilla"])
    tokens = RECIPES["tiny"][1].tokens_per_step
    rows = [
        {
            "recipe": case,
            "ms a step, median (range)": milliseconds(times[case]),
            "tokens/s": f"{tokens / statistics.median(times[case]):,.0f}",
            "of tiny-vanilla": f"{base / statistics.median(times[case]):.2f}x",
        }
        for case in CASES
    ]
    publish("bench_training", "Training step of the tiny recipe and its controls, fp32", rows, ["Random token ids."])


if __name__ == "__main__":
    main()

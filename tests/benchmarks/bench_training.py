"""Training steps of a Cayley-GPT against the same backbone without the bottleneck, as they are and compiled."""

from dataclasses import replace

import torch

from cayley_interp import CayleyGPT
from cayley_interp.model import token_losses
from tests.benchmarks.measure import Bound, Call, Group
from training.flops import flops_per_token
from training.optim import make_optimizers
from training.recipes import RECIPES, RunConfig

NOTES = [
    "Training steps: forward, backward, clipping, Muon, AdamW, statistics; random token ids. *of the bound* is model "
    "FLOPs utilisation against the rate of a plain GEMM: the backbone's own FLOPs, the bottleneck's not counted.",
]

RECIPES_OF = {
    "cpu": ("cayley-tiny-2L-sotu", "tiny"),
    "cuda": ("cayley-small-2L-mlp_in-20B",),
}
"""Of each device, with the backbone that each is measured against."""
STEPS = {"cpu": 1, "cuda": 20}
"""Of one call: ten calls on a GPU are the 200 steps that utilisation is measured over."""


def step_of(run: RunConfig, device: str, compiled: bool) -> Call:
    """Whole optimiser steps, each of one micro-batch."""
    torch.manual_seed(0)
    model = CayleyGPT(run.model).to(device).train()
    forward = torch.compile(model, fullgraph=True) if compiled else model
    optimizers = make_optimizers(model, run.optim)
    windows = torch.randint(run.model.d_vocab, (run.batch_size, run.model.n_ctx + 1), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            token_losses(forward(windows[:, :-1]), windows[:, 1:]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for bottleneck in model.bottlenecks():
            bottleneck.update_statistics()

    def call() -> None:
        for _ in range(STEPS[device]):
            step()

    return call


def groups(device: str) -> list[Group]:
    return [group(device, name) for name in RECIPES_OF[device]]


def group(device: str, name: str) -> Group:
    _, run = RECIPES[name]
    vanilla = replace(run, model=replace(run.model, levels=None))
    runs = {"without bottleneck": vanilla, "with bottleneck": run}
    if run.model.dictionary == "gold" and device == "cpu":
        runs["with random signs"] = replace(run, model=replace(run.model, dictionary="random"))
    cases = {what: lambda own=own: step_of(own, device, compiled=False) for what, own in runs.items()}
    for what in ("without bottleneck", "with bottleneck"):
        cases[f"{what}, compiled"] = lambda own=runs[what]: step_of(own, device, compiled=True)
    tokens = run.batch_size * run.model.n_ctx
    shape = f"{name}: {tokens:,} tokens a step, {run.model.n_layers} layers, d={run.model.d_model}"
    bound = Bound(flops=STEPS[device] * tokens * flops_per_token(run.model))
    dtype, rounds = ("bf16", 10) if device == "cuda" else ("fp32", 15)
    return Group("Training step", shape, dtype, cases, bound, STEPS[device] * tokens, rounds)

"""Every named run as one complete, frozen config: a Python value, no inheritance and no yaml.

The published figures come from the model cards of the `cayley-*-mlp_in-20B` campaign (docs/design.md says which
figures are on the cards and which are read by analogy). `tests/training/test_recipes.py` holds each against them.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cayley_interp import CayleyGPTConfig
from cayley_interp.kernels import Backend


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    data: str = "sotu"
    """`sotu`; a file, folder or glob of .txt, .jsonl or .parquet; `hf:ID[:CONFIG]`, streamed; or a shard folder."""
    tokenizer: str = "bpe"
    """`bpe` trains a byte-level BPE of `d_vocab` entries on the training split; `gpt2`; or a tokenizer.json."""
    val_fraction: float = 0.05
    """Share of the documents held out for validation, chosen by a hash of each document's text."""
    val_tokens: int = 65_536
    """Validation tokens that losses and features are measured on (fewer if the split is smaller)."""


@dataclass(frozen=True)
class OptimConfig:
    """Muon for the 2-D hidden weights, AdamW for embeddings, norms and biases, one shape of schedule for both."""

    muon_lr: float = 2e-2
    """Peak learning rate of Muon (spectral norm per update, scaled by sqrt(max(1, rows / columns)))."""
    muon_min_lr: float = 2e-4
    """Muon's learning rate at the last step."""
    adamw_lr: float = 3e-3
    """Peak learning rate of AdamW."""
    adamw_min_lr: float = 3e-5
    """AdamW's learning rate at the last step."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon."""
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """Decoupled weight decay of Muon's matrices; embeddings, norms and biases have none."""
    warmup: int = 200
    """Steps of linear warm-up from 0 to the peak."""
    warmdown_frac: float = 0.5
    """Share of the run, at its end, in which the learning rates fall linearly to their minimum."""
    clip: float = 1.0
    """Largest gradient norm; 0 leaves gradients as they are."""


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete."""

    name: str
    """Name of the recipe: the run folder is called after it."""
    model: CayleyGPTConfig
    """The language model and its bottleneck."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimisers and their schedule."""
    max_steps: int = 1_000
    """Optimiser steps; the schedule is laid out over them."""
    target_val_loss: float | None = None
    """Cold stop: end, annealed, at this validation loss (nats per token) instead of at `max_steps`, then the most."""
    target_margin: float = 0.2
    """Cold stop: the warm-down starts once the validation loss is within this of the target: what it should bring."""
    batch_size: int = 16
    """Sequences in one micro-batch on one process."""
    grad_accum: int = 1
    """Micro-batches in one step over all processes together: a step is the same whatever the number of processes."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; `auto` takes a GPU where there is one."""
    backend: Backend = "auto"
    """Kernels of the bottleneck: `auto` is Triton on a GPU where it is installed, else `torch`; `triton` insists."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """`auto` is bf16 autocast on a GPU and fp32 elsewhere."""
    compile: bool = False
    """Compile the model with torch.compile, as one graph."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between validation losses."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Experiment tracker fed beside metrics.jsonl."""
    out: Path | None = None
    """Run folder; by default runs/NAME-DATE-TIME."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.model.n_ctx


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """The RunConfig that `dataclasses.asdict` made `values` of, after a round through JSON.

    Raises:
        TypeError: a field is unknown or missing.
    """
    optim = OptimConfig(**(values["optim"] | {"adamw_betas": tuple(values["optim"]["adamw_betas"])}))
    out = None if values["out"] is None else Path(values["out"])
    model, data = CayleyGPTConfig(**values["model"]), DataConfig(**values["data"])
    fields: dict[str, Any] = values | {"model": model, "data": data, "optim": optim, "out": out}
    return RunConfig(**fields)


TINY = RunConfig(
    name="tiny",
    model=CayleyGPTConfig(
        n_layers=4, n_heads=4, d_model=128, n_ctx=128, d_vocab=4096, levels="7,8,0;11,16,32", revive_after=10_000
    ),
    # The whole validation split: a rare feature can look dead on half of it.
    data=DataConfig(val_tokens=131_072),
    # Muon at a third of AdamW's rate, with weight decay: in lockstep, as the published small models, the residual
    # stream grows along a direction that standardised scores do not see, until MLPs have nothing left to read
    # (docs/log.md). Of the variants tried against each other this one has the lowest loss (docs/results/ablation.md).
    optim=OptimConfig(
        muon_lr=4e-3, muon_min_lr=4e-5, adamw_lr=1.2e-2, adamw_min_lr=1.2e-4, warmup=50, weight_decay=0.1
    ),
    max_steps=700,
    eval_every=350,
)

# The pair that ships in the package: as many parameters as fit 8 MB in float32, twice over the speeches.
BUNDLED = replace(
    TINY,
    name="cayley-tiny-2L-sotu",
    model=CayleyGPTConfig(
        n_layers=6, n_heads=4, d_model=128, n_ctx=256, d_vocab=4096, levels="7,8,0;12,16,32", revive_after=10_000
    ),
    batch_size=8,
    max_steps=2_500,
    eval_every=250,
    checkpoint_every=250,
)

SMALL = CayleyGPTConfig(n_layers=12, n_heads=8, d_model=1024, n_ctx=1024, d_vocab=50304)
LARGE = CayleyGPTConfig(n_layers=24, n_heads=16, d_model=2048, n_ctx=1024, d_vocab=50304)
FINEWEB = DataConfig(data="hf:HuggingFaceFW/fineweb-edu:sample-100BT", tokenizer="gpt2", val_tokens=1_048_576)

# 12,716 steps of 32 x 48 x 1,024 = 1,572,864 tokens: 20.0B.
CAMPAIGN_20B = RunConfig(
    name="",
    model=SMALL,
    data=FINEWEB,
    max_steps=12_716,
    batch_size=32,
    grad_accum=48,
    checkpoint_every=500,
    eval_every=500,
)
# "Lockstep": Muon and AdamW share one learning rate.
SMALL_OPTIM = OptimConfig(
    muon_lr=1.2e-2, muon_min_lr=1.5e-4, adamw_lr=1.2e-2, adamw_min_lr=1.5e-4, warmup=200, warmdown_frac=0.9
)
LARGE_OPTIM = OptimConfig(
    muon_lr=8e-3, muon_min_lr=1e-4, adamw_lr=3e-4, adamw_min_lr=1e-5, warmup=200, warmdown_frac=0.5
)

RECIPES: dict[str, tuple[str, RunConfig]] = {
    run.name: (line, run)
    for line, run in [
        ("4 layers, d=128, 2 levels, on the speeches that ship with it: minutes on two CPU cores", TINY),
        (
            "the same backbone, data and steps without the bottleneck",
            replace(TINY, name="tiny-vanilla", model=replace(TINY.model, levels=None)),
        ),
        (
            "control: tiny with random signs in place of the algebraic ones",
            replace(TINY, name="tiny-random", model=replace(TINY.model, dictionary="random")),
        ),
        ("the bundled model: 6 layers, d=128, 4,096 leaves, 5M tokens: half an hour on two CPU cores", BUNDLED),
        (
            "its partner without the bottleneck, ended by a cold stop at the same validation loss",
            replace(
                BUNDLED,
                name="vanilla-tiny-sotu",
                model=replace(BUNDLED.model, levels=None),
                # Where cayley-tiny-2L-sotu ended; its own warm-down brought 0.40 nats, a shorter run's brings less.
                target_val_loss=4.0493,
                target_margin=0.36,
                eval_every=50,
                checkpoint_every=50,
                keep_checkpoints=1_000,
            ),
        ),
        (
            "12L d=1024, 10,16,0;15,32,256, 20B tokens of FineWeb-Edu (published val loss 3.1671)",
            replace(
                CAMPAIGN_20B,
                name="cayley-small-2L-mlp_in-20B",
                model=replace(SMALL, levels="10,16,0;15,32,256"),
                optim=SMALL_OPTIM,
            ),
        ),
        (
            "the same with a third level 17,64,256 (published val loss 3.1425)",
            replace(
                CAMPAIGN_20B,
                name="cayley-small-3L-mlp_in-20B",
                model=replace(SMALL, levels="10,16,0;15,32,256;17,64,256"),
                optim=SMALL_OPTIM,
            ),
        ),
        (
            "12L d=1024, 2 levels, 10B tokens, before the zombie fix (published val loss 3.1162)",
            replace(
                CAMPAIGN_20B,
                name="cayley-32k-2L-mlp_in",
                model=replace(SMALL, levels="10,16,0;15,32,256", forward_standardized=False),
                # The card gives no warm-up: 200 steps, as in the rest of the campaign.
                optim=OptimConfig(
                    muon_lr=1e-3, muon_min_lr=5e-5, adamw_lr=1e-3, adamw_min_lr=5e-5, warmup=200, warmdown_frac=0.7
                ),
                max_steps=6_358,
                batch_size=24,
                grad_accum=64,
            ),
        ),
        (
            "24L d=2048, 11,16,0;15,32,256, 20B tokens (published val loss 2.7957)",
            replace(
                CAMPAIGN_20B,
                name="cayley-large-2L-mlp_in-20B",
                model=replace(LARGE, levels="11,16,0;15,32,256"),
                optim=LARGE_OPTIM,
            ),
        ),
        (
            "24L d=2048 with a third level; levels by analogy with small-3L, the card was not seen",
            replace(
                CAMPAIGN_20B,
                name="cayley-large-3L-mlp_in-20B",
                model=replace(LARGE, levels="11,16,0;15,32,256;17,64,256"),
                optim=LARGE_OPTIM,
            ),
        ),
        (
            "dense twin of the small models (published val loss 2.8530); optimiser by analogy with small-2L",
            replace(CAMPAIGN_20B, name="vanilla-small-20B", optim=SMALL_OPTIM),
        ),
        (
            "dense twin of the large models (published val loss 2.5419); optimiser by analogy with large-2L",
            replace(CAMPAIGN_20B, name="vanilla-large-20B", model=LARGE, optim=LARGE_OPTIM),
        ),
    ]
}

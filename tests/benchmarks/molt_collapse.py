"""The collapse that public MOLTs met on Gemma, made on purpose, and which of its suspects it takes.

python -m tests.benchmarks.molt_collapse RUNS_FOLDER

The published start: U and V drawn with deviation (d r)^(-1/4), no biases, activations as they are, Adam at 1e-3. One
thing at a time is then put right.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from analysis.reconstruction import ReconstructionMeter
from molt_lens import Molt, Replacement
from molt_lens.activations import ActivationStore, collect
from molt_lens.hosts import Host, Site, load_host
from molt_lens.moments import Moments
from tests.benchmarks.publish import publish
from training.molt_data import train_sequences, val_sequences
from training.molt_loop import MoltTrainer
from training.molt_recipes import MOLT_RECIPES, MoltOptim, MoltRun

STEPS = 150
SHOWN = (10, 50, 150)
RUN = replace(
    MOLT_RECIPES["gemma-3-270m-L9-N1"][1],
    target="mlp_out",
    revive_after=0,
    tokens=STEPS * 1024,
    epochs=1,
    log_every=10,
    checkpoint_every=STEPS + 1,
    optim=MoltOptim(lr=1e-3, betas=(0.9, 0.999), warmup=0.0, decay=0.0, clip=0.0),
)
SITE = Site(RUN.layer, RUN.input, RUN.target)


@dataclass(frozen=True)
class Case:
    """What is put right."""

    gate: str = "relu"
    standardize: bool = False
    controlled: bool = False
    """Whether the map starts with 1 % of the target's variance, in place of the published start."""


CASES = {
    "as published, ReLU": Case(),
    "as published, JumpReLU": Case("jumprelu"),
    "standardised": Case(standardize=True),
    "1 % of the target's variance": Case(controlled=True),
    "both": Case(standardize=True, controlled=True),
    "as published, BatchTopK 4": Case("batchtopk:4"),
}


@torch.no_grad()
def started(case: Case, moments: Moments, x: Tensor, y: Tensor) -> tuple[Replacement, float]:
    """The map before training, and the variance of what it writes over the target's."""
    torch.manual_seed(0)
    made = Replacement(Molt(x.shape[1], y.shape[1], gate=case.gate))
    if case.standardize:
        made.input.set(moments.mean_in, moments.std_in)
        made.output.set(moments.mean_out, moments.std_out)
    molt, x, y = made.map, made.input(x), made.output(y)
    assert isinstance(molt, Molt)
    for matrix in (molt.U, molt.V):
        for rows, rank in zip(matrix.split(molt.ranks), molt.ranks, strict=True):
            rows.normal_(0, (molt.d_in * rank) ** -0.25)
    molt.gate.calibrate(molt.pre_acts(x))
    if case.controlled:
        molt.calibrate(x, RUN.open_rate, RUN.initial_variance * y.var(0).mean().item())
    return made, (molt(x).var(0).mean() / y.var(0).mean()).item()


def outcome(name: str, case: Case, host: Host, folder: Path) -> dict[str, str]:
    config: MoltRun = replace(RUN, gate=case.gate, activation_cache=folder / "activations")
    store = ActivationStore(
        host,
        SITE,
        lambda: train_sequences(config, host),
        tokens=config.tokens,
        batch_size=config.batch_size,
        seed=0,
        cache=config.activation_cache,
    )
    x, y = next(store.first(4_096))
    made, written = started(case, store.moments(100_000), x, y)
    records: dict[int, dict] = {}
    MoltTrainer(config, made, store, folder / "collapse").run(lambda record: records.update({record["step"]: record}))
    sequences = val_sequences(config, host)
    held_out = collect(host, SITE, lambda: iter(sequences), 4_096, cache=config.activation_cache)
    meter = ReconstructionMeter(y.shape[1])
    with torch.no_grad():
        meter.add(held_out.y, made.eval()(held_out.x))
    return {
        "start": name,
        "written / target": f"{written:.3g}",
        "L0 at steps " + ", ".join(map(str, SHOWN)): ", ".join(f"{records[step]['l0']:.2f}" for step in SHOWN),
        "most frequent": f"{records[STEPS]['max_frequency']:.0%}",
        "FVU": f"{meter.fvu():.3f}",
        "NMSE": f"{meter.nmse():.3f}",
    }


def main(folder: Path) -> None:
    host = load_host(RUN.host)
    publish(
        "molt_collapse",
        "A MOLT's collapse on Gemma 3 270M, layer 9, mlp_out, on purpose",
        [outcome(name, case, host, folder) for name, case in CASES.items()],
        [
            f"N=1, {STEPS} steps of 1,024 tokens, Adam 1e-3, one seed; 4,096 held-out tokens; the mean has NMSE 1.",
            "Written / target: variance of what the map writes before training over the target's.",
        ],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

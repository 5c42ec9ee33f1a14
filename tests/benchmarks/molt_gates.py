"""Do gates collapse on a real Gemma, and how do a MOLT's baselines fare there? Three seeds each.

python -m tests.benchmarks.molt_gates RUNS_FOLDER
"""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from molt_lens.penalties import Penalty
from tests.benchmarks.publish import publish
from training.molt_recipes import MOLT_RECIPES, MoltOptim, MoltRun
from training.train_molt import train

BASE = MOLT_RECIPES["gemma-3-270m-L9-N1"][1]
SEEDS = 3
TO_FOUR = Penalty("l0", weight=0.1, target=4.0)

GATES: dict[str, MoltRun] = {
    "BatchTopK 4": BASE,
    "TopK 4": replace(BASE, gate="topk:4"),
    "JumpReLU, L0 target 4": replace(BASE, gate="jumprelu", penalty=TO_FOUR),
    "ReLU, tanh penalty 0.003": replace(BASE, gate="relu", penalty=Penalty("tanh", weight=0.003)),
}
KINDS: dict[str, MoltRun] = {
    "molt": BASE,
    "molt-skip": replace(BASE, kind="molt-skip"),
    "transcoder": replace(BASE, kind="transcoder", gate="batchtopk:32"),
    "skip-transcoder": replace(BASE, kind="skip-transcoder", gate="batchtopk:32"),
    "mxd": replace(BASE, kind="mxd", gate="topk:32"),
}
RAW = replace(BASE, gate="jumprelu", standardize=False, optim=MoltOptim(lr=1e-3), revive_after=0)


def final_of(config: MoltRun, folder: Path, name: str) -> dict:
    """The last evaluation of a run, which is made unless the folder has it."""
    run_dir = folder / name
    if not (run_dir / "report.html").exists():
        cache = folder / "activations"
        train(replace(config, name=name, activation_cache=cache, behaviour_tokens=1_024), run_dir, run_dir.exists())
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["final"]


def all_seeds(config: MoltRun, folder: Path) -> list[dict]:
    kind = "" if config.kind == "molt" else f"{config.kind}-"
    name = f"{kind}{config.gate.replace(':', '-')}"
    seeds = 1 if config.kind == "mxd" else SEEDS  # its steps are ten times as long as a MOLT's
    return [final_of(replace(config, seed=seed), folder, f"{name}-{seed}") for seed in range(seeds)]


def row(name: str, finals: list[dict]) -> dict:
    def shown(values: list[float], digits: int) -> str:
        middle = f"{statistics.fmean(values):.{digits}f}"
        return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    return {
        "map": name,
        "L0": shown([f["l0"] for f in finals], 2),
        "active rank": shown([f["active_rank"] for f in finals], 0),
        "alive": f"{min(f['alive'] for f in finals):.0%}",
        "most frequent": shown([100 * f["max_frequency"] for f in finals], 0) + " %",
        "NMSE": shown([f["fit"]["nmse"] for f in finals], 3),
        "loss above the host": shown([f["behaviour"]["ce_spliced"] - f["behaviour"]["ce_host"] for f in finals], 3),
    }


def main(folder: Path) -> None:
    finals = {name: all_seeds(config, folder) for name, config in GATES.items()}
    rows = [row(name, of_seeds) for name, of_seeds in finals.items()]
    rows.append(row("JumpReLU on raw activations, Adam 1e-3, no revival", [final_of(RAW, folder, "raw")]))
    floors = finals["BatchTopK 4"][0]["floors"]
    notes = [
        f"Mean over {SEEDS} seeds (least-largest), one of mxd; alive is the least of them.",
        f"16,384 held-out tokens; the ridge map has NMSE {floors['ridge']['nmse']:.3f}. The loss is over "
        "1,024 of them, with the map spliced in.",
        "The host is dequantised from 4 bits.",
    ]
    publish("molt_gates", "MOLT N=1 on layer 9 of Gemma 3 270M, 300k tokens twice, by gate", rows, notes)
    rows = [row(f"{name}, {config.gate}", all_seeds(config, folder)) for name, config in KINDS.items()]
    publish("molt_kinds", "MOLT N=1 and maps of as many parameters, by kind; otherwise as molt_gates", rows, notes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What holding the norms of a tanh penalty between steps does to a MOLT on a real Gemma. Three seeds each.

python -m tests.benchmarks.molt_norms RUNS_FOLDER
"""

import statistics
import sys
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.molt_gates import GATES, SEEDS, final_of, row
from tests.benchmarks.publish import publish

BASE = GATES["ReLU, tanh penalty 0.003"]
EVERY = (1, 4, 16)


def main(folder: Path) -> None:
    rows = []
    for every in EVERY:
        config = replace(BASE, penalty=replace(BASE.penalty, norms_every=every))
        names = [f"norms-{every}-{seed}" for seed in range(SEEDS)]
        finals = [final_of(replace(config, seed=seed), folder, name) for seed, name in enumerate(names)]
        speed = statistics.median(final["tokens_per_second"] for final in finals)
        rows.append({**row(f"every {every}" if every > 1 else "every step", finals), "tokens/s": f"{speed:,.0f}"})
    notes = [
        f"Mean over {SEEDS} seeds (least-largest); alive is the least of them. Tokens a second of the steps "
        "alone, of 1,024 tokens.",
        "16,384 held-out tokens; the loss is over 1,024 of them, with the map spliced in.",
    ]
    publish("molt_norms", "A ReLU MOLT's tanh penalty of 0.003 with norms held between steps", rows, notes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

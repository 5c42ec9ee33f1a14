"""Declared sweeps: which replacements are trained, each cell one run of the real training command."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from molt_lens.maps import Kind


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    layer: int
    kind: Kind
    gate: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's."""
        gate = "" if self.kind == "linear" else f"-{self.gate.replace(':', '')}"
        return f"L{self.layer}-{self.kind}{gate}-s{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """Kinds by gates by layers by seeds, all else alike."""

    layers: tuple[int, ...]
    gates: Mapping[Kind, tuple[str, ...]]
    """Of each kind that takes part. A linear map is solved and has none: its entry is empty."""
    n: int = 1
    """Size of the MOLT whose parameters all kinds have."""
    seeds: tuple[int, ...] = (0,)
    tokens: int = 300_000
    """Training tokens in an epoch."""
    epochs: int = 2
    recipe: str = "gemma-3-270m-L9-N1"
    """Of training/molt_recipes.py: what is said neither here nor in `arguments`."""
    arguments: tuple[str, ...] = ("--checkpoint-every", "100", "--keep-checkpoints", "1")
    """Further flags of every run. Checkpoints are frequent, since sweeps get stopped, and one is kept, since many runs
    share a disk."""

    def cells(self) -> Iterator[Cell]:
        """In the order in which they run: every seed of a layer's every kind before the next layer."""
        for layer in self.layers:
            for kind, gates in self.gates.items():
                if kind == "linear":
                    yield Cell(layer, kind, "relu", self.seeds[0])
                for gate in gates:
                    for seed in self.seeds:
                        yield Cell(layer, kind, gate, seed)

    def arguments_of(self, cell: Cell, activations: Path) -> tuple[str, ...]:
        """What starts the training of a cell, but for its run folder."""
        flags = {
            "layer": cell.layer,
            "kind": cell.kind,
            "gate": cell.gate,
            "n": self.n,
            "seed": cell.seed,
            "tokens": self.tokens,
            "epochs": self.epochs,
            "activation-cache": activations,
        }
        return (self.recipe, *(part for k, v in flags.items() for part in (f"--{k}", str(v))), *self.arguments)

    def shared(self) -> dict[str, object]:
        """What a cell's name does not say: it must be the same for all that share a folder."""
        return {
            "n": self.n,
            "tokens": self.tokens,
            "epochs": self.epochs,
            "recipe": self.recipe,
            "arguments": list(self.arguments),
        }


TRANSFORMS = tuple(f"batchtopk:{k}" for k in (1, 2, 4, 8))
FEATURES = tuple(f"batchtopk:{k}" for k in (8, 16, 32, 64, 128, 256))  # to the active ranks of MOLTs
EXPERTS = tuple(f"topk:{k}" for k in (8, 16, 32, 64))

GEMMA_270M = Sweep(
    layers=(5, 9, 12),
    gates={
        "molt": TRANSFORMS,
        "molt-skip": TRANSFORMS,
        "transcoder": FEATURES,
        "skip-transcoder": FEATURES,
        "mxd": EXPERTS,
        "linear": (),
    },
)

SWEEPS: dict[str, Sweep] = {
    "gemma-270m": GEMMA_270M,
    "gemma-270m-L9": Sweep(layers=(9,), gates=GEMMA_270M.gates),
}

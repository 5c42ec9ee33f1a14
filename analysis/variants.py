"""Declared ablations: variants of a recipe as flags of training/train_cayley.py, each held against a base."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A recipe with some flags; another line in VARIANTS is another row of the ablation."""

    name: str
    recipe: str
    flags: tuple[str, ...]
    """Of the training command; `{seed}` in one is the run's seed."""
    says: str
    """What differs from the base, or what the base is."""
    base: str | None = None
    """The variant that its runs are compared with, seed by seed; None: it is one."""
    cold_stop: str | None = None
    """The variant that it is but for its end: annealed at the validation loss that the base of its seed ended with."""
    probed: bool = False
    """Whether its middle layer is probed."""


# As the published small models; over a longer run its MLPs went silent (docs/log.md).
LOCKSTEP = ("--muon-lr", "1.2e-2", "--muon-min-lr", "1.2e-4", "--weight-decay", "0.0")
SIGNS = ("--dictionary", "random", "--dictionary-seed", "{seed}")
"""Drawn anew for each seed: the control is of random signs, not of one draw of them."""
# Bent needs an even t = log2(d_model), and 128 is 2^7. At t = 6 it has n up to 3t/2 = 9, so that 512 leaves are the
# most that all three dictionaries share; k and budget are those of `tiny`.
WIDTH_64 = ("--d-model", "64", "--levels", "6,8,0;9,16,32")
NO_LEVELS = ("--levels", "None")
"""As the recipe has it, and said here so that no flag of every run can give it levels."""

VARIANTS = (
    Variant("tiny", "tiny", (), "gold, per_parent, standardised values, unsigned; Muon at 4e-3, decay", probed=True),
    Variant("lockstep", "tiny", LOCKSTEP, "Muon at AdamW's rate, 1.2e-2, no weight decay", "tiny"),
    Variant("random", "tiny", SIGNS, "random signs", "tiny", probed=True),
    Variant("parents", "tiny", ("--routing", "parents"), "the 32 best parents open all children", "tiny"),
    Variant(
        "no-zombie-fix",
        "tiny",
        ("--forward-standardized", "False"),
        "values are raw scores, without a learned bias",
        "tiny",
    ),
    Variant("signed", "tiny", ("--signed", "True"), "values of either sign, selected by size", "tiny"),
    Variant("vanilla", "tiny-vanilla", NO_LEVELS, "no bottleneck, as many tokens", "tiny", probed=True),
    Variant(
        "vanilla-equal-loss",
        "tiny-vanilla",
        NO_LEVELS,
        "no bottleneck, stopped at the base's loss",
        "tiny",
        cold_stop="vanilla",
        probed=True,
    ),
    Variant("gold-64", "tiny", WIDTH_64, "gold, d_model 64, 512 leaves"),
    Variant("bent-64", "tiny", (*WIDTH_64, "--dictionary", "bent"), "bent", "gold-64"),
    Variant("random-64", "tiny", (*WIDTH_64, *SIGNS), "random signs", "gold-64"),
)


def choose(names: tuple[str, ...]) -> tuple[Variant, ...]:
    """Those named, all if none is, with what they are compared with or need; in the order they are declared in.

    Raises:
        ValueError: no such variant.
    """
    known = {variant.name: variant for variant in VARIANTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no variant is called {unknown[0]!r}: the variants are {', '.join(known)}")
    wanted = set(names or known)
    for name in tuple(wanted):
        wanted |= {other for other in (known[name].base, known[name].cold_stop) if other}
    return tuple(variant for variant in VARIANTS if variant.name in wanted)

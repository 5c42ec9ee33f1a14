"""Coherence of the dictionaries of the recipes beside random signs, exact over all pairs.

python -m tests.benchmarks.geometry
"""

import time

from analysis.geometry import family_products, nearest_atoms, spectrum_by_walsh
from cayley_interp import CayleyDictionary
from cayley_interp.dictionary import DictionaryMap, max_bits
from tests.benchmarks.publish import publish

SIZES = {7: (11, 12), 10: (15, 17)}
"""Deepest levels n of the recipes of width 2^t; their first level, of the parents, is n = t."""

RANDOM_SEEDS = 3


def dictionaries() -> list[CayleyDictionary]:
    """Gold, bent where there is one, and random signs, size by size."""
    made = []
    for t, sizes in SIZES.items():
        for n in sizes:
            choices: list[tuple[DictionaryMap, int]] = [("gold", 0)]
            if t % 2 == 0 and n <= max_bits(t, "bent"):
                choices.append(("bent", 0))
            choices += [("random", seed) for seed in range(RANDOM_SEEDS)]
            made += [CayleyDictionary(t, n, map, seed) for map, seed in choices]
    return made


def row(dictionary: CayleyDictionary) -> dict[str, str]:
    start = time.perf_counter()
    spectrum = spectrum_by_walsh(dictionary)
    families = family_products(dictionary, n_parent=dictionary.t)
    nearest = nearest_atoms(dictionary, atom=0, k=3)
    seconds = time.perf_counter() - start
    pairs = zip(nearest.indices.tolist(), nearest.inner_products.tolist(), strict=True)
    seed = f" {dictionary.seed}" if dictionary.map == "random" else ""
    return {
        "d": f"{dictionary.d:,}",
        "atoms": f"{dictionary.size:,}",
        "map": f"{dictionary.map}{seed}",
        "coherence": f"{spectrum.coherence:.4f}",
        "Welch bound": f"{spectrum.welch_coherence:.4f}",
        "mean square": f"{spectrum.mean_square:.4e}",
        "Welch mean square": f"{spectrum.welch_mean_square:.4e}",
        "distinct values": f"{len(spectrum.values)}",
        "atoms at the coherence": f"{int(spectrum.counts[-1]) // dictionary.size:,}",
        "family coherence": f"{families.largest:.4f}",
        "family mean square": f"{families.mean_square:.4e}",
        "nearest": ", ".join(f"{index} ({inner:+.4f})" for index, inner in pairs),
        "seconds": f"{seconds:.3f}",
    }


def main() -> None:
    notes = [
        "Over all ordered pairs of atoms, exact: <D_u, D_v> depends on u xor v, so one Walsh transform has them all.",
        "Distinct values: of |<D_u, D_v>|. Atoms at the coherence: how many others of every atom are that near.",
        "Family: a leaf with its parent, and with its siblings, under parents of the level of d atoms. Both kinds of "
        "pair have the same inner products, 2^n / d - 1 of them.",
        "Nearest: of atom 0, where of equally near atoms the lowest; of atom u they are u xor these.",
        "Mean squares are the Welch bound's in every row: all these dictionaries are tight frames.",
        "The recipes' random control has seed 0. Bent needs an even log2 d and n at most 1.5 log2 d.",
    ]
    publish("geometry", "Geometry of the dictionaries", [row(dictionary) for dictionary in dictionaries()], notes)


if __name__ == "__main__":
    main()

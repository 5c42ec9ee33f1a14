"""Geometry of a dictionary: how near to orthogonal its atoms are, exactly by Walsh or pair by pair.

    gold = spectrum_by_walsh(CayleyDictionary(t=10, n=15))      # 2^30 pairs, from one transform
    other = spectrum_by_gram(transcoder.W_dec)                  # any decoder, block by block
    gold.coherence, gold.mean_square / gold.welch_mean_square, other.frame_potential
    family_products(dictionary, n_parent=10)                    # a leaf with its parent and with its siblings
    nearest_atoms(dictionary, atom=77)
    spectrum_figure({"gold": gold, "transcoder": other})

All inner products are of atoms scaled to norm 1. The bounds are Welch's (1974), as frame potentials (Benedetto and
Fickus 2003): over all ordered pairs, u = v among them, the squares add up to n^2 / d at least, and only a tight frame
reaches it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from analysis.plots import GREY, blank, line, ramp, rgb
from cayley_interp import CayleyDictionary

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLOCK_BYTES = 2**27
"""Of inner products held at a time."""


@dataclass(frozen=True)
class CoherenceSpectrum:
    """|<D_u, D_v>| over ordered pairs u != v: `values`, ascending, and how many pairs have each.

    Attributes:
        n_atoms, d: of the dictionary.
        coherence: the largest over the pairs compared; of a sample it bounds the dictionary's from below.
        mean_square: mean of <D_u, D_v>^2 over all pairs, exact for a sample too.
    """

    values: Float[Tensor, " m"]
    counts: Int64[Tensor, " m"]
    n_atoms: int
    d: int
    coherence: float
    mean_square: float

    @property
    def frame_potential(self) -> float:
        """Sum of <D_u, D_v>^2 over all ordered pairs, u = v among them."""
        return self.n_atoms + self.n_atoms * (self.n_atoms - 1) * self.mean_square

    @property
    def welch_mean_square(self) -> float:
        """The least mean square that n unit vectors in R^d can have, (n - d) / (d (n - 1)); 0 where n <= d."""
        return max(0.0, (self.n_atoms - self.d) / (self.d * (self.n_atoms - 1)))

    @property
    def welch_coherence(self) -> float:
        """The least coherence, its square root. Reached by equiangular frames only, so by none of n > d (d + 1) / 2."""
        return self.welch_mean_square**0.5

    def share_above(self, threshold: float) -> float:
        """Share of the pairs compared whose |<D_u, D_v>| is larger."""
        return int(self.counts[self.values > threshold].sum()) / int(self.counts.sum())


class NearestAtoms(NamedTuple):
    """Atoms by falling |inner product|, and these inner products with their sign."""

    indices: Int64[Tensor, " k"]
    inner_products: Float[Tensor, " k"]


@dataclass(frozen=True)
class FamilyProducts:
    """Inner products within the families of a Cayley level, which are the same set for both kinds of pair.

    Attributes:
        by_difference: <D_u, D_v> for u xor v = b << n_parent, b = 1, 2, ...: of leaf and parent, where b is the leaf's
            own high bits, and of siblings, where b is the sum of theirs. Each b is equally frequent among either.
    """

    by_difference: Float[Tensor, " b"]

    @property
    def largest(self) -> float:
        return self.by_difference.abs().max().item()

    @property
    def mean(self) -> float:
        return self.by_difference.mean().item()

    @property
    def mean_square(self) -> float:
        """To compare with the dictionary's: above it a family is crowded, below it spread out."""
        return self.by_difference.square().mean().item()


def spectrum_by_walsh(dictionary: CayleyDictionary) -> CoherenceSpectrum:
    """Exact, all pairs: <D_u, D_v> depends on u xor v alone, which takes every value but 0 for 2^n ordered pairs."""
    inner = _inner_products_by_difference(dictionary)[1:]
    values, counts = inner.abs().unique(return_counts=True)
    return CoherenceSpectrum(
        values=values,
        counts=counts * dictionary.size,
        n_atoms=dictionary.size,
        d=dictionary.d,
        coherence=values[-1].item(),
        mean_square=inner.square().mean().item(),
    )


@torch.no_grad()
def spectrum_by_gram(
    W_dec: Float[Tensor, "n d"], *, resolution: float = 2**-10, sample: int | None = None, seed: int = 0
) -> CoherenceSpectrum:
    """Of the rows of any decoder: all pairs, or those of `sample` random rows with all others. Memory is bounded.

    Args:
        resolution: values are counted at the nearest multiple; coherence and mean square are not rounded.

    Raises:
        ValueError: fewer than two atoms, a row that is 0 or not finite, a sample that is not 1 to n, or a resolution
            that is not between 0 and 1.
    """
    atoms = _unit_rows(W_dec)
    n, d = atoms.shape
    if not 0 < resolution <= 1:
        raise ValueError(f"resolution = {resolution}: expected a width of bins between 0 and 1")
    if sample is not None and not 1 <= sample <= n:
        raise ValueError(f"sample = {sample}: expected 1 to {n}, the number of atoms")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(n) if sample is None else torch.randperm(n, generator=generator)[:sample]
    counts = torch.zeros(round(1 / resolution) + 2, dtype=torch.int64)
    largest = 0.0
    for inner in _gram_blocks(atoms, rows.to(atoms.device)):
        bins = inner.abs().div_(resolution).round_().long()
        counts += torch.bincount(bins.flatten(), minlength=len(counts)).cpu()
        largest = max(largest, inner.abs().max().item())
    counts[0] -= len(rows)  # each atom with itself, which the blocks hold as 0
    # ||W^T W||_F = ||W W^T||_F: the sum over all n^2 pairs without the pairs.
    frame_potential = (atoms.T.double() @ atoms.double()).square().sum().item()
    occupied = counts.nonzero().flatten()
    return CoherenceSpectrum(
        values=occupied.double() * resolution,
        counts=counts[occupied],
        n_atoms=n,
        d=d,
        coherence=largest,
        mean_square=max(0.0, (frame_potential - n) / (n * (n - 1))),
    )


def family_products(dictionary: CayleyDictionary, n_parent: int) -> FamilyProducts:
    """Leaves of `dictionary` under the parents of the level of 2^n_parent atoms, exact.

    The leaf whose high bits are 0 is its parent, the same atom, and is not compared with it.

    Raises:
        ValueError: n_parent is not at least t and below the dictionary's n.
    """
    if not dictionary.t <= n_parent < dictionary.n:
        raise ValueError(
            f"parents of {dictionary!r} have n from {dictionary.t} to {dictionary.n - 1}, got n_parent = {n_parent}"
        )
    return FamilyProducts(_inner_products_by_difference(dictionary)[:: 1 << n_parent][1:])


@torch.no_grad()
def nearest_atoms(dictionary: CayleyDictionary | Float[Tensor, "n d"], atom: int, k: int = 10) -> NearestAtoms:
    """The k other atoms of largest |<D_atom, D_v>|, of equally near ones those of lowest index.

    A Cayley dictionary's spectrum, read at atom xor v, has them all; of a decoder it is one product with its rows.

    Raises:
        IndexError: no such atom.
        ValueError: fewer than k others, or a decoder's row that is 0 or not finite.
    """
    n = dictionary.size if isinstance(dictionary, CayleyDictionary) else len(dictionary)
    if not 0 <= atom < n:
        raise IndexError(f"atoms run from 0 to {n - 1}, got {atom}")
    if not 1 <= k < n:
        raise ValueError(f"k = {k}: expected 1 to {n - 1}, the number of other atoms")
    if isinstance(dictionary, CayleyDictionary):
        inner = _inner_products_by_difference(dictionary)[torch.arange(n) ^ atom]
    else:
        atoms = _unit_rows(dictionary)
        inner = atoms @ atoms[atom]
    nearness = inner.abs().index_fill(0, torch.tensor([atom], device=inner.device), -1)
    indices = nearness.argsort(descending=True, stable=True)[:k]
    return NearestAtoms(indices, inner[indices])


def spectrum_figure(spectra: Mapping[str, CoherenceSpectrum]) -> "Figure":
    """Share of pairs at least as coherent as x, a line each that ends at the coherence; dotted, the Welch bounds."""
    figure = blank("|inner product| of two atoms", "share of pairs with as much or more")
    for i, (name, spectrum) in enumerate(spectra.items()):
        at_least = spectrum.counts.flip(0).cumsum(0).flip(0) / spectrum.counts.sum()
        points = list(zip(spectrum.values.tolist(), at_least.tolist(), strict=True))
        line(figure, points, name, ramp(i, len(spectra)), 2, markers=len(points) < 40)
    for bound in sorted({spectrum.welch_coherence for spectrum in spectra.values()}):
        figure.add_vline(x=bound, line={"color": rgb(GREY), "width": 1, "dash": "dot"})
    figure.update_traces(line_shape="vh")
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    figure.update_layout(hovermode="closest")
    return figure


@lru_cache(maxsize=4)
def _inner_products_by_difference(dictionary: CayleyDictionary) -> Float[Tensor, " size"]:
    """<D_u, D_v> at u xor v without the transform's rounding: each is an integer over d, and ties are ties."""
    return dictionary.spectrum().mul(dictionary.d).round() / dictionary.d


def _unit_rows(W_dec: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """In float32 at least: rows of bfloat16 have no norm worth the name."""
    W_dec = W_dec.to(torch.promote_types(W_dec.dtype, torch.float32))
    if len(W_dec) < 2:
        raise ValueError(f"a dictionary of {len(W_dec)} atoms has no pairs: expected W_dec of shape [n, d] with n >= 2")
    norms = W_dec.norm(dim=-1, keepdim=True)
    wrong = ~((norms > 0) & norms.isfinite()).flatten()
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of {len(W_dec)} rows of W_dec are 0 or not finite, the first of them row "
            f"{int(wrong.nonzero()[0])}: such an atom has no direction; leave it out"
        )
    return W_dec / norms


def _gram_blocks(atoms: Float[Tensor, "n d"], rows: Int64[Tensor, " m"]) -> Iterator[Float[Tensor, "block n"]]:
    """Inner products of some rows with all, 0 in place of a row's own; each block is the caller's to change."""
    for some in rows.split(max(1, BLOCK_BYTES // (len(atoms) * atoms.element_size()))):
        inner = atoms[some] @ atoms.T
        inner[torch.arange(len(some), device=inner.device), some] = 0
        yield inner

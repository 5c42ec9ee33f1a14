"""CayleyDictionary: 2^n unit atoms in R^d that nobody stores, the characters of F_2^n on d = 2^t generators.

Coordinate x of GF(2^t) has the generator s(x) = (x, g(x)) in F_2^n: the t bits of x, then the first n - t bits of g(x).
Atom u in F_2^n is D_u[x] = (-1)^<u, s(x)> / sqrt(d). Three facts do all the work:

- <D_u, D_v> depends on u xor v alone: it is the Walsh transform of the generator set, the spectrum of the Cayley
  graph. The whole Gram matrix is one transform of length 2^n.
- For fixed high bits b the 2^t atoms are the Walsh basis times one sign pattern (-1)^<b, g(x)>.
- Level n of a hierarchy is the first 2^n atoms of any deeper one, and the parent of a leaf is its low bits.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from cayley_interp import fields
from cayley_interp.graphs import constant_in_graphs
from cayley_interp.walsh import hadamard_matrix, walsh_hadamard

# Rows of a covariance summed at a time: d x d group elements as int64 would be the largest thing in a training step.
MOMENT_ROWS = 128

DictionaryMap = Literal["gold", "bent", "random"]


class SignTables(NamedTuple):
    """The two small +-1 tables whose row products are the atoms: D_(a | b << t) = walsh[a] * patterns[b] / sqrt(d).

    And s(x), from whose bits kernels compute the same signs; None where they do not fit 31 bits.
    """

    walsh: Float[Tensor, "d d"]
    patterns: Float[Tensor, "n_patterns d"]
    generators: Int32[Tensor, " d"] | None


class CayleyDictionary:
    """Characters of F_2^n on the generator set {(x, g(x)) : x in GF(2^t)}.

    Args:
        t: log2 of the dimension d, 2 to 16.
        n: log2 of the number of atoms, at least t and at most `max_bits(t, map)`.
        map: g. `gold` is x^3 (Gold's map; past 2t bits go on with x^5): coherence 2^((t+1)/2) / d for odd t and
            2^(t/2+1) / d for even t while n <= 2t. `bent` is the product of the halves of x (Maiorana-McFarland; even
            t): 2^(n-t) mutually unbiased bases, coherence 1 / sqrt(d). `random` is the control: g drawn by `seed`.
        seed: used by `random` only.

    Raises:
        ValueError: t or n out of range, or `bent` with odd t.
    """

    def __init__(self, t: int, n: int, map: DictionaryMap = "gold", seed: int = 0):
        if not 2 <= t <= 16:
            raise ValueError(f"t = log2(d_model) must be 2..16, got {t}")
        if map == "bent" and t % 2:
            raise ValueError(
                f"the bent map splits x into two halves and needs an even t, got t = {t} (d = {2**t}): use map='gold'"
            )
        if not t <= n <= max_bits(t, map):
            raise ValueError(f"the {map} map at t = {t} has n from {t} to {max_bits(t, map)}, got n = {n}")
        self.t, self.n, self.seed = t, n, seed
        self.map: DictionaryMap = map
        self.d = 2**t
        self.size = 2**n
        x = torch.arange(self.d)
        self.g: Int64[Tensor, " d"] = _map_bits(x, t, map, seed) & ((1 << (n - t)) - 1)
        self.generators: Int64[Tensor, " d"] = x | (self.g << t)

    def __repr__(self) -> str:
        return f"CayleyDictionary(t={self.t}, n={self.n}, map={self.map!r}, seed={self.seed})"

    def atoms(self, indices: Int64[Tensor, " m"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "m d"]:
        """Unit atoms D_u of the given indices, on their device.

        Raises:
            IndexError: an index outside 0 .. 2^n - 1.
        """
        self._check_indices(indices)
        signs = fields.parity(indices[:, None] & self.generators.to(indices.device))
        return (1 - 2 * signs).to(dtype) / self.d**0.5

    def parent(self, indices: Int64[Tensor, "*m"], n_parent: int) -> Int64[Tensor, "*m"]:
        """Parents at the level of 2^n_parent atoms: the low n_parent bits (a homomorphism of F_2^n)."""
        if not self.t <= n_parent <= self.n:
            raise ValueError(f"a parent level of {self!r} has n from {self.t} to {self.n}, got {n_parent}")
        return indices & ((1 << n_parent) - 1)

    def children(self, indices: Int64[Tensor, "*m"], n_child: int) -> Int64[Tensor, "*m c"]:
        """Children at the level of 2^n_child atoms: the coset u + F_2^(n_child - n) above each index, in order."""
        if not self.n <= n_child <= max_bits(self.t, self.map):
            raise ValueError(
                f"a child level of {self!r} has n from {self.n} to {max_bits(self.t, self.map)}, got {n_child}"
            )
        coset = torch.arange(1 << (n_child - self.n), device=indices.device) << self.n
        return indices[..., None] | coset

    def scores(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch size"]:
        """All <x, D_u>: x spread over F_2^n at its generators, then one transform of length 2^n.

        The reference for every faster way of scoring; it holds 2^n numbers for each row of x.
        """
        spread = x.new_zeros(*x.shape[:-1], self.size)
        spread = spread.index_copy(-1, self.generators.to(x.device), x)
        return walsh_hadamard(spread) * (self.size / self.d) ** 0.5

    def combine(self, acts: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch d"]:
        """sum_u acts_u D_u of a dense code, the adjoint of `scores`; a code of 2^m < 2^n features is of that level."""
        size = acts.shape[-1]
        if size & (size - 1) or not self.d <= size <= self.size:
            raise ValueError(f"a dense code of {self!r} has 2^m features, {self.t} <= m <= {self.n}; got {size}")
        at_generators = walsh_hadamard(acts)[..., self.generators.to(acts.device) & (size - 1)]
        return at_generators * (size / self.d) ** 0.5

    def spectrum(self) -> Float[Tensor, " size"]:
        """<D_u, D_v> as a function of u xor v, float64, exact: the normalised spectrum of the Cayley graph."""
        return self.scores(torch.ones(self.d, dtype=torch.float64)) / self.d**0.5

    def coherence(self) -> float:
        """Largest |<D_u, D_v>| over u != v."""
        return self.spectrum()[1:].abs().max().item()

    def moments(
        self, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]
    ) -> tuple[Float[Tensor, " size"], Float[Tensor, " size"]]:
        """Mean and variance of every score <x, D_u> for x of the given mean and covariance, without any score.

        var_u = D_u' C D_u = sum over x, y of C[x, y] (-1)^<u, s(x) + s(y)> / d: the entries of C, summed by the group
        element s(x) + s(y), go through one transform of length 2^n.
        """
        s = self.generators.to(mean.device)
        summed = mean.new_zeros(self.size)
        for rows in torch.arange(self.d, device=mean.device).split(MOMENT_ROWS):
            differences = s[rows, None] ^ s[None, :]
            summed += torch.bincount(differences.flatten(), covariance[rows].flatten(), minlength=self.size)
        variance = walsh_hadamard(summed.to(mean.dtype)) * self.size**0.5 / self.d
        return self.scores(mean), variance

    def sign_tables(self, device: torch.device, dtype: torch.dtype) -> SignTables:
        """The +-1 tables on a device, built once and shared by every layer that uses this dictionary."""
        return SignTables(*_sign_tables(self.t, self.n, self.map, self.seed, device, dtype))

    def _check_indices(self, indices: Tensor) -> None:
        if indices.numel() and not (indices.min() >= 0 and indices.max() < self.size):
            raise IndexError(
                f"atom indices of {self!r} run from 0 to {self.size - 1}, got {indices.min()}..{indices.max()}"
            )


def max_bits(t: int, map: DictionaryMap) -> int:
    """Largest n of a map: two powers of x for gold and random, one half of x for bent."""
    return t + t // 2 if map == "bent" else 3 * t


def _map_bits(x: Int64[Tensor, " d"], t: int, map: DictionaryMap, seed: int) -> Int64[Tensor, " d"]:
    """All bits of g(x) that the map has."""
    if map == "gold":
        return fields.power(x, 3, t) | (fields.power(x, 5, t) << t)
    if map == "bent":
        half = t // 2
        return fields.multiply(x & ((1 << half) - 1), x >> half, half)
    # splitmix64 rather than torch's generator: the control must stay the same under every release of torch.
    return torch.tensor([_splitmix64((seed << 16) + i) & ((1 << (2 * t)) - 1) for i in x.tolist()])


def _splitmix64(state: int) -> int:
    """Steele, Lea, Flood (2014): one well-mixed 64-bit word per state."""
    mask = (1 << 64) - 1
    z = (state + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


@constant_in_graphs
def _sign_tables(
    t: int, n: int, map: DictionaryMap, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    return _cached_sign_tables(t, n, map, seed, device, dtype)


@lru_cache(maxsize=32)
def _cached_sign_tables(
    t: int, n: int, map: DictionaryMap, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    dictionary = CayleyDictionary(t, n, map, seed)
    walsh = hadamard_matrix(2**t, torch.device("cpu"), torch.float32) * 2 ** (t / 2)
    pattern_index = torch.arange(1 << (n - t))
    patterns = 1 - 2 * fields.parity(pattern_index[:, None] & dictionary.g)
    generators = dictionary.generators.to(device, torch.int32) if n <= 31 else None
    return walsh.round().to(device, dtype), patterns.to(device, dtype), generators

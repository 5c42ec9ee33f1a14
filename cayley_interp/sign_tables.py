"""Small tables of signs from which torch makes products with atoms; built once, shared by all layers of a model.

A dictionary has no parameters and its atoms are not stored, but where few rows are cheaper to look up than to compute
they are: the Walsh basis, the sign patterns over it, and all atoms of a level that a processor's cache holds.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from cayley_interp import fields
from cayley_interp.dictionary import CayleyDictionary, DictionaryMap
from cayley_interp.graphs import constant_in_graphs
from cayley_interp.walsh import hadamard_matrix

ATOM_NUMBERS = 1 << 22
"""Signs of all atoms of a level that are kept as one table: 16 MB of float32, what a last-level cache holds."""

PRODUCT_SPEED = 8
"""Multiply-adds of a matrix product in the time of one addition of a sum over rows, on a CPU (docs/performance.md)."""


class SignTables(NamedTuple):
    """The +-1 tables of a level of 2^n atoms: D_(a | b << t) = walsh[a] * patterns[b] / sqrt(d)."""

    walsh: Float[Tensor, "d d"]
    patterns: Float[Tensor, "n_patterns d"]
    atoms: Float[Tensor, "size d"] | None
    """All rows walsh[a] * patterns[b] of a level of at most ATOM_NUMBERS signs."""
    generators: Int32[Tensor, " d"] | None
    """s(x), from whose bits kernels compute the same signs; None where they do not fit 31 bits."""


class ChildTables(NamedTuple):
    """The same signs in the order in which children of open parents are scored: by bucketed sums.

    The score of child a | c << m is the sum over x of x[x] D_a[x] (-1)^<c, h(x)>, with h(x) the child bits of s(x).
    Coordinates that share h(x) share that sign whatever c is: they are added up first. Places are [depth, block], all
    coordinates of a block share h(x), and places that no coordinate fills hold zeros.
    """

    order: Int64[Tensor, " place"]
    """The coordinate at each place."""
    walsh: Float[Tensor, "d place"]
    patterns: Float[Tensor, "n_patterns place"]
    """Of the parents' level."""
    transform: Float[Tensor, "block child"]
    """(-1)^<c, h(block)> / sqrt(d)."""
    buckets: Int32[Tensor, "depth child"]
    """For kernels: the coordinates of each h(x) as one column; -1 where there are fewer."""


def sign_tables(dictionary: CayleyDictionary, n: int, device: torch.device, dtype: torch.dtype) -> SignTables:
    """The tables of the first 2^n atoms."""
    return SignTables(*_sign_tables_once(dictionary.t, n, dictionary.map, dictionary.seed, device, dtype))


def child_tables(
    dictionary: CayleyDictionary, n_parent: int, n: int, device: torch.device, dtype: torch.dtype
) -> ChildTables:
    """The tables by which the children, among the first 2^n atoms, of parents among the first 2^n_parent are scored."""
    return ChildTables(*_child_tables_once(dictionary.t, n_parent, n, dictionary.map, dictionary.seed, device, dtype))


# Plain tuples: torch.compile knows no named ones as constants.
@constant_in_graphs
def _sign_tables_once(*arguments) -> tuple:
    return tuple(_sign_tables(*arguments))


@constant_in_graphs
def _child_tables_once(*arguments) -> tuple:
    return tuple(_child_tables(*arguments))


@lru_cache(maxsize=32)
def _sign_tables(t: int, n: int, map: DictionaryMap, seed: int, device: torch.device, dtype: torch.dtype) -> SignTables:
    dictionary = CayleyDictionary(t, n, map, seed)
    walsh = _walsh(t, device, dtype)
    patterns = _signs(torch.arange(1 << (n - t))[:, None], dictionary.g).to(device, dtype)
    atoms = None
    if dictionary.size * dictionary.d <= ATOM_NUMBERS:
        atoms = walsh if n == t else (patterns[:, None] * walsh).view(-1, dictionary.d)
    generators = dictionary.generators.to(device, torch.int32) if n <= 31 else None
    return SignTables(walsh, patterns, atoms, generators)


@lru_cache(maxsize=32)
def _child_tables(
    t: int, n_parent: int, n: int, map: DictionaryMap, seed: int, device: torch.device, dtype: torch.dtype
) -> ChildTables:
    bucket = CayleyDictionary(t, n, map, seed).generators >> n_parent
    n_children = 1 << (n - n_parent)
    members = [(bucket == value).nonzero().flatten() for value in range(n_children)]
    order = min(
        (_places([part for own in members if len(own) for part in own.split(1 << bits)]) for bits in range(t + 1)),
        key=lambda places: places.numel() + places.shape[1] * n_children / PRODUCT_SPEED,
    )
    filled = (order >= 0).flatten().to(device, dtype)
    at = order.clamp(min=0).flatten().to(device)
    parents = _sign_tables(t, n_parent, map, seed, device, dtype)
    transform = _signs(bucket[order[0]][:, None], torch.arange(n_children)[None]).to(device, dtype) / 2 ** (t / 2)
    return ChildTables(
        at,
        parents.walsh[:, at] * filled,
        parents.patterns[:, at],
        transform,
        _places(members).to(device, torch.int32),
    )


def _places(blocks: list[Tensor]) -> Int64[Tensor, "depth block"]:
    """Blocks of coordinates as columns; -1 where one has fewer than another."""
    return torch.nn.utils.rnn.pad_sequence(blocks, padding_value=-1)


@lru_cache(maxsize=32)
def _walsh(t: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "d d"]:
    return (hadamard_matrix(2**t, torch.device("cpu"), torch.float32) * 2 ** (t / 2)).round().to(device, dtype)


def _signs(u: Int64[Tensor, "*#shape"], s: Int64[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """(-1)^<u, s>."""
    return (1 - 2 * fields.parity(u & s)).float()

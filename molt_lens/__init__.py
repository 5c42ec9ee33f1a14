"""Sparse mixtures of linear transforms that stand in for an MLP layer, and what they are compared with."""

from molt_lens.gates import Gate, make_gate
from molt_lens.linear import LinearMap
from molt_lens.maps import make_map, matched_map
from molt_lens.molt import Molt
from molt_lens.mxd import MixtureOfDecoders
from molt_lens.sparse_map import SparseMap
from molt_lens.standardize import Replacement, Standardizer
from molt_lens.transcoder import Transcoder

__all__ = [
    "Gate",
    "LinearMap",
    "MixtureOfDecoders",
    "Molt",
    "Replacement",
    "SparseMap",
    "Standardizer",
    "Transcoder",
    "make_gate",
    "make_map",
    "matched_map",
]

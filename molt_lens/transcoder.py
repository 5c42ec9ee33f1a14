"""Transcoder: a sparse sum of fixed vectors, y = sum_f gate_f(x) d_f + b_dec (+ W_skip x).

Dunefsky et al. 2024 (arXiv 2406.11944); with the skip connection Paulo et al. 2025 (arXiv 2501.18823). The same gates,
trainer and standardisers as a MOLT's, so that the two differ in nothing else.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from molt_lens.sparse_map import SparseMap

FEATURES_PER_N = 2573
"""Features with the parameters of a MOLT of N = 1, at any d: 2 d F + F + d against 2 d 2560 N + 31 N (d + 1)."""


class Transcoder(SparseMap):
    """Features with a detector and a vector each.

    Attributes:
        W_dec: [n_units, d_out].
    """

    kind = "transcoder"

    def __init__(self, d_in: int, d_out: int, *, n_features: int, gate: str = "batchtopk:32", skip: bool = False):
        super().__init__(d_in, d_out, [1] * n_features, gate, skip)
        self.W_dec = nn.Parameter(torch.randn(n_features, d_out) / d_out**0.5)

    def write(
        self,
        acts: Float[Tensor, "token unit"],
        x: Float[Tensor, "token d_in"],  # noqa: ARG002
        reachable: Bool[Tensor, "token unit"],  # noqa: ARG002  (a matrix product has all gradients)
    ) -> Float[Tensor, "token d_out"]:
        return acts @ self.W_dec

    def norms(self) -> Float[Tensor, " unit"]:
        return self.W_dec.norm(dim=-1)

    @torch.no_grad()
    def rescale_written_(self, input_scale: Float[Tensor, " d_in"], output_scale: Float[Tensor, " d_out"]) -> None:  # noqa: ARG002
        self.W_dec.mul_(output_scale)

    def config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "n_features": self.n_units,
            "gate": self.gate.spec,
            "skip": self.W_skip is not None,
        }

"""Mixture of Decoders: experts of full rank that share a dense hidden layer, y = (C^T a) * (D^T gelu(E x)).

Oldfield et al. 2025 (arXiv 2505.21364): expert n is D diag(c_n), and a = TopK(ReLU(G x)). Never is an expert's matrix
built. The strongest baseline by Jacobian, since its hidden layer is as dense as an MLP's.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from molt_lens.sparse_map import SparseMap


class MixtureOfDecoders(SparseMap):
    """Experts with a detector (G, our W_enc) and a diagonal each, over a hidden layer that all of them decode.

    Attributes:
        E: [hidden, d_in]. D: [hidden, d_out]. C: [n_units, d_out], the diagonals.
    """

    kind = "mxd"

    def __init__(
        self, d_in: int, d_out: int, *, n_experts: int, hidden: int, gate: str = "topk:32", skip: bool = False
    ):
        super().__init__(d_in, d_out, [min(hidden, d_out)] * n_experts, gate, skip)
        self.E = nn.Parameter(torch.randn(hidden, d_in) / d_in**0.5)
        self.D = nn.Parameter(torch.randn(hidden, d_out) / hidden**0.5)
        self.C = nn.Parameter(torch.randn(n_experts, d_out))

    def write(
        self,
        acts: Float[Tensor, "token unit"],
        x: Float[Tensor, "token d_in"],
        reachable: Bool[Tensor, "token unit"],  # noqa: ARG002  (a matrix product has all gradients)
    ) -> Float[Tensor, "token d_out"]:
        return (acts @ self.C) * (nn.functional.gelu(x @ self.E.T) @ self.D)

    def norms(self) -> Float[Tensor, " unit"]:
        """||D diag(c_n)||_F, of the map from the hidden layer."""
        return (self.C.square() @ self.D.square().sum(0)).sqrt()

    @torch.no_grad()
    def rescale_written_(self, input_scale: Float[Tensor, " d_in"], output_scale: Float[Tensor, " d_out"]) -> None:
        self.E.div_(input_scale)
        self.D.mul_(output_scale)

    def config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "n_experts": self.n_units,
            "hidden": self.E.shape[0],
            "gate": self.gate.spec,
            "skip": self.W_skip is not None,
        }

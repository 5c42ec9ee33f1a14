"""MOLT: a sparse mixture of linear transforms.

    y = sum_t g_t(x) U_t V_t x + b_dec (+ W_skip x),   g_t(x) = gate(e_t . x + b_t)

Lindsey et al. 2025, "Sparse mixtures of linear transforms". Latents V_t x are gated before U: held is one number per
token and rank, never a vector per token and transform.
"""

from operator import mul
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cayley_interp.kernels import takes_triton
from molt_lens.sparse_map import SparseMap
from molt_lens.transforms import active_transforms, dense_transforms, frobenius_norms

Ladder = tuple[tuple[int, int], ...]

LADDER: Ladder = ((512, 1), (256, 2), (128, 4), (64, 8), (32, 16))
"""(rank, transforms of that rank at N = 1): Lindsey et al. scale N alone."""

DENSE_ABOVE = 0.5
"""Share of open latents from which computing all of them is the faster way."""


def ladder_ranks(n: int, d: int, ladder: Ladder = LADDER) -> list[int]:
    """The rank of each transform, largest first; none exceeds d."""
    return [min(rank, d) for rank, count in ladder for _ in range(count * n)]


class Molt(SparseMap):
    """Transforms of the ranks of a ladder.

    Attributes:
        U, V: [latent, d_out] and [latent, d_in], the rows of U_t^T and of V_t, transform after transform.
    """

    kind = "molt"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        n: int = 1,
        gate: str = "batchtopk:4",
        skip: bool = False,
        ladder: Ladder = LADDER,
    ):
        if n < 1:
            raise ValueError(f"n = {n}: expected at least 1, it multiplies the ladder of ranks")
        self.n, self.ladder = n, ladder
        super().__init__(d_in, d_out, ladder_ranks(n, min(d_in, d_out), ladder), gate, skip)
        self.V = nn.Parameter(torch.cat([_orthonormal_rows(rank, d_in) for rank in self.ranks]))
        # With orthonormal rows of V, every transform then has the Frobenius norm 1, whatever its rank.
        self.U = nn.Parameter(torch.cat([torch.randn(rank, d_out) / (rank * d_out) ** 0.5 for rank in self.ranks]))

    def write(
        self,
        acts: Float[Tensor, "token unit"],
        x: Float[Tensor, "token d_in"],
        reachable: Bool[Tensor, "token unit"],
    ) -> Float[Tensor, "token d_out"]:
        if takes_triton(x):  # its products are as good for many pairs, and counting them would stop a GPU
            return active_transforms(acts, x, self.U, self.V, self.ranks, reachable)
        opened = reachable.sum(0).tolist()
        if sum(map(mul, opened, self.ranks)) > DENSE_ABOVE * len(x) * len(self.U):
            return dense_transforms(acts, x, self.U, self.V, self.ranks)
        return active_transforms(acts, x, self.U, self.V, self.ranks, reachable)

    def norms(self) -> Float[Tensor, " unit"]:
        return frobenius_norms(self.U, self.V, self.ranks)

    @torch.no_grad()
    def rescale_written_(self, input_scale: Float[Tensor, " d_in"], output_scale: Float[Tensor, " d_out"]) -> None:
        self.V.div_(input_scale)
        self.U.mul_(output_scale)

    def config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "n": self.n,
            "gate": self.gate.spec,
            "skip": self.W_skip is not None,
            "ladder": [list(step) for step in self.ladder],
        }


def _orthonormal_rows(rank: int, d: int) -> Float[Tensor, "rank d"]:
    return torch.linalg.qr(torch.randn(d, rank)).Q.T.contiguous()

"""The floors, the best linear map (ridge regression) and the mean: sparse maps without units, so all else is shared."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from molt_lens.sparse_map import SparseMap


class LinearMap(SparseMap):
    """y = W_skip x + b_dec; with W_skip 0 the mean predictor."""

    kind = "linear"

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, [], "relu", skip=True)

    @torch.no_grad()
    def fit(
        self,
        covariance: Float[Tensor, "d_in d_in"],
        cross_covariance: Float[Tensor, "d_in d_out"],
        ridge: float = 1e-4,
    ) -> None:
        """Ridge regression, (C_xx + ridge * mean variance * I)^-1 C_xy, in float64.

        Args:
            covariance, cross_covariance: of centred x and y, over the same tokens.
        """
        C = covariance.double()
        C = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
        assert self.W_skip is not None
        self.W_skip.copy_(torch.linalg.solve(C, cross_covariance.double()).T)

    def write(
        self,
        acts: Float[Tensor, "token 0"],  # noqa: ARG002
        x: Float[Tensor, "token d_in"],
        reachable: Bool[Tensor, "token 0"],  # noqa: ARG002
    ) -> Float[Tensor, "token d_out"]:
        return x.new_zeros(len(x), self.d_out)

    def norms(self) -> Float[Tensor, " unit"]:
        return self.b_enc

    def rescale_written_(self, input_scale: Float[Tensor, " d_in"], output_scale: Float[Tensor, " d_out"]) -> None:
        """There are no units."""

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "d_in": self.d_in, "d_out": self.d_out}

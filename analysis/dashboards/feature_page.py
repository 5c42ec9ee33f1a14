"""What the page of a feature shows besides: its vectors in the dictionary, and which others are near."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.dashboards.details import Details
from analysis.dashboards.opening import StringIndex
from analysis.dashboards.survey import Progress

NEAREST = 12
ROWS_AT_A_TIME = 16


class FeatureExtras:
    """Of the rows of a decoder and an encoder, in the coordinates that they were trained in.

    In raw ones a single dimension of a Gemma's output would decide most cosines.
    """

    def __init__(
        self,
        W_dec: Float[Tensor, "unit d_out"] | None,
        W_enc: Float[Tensor, "unit d_in"] | None,
        norms: Float[Tensor, " unit"] | None = None,
    ):
        """
        Args:
            W_dec: None where features do not write a vector each.
            W_enc: rows that read, compared with W_dec's where they are as long.
            norms: shown in place of the norms of W_dec's rows.
        """
        self.W_dec = None if W_dec is None else W_dec.detach()
        self.W_enc = None if W_enc is None else W_enc.detach()
        if norms is None and self.W_dec is not None:
            norms = self.W_dec.float().norm(dim=-1)
        self.norms = None if norms is None else norms.detach()

    def __call__(
        self,
        group: int,  # noqa: ARG002  (there is one)
        details: Sequence[Details],
        string: StringIndex,  # noqa: ARG002
        progress: Progress = lambda *_: None,  # noqa: ARG002  (of one product of matrices)
    ) -> list[dict[str, Any]]:
        units = torch.tensor([own.unit for own in details], dtype=torch.int64)
        nearest = [pairs for some in units.split(ROWS_AT_A_TIME) for pairs in self._nearest(some)]
        return [
            {
                "decoder_norm": None if self.norms is None else float(self.norms[unit]),
                "encoder_decoder_cosine": self._cosine(unit),
                "nearest": pairs,
            }
            for unit, pairs in zip(units.tolist(), nearest, strict=True)
        ]

    def _cosine(self, unit: int) -> float | None:
        if self.W_dec is None or self.W_enc is None or self.W_dec.shape[1] != self.W_enc.shape[1]:
            return None
        reads, writes = self.W_enc[unit].float(), self.W_dec[unit].float()
        return torch.nn.functional.cosine_similarity(reads, writes, dim=0).item()

    def _nearest(self, units: Tensor) -> list[list[tuple[int, float]]]:
        """Other features by falling |cosine| of their decoder rows; rows that are 0 are near none."""
        if self.W_dec is None or len(self.W_dec) < 2:
            return [[] for _ in units]
        W_dec = self.W_dec
        own = torch.nn.functional.normalize(W_dec[units.to(W_dec.device)].float(), dim=-1)
        inner = own @ W_dec.T.float() / W_dec.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        inner = inner.cpu()
        nearness = inner.abs()
        nearness[torch.arange(len(units)), units] = -1
        indices = nearness.topk(min(NEAREST, len(W_dec) - 1), dim=-1).indices
        cosines = inner.gather(1, indices)
        return [list(zip(*row, strict=True)) for row in zip(indices.tolist(), cosines.tolist(), strict=True)]

"""What a dashboard is made of: groups of units, where they open on a text, and what each of them does to the logits.

A group is a level of a Cayley layer's bottleneck, the transforms of a MOLT, or the features of a transcoder or SAE. A
source runs its model over windows of tokens; what reads it does not know which model that is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Kind = Literal["cayley", "transform", "feature"]


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one place; `name` is how pages call it, `affine` whether what they write lacks a scale and a mean."""

    name: str
    layer: int
    level: int | None
    kind: Kind
    ranks: list[int]
    norms: Float[Tensor, " unit"] | None = None
    affine: bool = False

    @property
    def n_units(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, eq=False)
class Text:
    """What units are looked at on.

    Attributes:
        windows: token ids, one window a row, as the model reads them.
        documents: number of the document that each token is of, rising.
        counted: tokens whose units are counted: not special, not the first of a host's sequence.
    """

    windows: Int64[Tensor, "window pos"]
    documents: Int64[Tensor, "window pos"]
    counted: Bool[Tensor, "window pos"]

    @property
    def n_ctx(self) -> int:
        return self.windows.shape[1]

    @property
    def tokens(self) -> int:
        return int(self.counted.sum())

    def spread(self, tokens: int) -> Int64[Tensor, " row"]:
        """Numbers of windows spread evenly over all, of so many tokens together or all there are."""
        n = min(len(self.windows), -(-tokens // self.n_ctx))
        return torch.arange(n) * len(self.windows) // n


Codes = tuple[Tensor, Tensor] | Tensor
"""Of a group on a batch: indices and values [window, pos, k], or dense acts [window, pos, unit], 0 where a token is not
counted."""


@runtime_checkable
class Pass(Protocol):
    """The model run over a batch of windows."""

    codes: list[Codes]
    """In the order of the source's groups."""

    def reconstruction(self, group: int) -> tuple[Float[Tensor, "window pos d"], Float[Tensor, "window pos d"]]:
        """What a group's units stand for, and what they make of it: of a level, together with those above it."""
        ...

    def writes(
        self, group: int, window: Int64[Tensor, " event"], pos: Int64[Tensor, " event"], unit: Int64[Tensor, " event"]
    ) -> Float[Tensor, "event d_model"] | None:
        """What units add to the residual stream at tokens of the batch where they are open, seen by the unembedding.

        The direct path only: through the unit's own MLP where it feeds one, then the final norm at the scale it has at
        that token, no later layer in between. None of a group whose units do not write to the residual stream.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """A model with units."""

    name: str
    groups: Sequence[Group]
    batch_size: int
    """Windows in a forward pass."""

    def run(self, windows: Int64[Tensor, "window pos"], counted: Bool[Tensor, "window pos"]) -> Pass: ...

    def logits(self, written: Float[Tensor, "event d_model"]) -> Float[Tensor, "event d_vocab"]:
        """What `Pass.writes` gives, as changes of the logits about their mean."""
        ...


@torch.no_grad()
def centred(logits: Float[Tensor, "event d_vocab"]) -> Float[Tensor, "event d_vocab"]:
    """A constant on all logits changes no probability."""
    return logits - logits.mean(-1, keepdim=True)

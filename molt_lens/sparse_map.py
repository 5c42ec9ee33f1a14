"""SparseMap: a map from a layer's input to its output through units of which few are open at a token.

    acts = gate(W_enc (x - centre) + b_enc)
    y = what the open units write, b_dec, and W_skip (x - centre) where there is a skip connection

What a unit writes is the kind's own: a vector for a transcoder's feature, a linear function of x for a transform of a
MOLT. Hence decode takes x too.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from molt_lens.gates import Gate, make_gate


class SparseMap(nn.Module, ABC):
    """What MOLTs, transcoders and their like have in common.

    Attributes:
        W_enc, b_enc: [n_units, d_in] and [n_units], the detectors.
        b_dec: [d_out], written at every token.
        W_skip: [d_out, d_in], a linear map that is always on, or None.
        ranks: rank of the linear map that each unit adds at a token.
        centre: [d_in], the point about which x is read: 0 until standardisers have been folded in.
    """

    kind: str
    centre: Float[Tensor, " d_in"]

    def __init__(self, d_in: int, d_out: int, ranks: list[int], gate: str, skip: bool):
        super().__init__()
        self.d_in, self.d_out, self.ranks, self.n_units = d_in, d_out, ranks, len(ranks)
        self.register_buffer("centre", torch.zeros(d_in))
        self.gate: Gate = make_gate(gate, self.n_units)
        self.W_enc = nn.Parameter(torch.randn(self.n_units, d_in) / d_in**0.5)
        self.b_enc = nn.Parameter(torch.zeros(self.n_units))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in)) if skip else None

    # ---- What a kind defines ----

    @abstractmethod
    def write(
        self,
        acts: Float[Tensor, "token unit"],
        x: Float[Tensor, "token d_in"],
        reachable: Bool[Tensor, "token unit"],
    ) -> Float[Tensor, "token d_out"]:
        """What the units write at centred x; `reachable` are those whose act is not 0 or has a gradient."""

    @abstractmethod
    def norms(self) -> Float[Tensor, " unit"]:
        """Frobenius norm of what a unit writes per unit of its gate; with gradients."""

    @abstractmethod
    def rescale_written_(self, input_scale: Float[Tensor, " d_in"], output_scale: Float[Tensor, " d_out"]) -> None:
        """Make what the units write into x -> output_scale * write(x / input_scale), in place."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What `make_map` needs to build it again, ready for JSON."""

    # ---- What they share ----

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch unit"]:
        """Acts: the gate value of each unit, 0 where it is closed."""
        return self.gate(self.pre_acts(x))

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch unit"]:
        return nn.functional.linear(x - self.centre, self.W_enc, self.b_enc)

    def decode(
        self, acts: Float[Tensor, "*batch unit"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """What the map writes at x with these acts, edited or not."""
        return self.decode_reachable(acts, x, acts != 0)

    def decode_reachable(
        self,
        acts: Float[Tensor, "*batch unit"],
        x: Float[Tensor, "*batch d_in"],
        reachable: Bool[Tensor, "*batch unit"],
    ) -> Float[Tensor, "*batch d_out"]:
        """`decode`, with the gradient of every reachable act, among them ones that are 0."""
        x = x - self.centre
        n_tokens = x[..., 0].numel()
        flat = (t.reshape(n_tokens, t.shape[-1]) for t in (acts, x, reachable))
        always = self.b_dec if self.W_skip is None else nn.functional.linear(x, self.W_skip, self.b_dec)
        return self.write(*flat).view(*x.shape[:-1], self.d_out) + always

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        pre = self.pre_acts(x)
        acts = self.gate(pre)
        # Without gradients only what is open matters, and thresholds reach further.
        reachable = self.gate.reachable(pre, acts) if torch.is_grad_enabled() else acts != 0
        return self.decode_reachable(acts, x, reachable)

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "token d_in"], open_rate: float, variance: float) -> None:
        """Set the scales of an untrained map from a batch of standardised inputs.

        Args:
            open_rate: share of tokens at which each unit of a ReLU or JumpReLU gate is to be open.
            variance: of what all units together write, mean over the output dimensions, where the target has 1.
        """
        if self.n_units == 0:
            return
        pre = self.pre_acts(x)
        if self.gate.spec in ("relu", "jumprelu"):
            self.b_enc.sub_(pre.quantile(1 - open_rate, dim=0))
        self.gate.calibrate(pre)
        written = self(x).var(0).mean()
        ones = torch.ones(self.d_in, dtype=x.dtype, device=x.device)
        self.rescale_written_(ones, (variance / written).sqrt().expand(self.d_out))

    @torch.no_grad()
    def rescale_(self, input_scale: Float[Tensor, " d_in"], output_scale: Float[Tensor, " d_out"]) -> None:
        """Make f into x -> output_scale * f(x / input_scale), in place; acts stay what they are."""
        self.W_enc.div_(input_scale)
        self.centre.mul_(input_scale)
        self.b_dec.mul_(output_scale)
        if self.W_skip is not None:
            self.W_skip.mul_(output_scale[:, None] / input_scale)
        self.rescale_written_(input_scale, output_scale)

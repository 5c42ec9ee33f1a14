"""TrueMLP: what a host computes from a site's input to its target, as weights and slopes instead of modules.

    mlp = read_true_mlp(host, site)
    trace = mlp.trace(x)        # its output and, at each token, what its Jacobian is made of

Read from a site's modules whatever the family calls them, and held against them before anything is measured
(`TrueMLP.check`).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cayley_interp.bottleneck import CayleySAE
from molt_lens.hosts import Host, Site
from molt_lens.replacement import true_mlp

CHECKED_TOKENS = 16
"""At which weights and modules are compared."""


@dataclass(frozen=True, eq=False)
class Norm:
    """gain * (x - mean) / sqrt(mean of squares + eps) + bias; only a LayerNorm takes the mean away and has a bias.

    Its Jacobian is diag(gain) C (I - n n^T / d) / r, with n what gain multiplies, r the root it is divided by, and C
    the centring, I - 1 1^T / d, or I.
    """

    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"] | None
    eps: float
    centred: bool

    def normalise(self, x: Float[Tensor, "token d"]) -> tuple[Float[Tensor, "token d"], Float[Tensor, "token 1"]]:
        """n and r."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        r = (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return x / r, r

    def output(self, n: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        scaled = n * self.gain
        return scaled if self.bias is None else scaled + self.bias

    def fold(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """rows diag(gain) C: the static part of a product with the Jacobian from the left."""
        rows = rows * self.gain
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows

    def carry(
        self, added: Float[Tensor, "*batch d"], r: Float[Tensor, "*batch 1"] | float
    ) -> Float[Tensor, "*batch d"]:
        """What becomes of something added to x when r stays what it is."""
        if self.centred:
            added = added - added.mean(-1, keepdim=True)
        return added * self.gain / r


@dataclass(frozen=True, eq=False)
class Trace:
    """What a block of tokens meets on its way through a site; `token` is the rows of x.

    Attributes:
        pre: n and r of the norm in front, where it belongs to the site.
        read: what the MLP reads.
        slopes: c, one number per row of `TrueMLP.reads`: the MLP itself has the Jacobian W_out (c * reads).
        written: what the MLP gives.
        post: n and r of the norm behind, where it belongs to the site.
        y: the site's target.
    """

    pre: tuple[Float[Tensor, "token d_in"], Float[Tensor, "token 1"]] | None
    read: Float[Tensor, "token d_in"]
    slopes: Float[Tensor, "token branch_row"]
    written: Float[Tensor, "token d_out"]
    post: tuple[Float[Tensor, "token d_out"], Float[Tensor, "token 1"]] | None
    y: Float[Tensor, "token d_out"]


@dataclass(frozen=True, eq=False)
class TrueMLP:
    """An MLP of m hidden units, gated or not, with the norms and the bottleneck that belong to its site.

    Attributes:
        reads: W_in [m, d_in]; of a gated MLP W_gate and W_in, [2 m, d_in].
        read_bias: [m] or [2 m], or None.
        writes: W_out^T, [m, d_out].
        write_bias: [d_out], or None.
        activation: elementwise; of the gate where there is one.
        pre_norm, post_norm: None where they are not between the site's input and its target.
        bottleneck: a CayleyGPT's, in the host's dtype: at near ties another dtype would open other features.
    """

    reads: Float[Tensor, "branch_row d_in"]
    read_bias: Float[Tensor, " branch_row"] | None
    writes: Float[Tensor, "m d_out"]
    write_bias: Float[Tensor, " d_out"] | None
    activation: Callable[[Tensor], Tensor]
    pre_norm: Norm | None
    post_norm: Norm | None
    bottleneck: CayleySAE | None

    @property
    def d_in(self) -> int:
        return self.reads.shape[1]

    @property
    def d_out(self) -> int:
        return self.writes.shape[1]

    def trace(self, x: Float[Tensor, "token d_in"]) -> Trace:
        pre = read = None
        if self.pre_norm is not None:
            pre = self.pre_norm.normalise(x)
        read = x if pre is None or self.pre_norm is None else self.pre_norm.output(pre[0])
        if self.bottleneck is not None:
            read = self.bottleneck(read.to(self.bottleneck.bias.dtype)).to(x.dtype)
        hidden, slopes = self._hidden(nn.functional.linear(read, self.reads, self.read_bias))
        written = nn.functional.linear(hidden, self.writes.T, self.write_bias)
        post = None if self.post_norm is None else self.post_norm.normalise(written)
        y = written if post is None or self.post_norm is None else self.post_norm.output(post[0])
        return Trace(pre, read, slopes, written, post, y)

    def check(self, host: Host, site: Site, x: Float[Tensor, "token d_in"]) -> None:
        """Hold the weights against the host's own modules.

        Raises:
            ValueError: they give something else: the MLP has a part that is not known here.
        """
        x = x[:CHECKED_TOKENS]
        with torch.no_grad():
            own = true_mlp(host, site)(x[None].to(host.device, host.dtype))[0].to(x)
        ours = self.trace(x.to(own)).y
        # The median: in another dtype a bottleneck may open other features at a token with a near tie.
        error = ((ours - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(torch.finfo(own.dtype).tiny)).median().item()
        allowed = max(1e-4, 8 * torch.finfo(host.dtype).eps)
        if not error <= allowed:
            raise ValueError(
                f"the weights read from {site} of {host.name} give an output that is {error:.2g} of its size away from "
                f"what the host's modules give, more than the {allowed:.2g} of rounding: its "
                f"{type(host.modules(site).mlp).__name__} does something that is not known here"
            )

    def _hidden(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden activations and slopes."""
        if len(self.reads) == len(self.writes):
            return with_slope(self.activation, pre)
        gate, up = pre.chunk(2, dim=-1)
        value, slope = with_slope(self.activation, gate)
        return value * up, torch.cat((slope * up, value), dim=-1)


def read_true_mlp(host: Host, site: Site, dtype: torch.dtype = torch.float64) -> TrueMLP:
    """The weights of a site's MLP, copied in `dtype`.

    Raises:
        ValueError: the host has no such site, or an MLP or norm whose weights are not where they are known to be.
    """
    modules = host.modules(site)
    reads, read_bias, (write, write_bias), activation = _read_mlp(modules.mlp, f"{site} of {host.name}")
    bottleneck = modules.bottleneck
    if bottleneck is not None and not isinstance(bottleneck, CayleySAE):
        raise ValueError(f"{site} of {host.name} has a {type(bottleneck).__name__} in front: expected a CayleySAE")
    return TrueMLP(
        reads=torch.cat([weight.to(dtype) for weight in reads]),
        read_bias=None if read_bias is None else torch.cat([bias.to(dtype) for bias in read_bias]),
        writes=write.to(dtype, copy=True).contiguous(),
        write_bias=None if write_bias is None else write_bias.to(dtype, copy=True),
        activation=activation,
        pre_norm=read_norm(modules.input_module, dtype) if site.input == "pre_norm_in" else None,
        post_norm=read_norm(modules.post_norm, dtype) if site.target == "post_norm_out" else None,
        bottleneck=None if bottleneck is None else copy.deepcopy(bottleneck).eval().requires_grad_(False),
    )


def _read_mlp(mlp: Any, where: str) -> tuple[list[Tensor], list[Tensor] | None, tuple[Tensor, Tensor | None], Any]:
    """Rows that read (W_gate first), their biases, W_out^T with its bias, and the activation."""
    if all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        reads, write, activation = [mlp.gate_proj, mlp.up_proj], mlp.down_proj, mlp.act_fn
    elif all(hasattr(mlp, name) for name in ("c_fc", "c_proj", "act")):  # GPT-2: Conv1D holds [in, out]
        return [mlp.c_fc.weight.T], [mlp.c_fc.bias], (mlp.c_proj.weight, mlp.c_proj.bias), mlp.act
    elif all(hasattr(mlp, name) for name in ("fc_in", "fc_out")):
        reads, write, activation = [mlp.fc_in], mlp.fc_out, nn.functional.gelu
    else:
        raise ValueError(
            f"the {type(mlp).__name__} at {where} has none of the known sets of weights: expected gate_proj, up_proj "
            "and down_proj, or c_fc and c_proj, or fc_in and fc_out"
        )
    biases = [linear.bias for linear in reads]
    known = None if any(bias is None for bias in biases) else biases
    return [linear.weight for linear in reads], known, (write.weight.T, write.bias), activation


def read_norm(norm: Any, dtype: torch.dtype) -> Norm:
    """The weights of a LayerNorm or RMSNorm.

    Raises:
        ValueError: it is neither, or has no weight.
    """
    name = type(norm).__name__
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if "Norm" not in name or not isinstance(getattr(norm, "weight", None), Tensor):
        raise ValueError(f"{name} is no norm that is known here: expected a LayerNorm or an RMSNorm with a weight")
    gain = norm.weight.to(dtype, copy=True)
    if name.startswith("Gemma"):  # its weight is what the gain exceeds 1 by
        gain = 1 + gain
    bias = getattr(norm, "bias", None)
    if eps is None:  # torch's RMSNorm without one
        eps = torch.finfo(norm.weight.dtype).eps
    return Norm(gain, None if bias is None else bias.to(dtype, copy=True), eps, centred=isinstance(norm, nn.LayerNorm))


def with_slope(activation: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of an elementwise function; by forward mode, which is exact."""
    values = torch.func.jvp(activation, (z,), (torch.ones_like(z),))
    return values[0], values[1]

"""Jacobian faithfulness: how near the derivative of what stands in for an MLP is to the MLP's own, exactly, per token.

    faithfulness = jacobian_faithfulness(host, site, replacement, x, controls={"mean": mean_jacobian(host, site, x)})
    faithfulness.mean()["cosine"], faithfulness.controls["mean"].mean()["cosine"]

After Lindsey et al. 2025, "Sparse mixtures of linear transforms", where the cosine of the flattened Jacobians is
averaged over tokens. No Jacobian is built but for mixtures of decoders; see jacobian_terms.py. A constant map can score
well, so a figure means little without its controls: the mean Jacobian, the ridge map, the skip connection alone.

A cosine depends on coordinates. They are the caller's to name:
    raw             J
    standardized    diag(1 / std_out) J diag(std_in), what maps are trained in
    covariance      J C^(1/2), C the input's covariance: directions count as data moves along them. The output is raw,
                    so |J C^(1/2)|_F^2 is the variance of J (x - mean).

Static matrices are kept in the compute dtype. For an MLP of m hidden units they are m^2 / 2 numbers, of a gated one
2 m^2; with a MOLT of T transforms and R latents m (T + R) more (gated: twice that), T R and T^2 / 2, with a transcoder
of F features m F (2 m F) and F^2 / 2. Beyond R = 16,384 and F = 8,192 what is open is taken one by one, and R and F
are not in it. In float64 a gated MLP of m = 2,048 needs 71 MB, with a MOLT of N = 1 157 MB; of m = 10,240 1.7 and
2.1 GB: there float32 halves it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.jacobian_maps import (
    Frame,
    JacobianMap,
    jacobians_of_constant,
    jacobians_of_mlp,
    jacobians_of_replacement,
)
from analysis.jacobian_terms import Jacobians, Kernels, inner, row_products, squared_norm, sum_over_tokens
from analysis.true_mlp import TrueMLP, read_true_mlp
from molt_lens import Replacement
from molt_lens.hosts import Host, Site

Coordinates = Literal["raw", "standardized", "covariance"]

DYAD_NUMBERS = 2**24
"""Bound on the numbers in the dyads of a block: a CayleyGPT's has one for each active feature."""


@dataclass(frozen=True, eq=False)
class JacobianFaithfulness:
    """Of one map, at each token, in float64: J is the true MLP's Jacobian and Jh the map's.

    Attributes:
        cosine: <J, Jh>_F / (|J| |Jh|); 0 where Jh is 0.
        relative_error: |J - Jh|_F / |J|_F. From three inner products: below 1e-7 (float32: 3e-4) it is rounding.
        norm_ratio: |Jh|_F / |J|_F.
        controls: the same of constant linear maps at the same tokens, by name.
    """

    coordinates: Coordinates
    cosine: Float[Tensor, " token"]
    relative_error: Float[Tensor, " token"]
    norm_ratio: Float[Tensor, " token"]
    controls: dict[str, "JacobianFaithfulness"] = field(default_factory=dict)

    def mean(self) -> dict[str, float]:
        return {name: values.mean().item() for name, values in self._figures().items()}

    def median(self) -> dict[str, float]:
        """Halfway between the middle two of an even number of tokens."""
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}

    def quantiles(self, q: list[float]) -> dict[str, list[float]]:
        """Each figure at the given shares of tokens, from 0 to 1, between tokens linearly."""
        shares = torch.tensor(q, dtype=torch.float64)
        return {name: values.quantile(shares).tolist() for name, values in self._figures().items()}

    def _figures(self) -> dict[str, Tensor]:
        return {"cosine": self.cosine, "relative_error": self.relative_error, "norm_ratio": self.norm_ratio}


class JacobianMeter:
    """Streams tokens through `jacobian_faithfulness`: `add` blocks of them, then `result`.

    Args:
        site: of the host's MLP; through `pre_norm_in` and `post_norm_out` the norms belong to both Jacobians.
        replacement: of any kind, from the site's raw input to its raw target.
        coordinates: see the module; "standardized" needs std_in and std_out, "covariance" needs covariance.
        controls: matrices in raw coordinates, such as `mean_jacobian`'s, a ridge map's or a skip connection's.
        block_tokens: tokens at a time; the figures do not depend on it.
        dtype: of all products. In float32 a cosine is good to about 1e-6.

    Raises:
        TypeError: a replacement of a kind that is not known here.
        ValueError: two things that disagree: widths, coordinates and what they need, a gate in training.
    """

    def __init__(
        self,
        host: Host,
        site: Site,
        replacement: Replacement,
        *,
        coordinates: Coordinates = "raw",
        std_in: Float[Tensor, " d_in"] | None = None,
        std_out: Float[Tensor, " d_out"] | None = None,
        covariance: Float[Tensor, "d_in d_in"] | None = None,
        controls: Mapping[str, Float[Tensor, "d_out d_in"]] | None = None,
        block_tokens: int = 512,
        dtype: torch.dtype = torch.float64,
    ):
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be 1 or more, got {block_tokens}")
        self.host, self.site = host, site
        self.coordinates: Coordinates = coordinates
        self.mlp = read_true_mlp(host, site, dtype)
        self.block_tokens = _bounded_block(self.mlp, block_tokens)
        _check_widths(replacement, self.mlp, host, site)
        given = {"std_in": std_in, "std_out": std_out, "covariance": covariance}
        frame = _frame(coordinates, given, self.mlp, dtype)
        self._true = jacobians_of_mlp(self.mlp, frame)
        self._maps: dict[str | None, JacobianMap] = {None: jacobians_of_replacement(replacement, frame)}
        for name, matrix in (controls or {}).items():
            expected = (self.mlp.d_out, self.mlp.d_in)
            if tuple(matrix.shape) != expected:
                raise ValueError(f"control {name!r} is {tuple(matrix.shape)}, and {site} of {host.name} is {expected}")
            self._maps[name] = jacobians_of_constant(matrix.to(self.mlp.reads), frame)
        self._kernels = Kernels()
        self._products: dict[str | None, list[Tensor]] = {name: [] for name in self._maps}

    @torch.no_grad()
    def add(self, x: Float[Tensor, "*batch d"]) -> None:
        """Compare at these inputs of the site.

        Raises:
            ValueError: inputs of another width or that are not finite; weights that are not the whole MLP.
        """
        x = _checked_inputs(x, self.mlp, self.host, self.site)
        if len(x) == 0:
            return
        if not self._products[None]:
            self.mlp.check(self.host, self.site, x)
        for some in x.split(self.block_tokens):
            true = self._true(some)
            norm = squared_norm(true, self._kernels)
            for name, jacobians_at in self._maps.items():
                products = _compare(true, norm, jacobians_at(some), self._kernels, self.mlp.d_out)
                self._products[name].append(products.double().cpu())

    def result(self) -> JacobianFaithfulness:
        """Of all tokens so far.

        Raises:
            ValueError: there were none.
        """
        if not self._products[None]:
            raise ValueError("no tokens have been added yet: call add(x) first")
        figures = {name: _figures(self.coordinates, torch.cat(p, dim=1)) for name, p in self._products.items()}
        controls = {name: figure for name, figure in figures.items() if name is not None}
        own = figures[None]
        return JacobianFaithfulness(own.coordinates, own.cosine, own.relative_error, own.norm_ratio, controls)

    def static_bytes(self) -> int:
        """Of the kernels made so far; all of them once a block has been added."""
        return self._kernels.nbytes()


def jacobian_faithfulness(
    host: Host,
    site: Site,
    replacement: Replacement,
    x: Float[Tensor, "*batch d"],
    *,
    coordinates: Coordinates = "raw",
    std_in: Float[Tensor, " d_in"] | None = None,
    std_out: Float[Tensor, " d_out"] | None = None,
    covariance: Float[Tensor, "d_in d_in"] | None = None,
    controls: Mapping[str, Float[Tensor, "d_out d_in"]] | None = None,
    block_tokens: int = 512,
    dtype: torch.dtype = torch.float64,
) -> JacobianFaithfulness:
    """The figures at the inputs x of a site; what `JacobianMeter` says of its arguments holds here.

    Raises:
        TypeError: a replacement of a kind that is not known here.
        ValueError: what `JacobianMeter` raises, or no tokens.
    """
    meter = JacobianMeter(
        host,
        site,
        replacement,
        coordinates=coordinates,
        std_in=std_in,
        std_out=std_out,
        covariance=covariance,
        controls=controls,
        block_tokens=block_tokens,
        dtype=dtype,
    )
    if x.numel() == 0:
        raise ValueError(f"x has no tokens, its shape is {tuple(x.shape)}: expected at least one to compare at")
    meter.add(x)
    return meter.result()


@torch.no_grad()
def mean_jacobian(
    host: Host,
    site: Site,
    x: Float[Tensor, "*batch d"],
    *,
    block_tokens: int = 512,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "d_out d_in"]:
    """E[J] of the true MLP over the tokens of x, in raw coordinates: the constant map nearest to all its Jacobians.

    Raises:
        ValueError: no tokens, inputs of another width than the site's or that are not finite.
    """
    mlp = read_true_mlp(host, site, dtype)
    x = _checked_inputs(x, mlp, host, site)
    if len(x) == 0:
        raise ValueError(f"x has no tokens: a mean over {site} of {host.name} needs at least one")
    mlp.check(host, site, x)
    jacobians_at = jacobians_of_mlp(mlp, Frame(x.new_ones(mlp.d_out), x.new_ones(mlp.d_in)))
    total = x.new_zeros(mlp.d_out, mlp.d_in)
    for some in x.split(_bounded_block(mlp, block_tokens)):
        total += sum_over_tokens(jacobians_at(some), mlp.d_out, mlp.d_in)
    return total / len(x)


def _compare(true: Jacobians, norm: Tensor, other: Jacobians, kernels: Kernels, d_out: int) -> Float[Tensor, "3 token"]:
    """|J|^2, <J, Jh> and |Jh|^2."""
    if other.has_row_scale:
        products = row_products([true, other], d_out)
        return torch.stack([products[0, 0], products[0, 1], products[1, 1]])
    return torch.stack([norm, inner(true, other, kernels), squared_norm(other, kernels)])


def _figures(coordinates: Coordinates, products: Float[Tensor, "3 token"]) -> JacobianFaithfulness:
    true, cross, other = products[0], products[1], products[2].clamp_min(0)
    lengths = (true * other).sqrt()
    cosine = torch.where(lengths > 0, cross / lengths, torch.zeros_like(cross))
    error = (true - 2 * cross + other).clamp_min(0)
    return JacobianFaithfulness(coordinates, cosine, (error / true).sqrt(), (other / true).sqrt())


def _frame(coordinates: Coordinates, given: dict[str, Tensor | None], mlp: TrueMLP, dtype: torch.dtype) -> Frame:
    needed = {"raw": [], "standardized": ["std_in", "std_out"], "covariance": ["covariance"]}
    if coordinates not in needed:
        raise ValueError(f"coordinates must be one of {', '.join(get_args(Coordinates))}, got {coordinates!r}")
    have = [name for name, value in given.items() if value is not None]
    if have != needed[coordinates]:
        raise ValueError(
            f"coordinates {coordinates!r} need {' and '.join(needed[coordinates]) or 'nothing else'}, and were given "
            f"{' and '.join(have) or 'nothing'}"
        )
    shapes = {"std_in": (mlp.d_in,), "std_out": (mlp.d_out,), "covariance": (mlp.d_in, mlp.d_in)}
    values: dict[str, Tensor] = {}
    for name in have:
        value = given[name]
        assert value is not None
        if tuple(value.shape) != shapes[name] or not value.isfinite().all():
            raise ValueError(f"{name} must be finite and {shapes[name]} for this site, got {tuple(value.shape)}")
        if name.startswith("std") and not (value > 0).all():
            raise ValueError(f"{name} must be above 0 everywhere, give constant dimensions 1 as a Standardizer does")
        values[name] = value.to(mlp.reads.device, torch.float64)
    out, into = mlp.reads.new_ones(mlp.d_out), mlp.reads.new_ones(mlp.d_in)
    if coordinates == "standardized":
        out, into = 1 / values["std_out"], values["std_in"]
    elif coordinates == "covariance":
        into = _square_root(values["covariance"])
    return Frame(out.to(dtype), into.to(dtype))


def _square_root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if eigenvalues[0] < -1e-6 * eigenvalues[-1]:
        raise ValueError(f"covariance has an eigenvalue of {eigenvalues[0].item():.3g}: expected none below 0")
    return vectors * eigenvalues.clamp_min(0).sqrt() @ vectors.T


def _bounded_block(mlp: TrueMLP, block_tokens: int) -> int:
    if mlp.bottleneck is None:
        return block_tokens
    active = sum(level.k for level in mlp.bottleneck.levels)
    return max(1, min(block_tokens, DYAD_NUMBERS // (active * (mlp.d_in + mlp.d_out))))


def _check_widths(replacement: Replacement, mlp: TrueMLP, host: Host, site: Site) -> None:
    if (replacement.d_in, replacement.d_out) != (mlp.d_in, mlp.d_out):
        raise ValueError(
            f"the replacement maps {replacement.d_in} to {replacement.d_out} dimensions, and {site} of {host.name} "
            f"{mlp.d_in} to {mlp.d_out}: was it made for another host?"
        )
    if replacement.training:
        raise ValueError(f"the replacement for {site} is in training mode: call replacement.eval() first")


def _checked_inputs(x: Tensor, mlp: TrueMLP, host: Host, site: Site) -> Float[Tensor, "token d_in"]:
    if x.ndim == 0 or x.shape[-1] != mlp.d_in:
        raise ValueError(f"x is {tuple(x.shape)}, and {site} of {host.name} reads {mlp.d_in} dimensions")
    x = x.reshape(-1, mlp.d_in).to(mlp.reads)
    if not x.isfinite().all():
        bad = int((~x.isfinite().all(-1)).sum())
        raise ValueError(f"{bad} of {len(x)} tokens of x are not finite: {site} of {host.name} gives finite inputs")
    return x

"""The bottleneck written as its definition: every atom built, every score computed, masks for routing, plain autograd.

Slow and large on purpose. Tests hold `CayleySAE` against it, values and gradients, under every convention.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from cayley_interp.bottleneck import CayleySAE


def reference_forward(sae: CayleySAE, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """`sae(x)` from a dense dictionary."""
    codes = reference_codes(sae, x)
    atoms = [_atoms(sae, i, x) for i in range(len(sae.levels))]
    return sum((f @ a for f, a in zip(codes[1:], atoms[1:], strict=True)), codes[0] @ atoms[0])


def reference_codes(sae: CayleySAE, x: Float[Tensor, "n d"]) -> list[Tensor]:
    """Dense codes, one [n, 2^n_level] per level, zero where a feature is not active."""
    config, codes = sae.config, []
    keys: list[Tensor] = []
    active: list[Tensor] = []
    for i, level in enumerate(sae.levels):
        s = x @ _atoms(sae, i, x).T
        z = _standardised(sae, i, s)
        key = z.detach().abs() if config.signed else z.detach()
        if i > 0:
            parents = torch.arange(1 << level.n) % (1 << sae.levels[i - 1].n)
            if config.routing == "parents":
                opened = _top(keys[-1], level.budget)[:, parents]
            else:
                opened = active[-1][:, parents]
                by_parent = key.view(len(x), -1, 1 << sae.levels[i - 1].n).transpose(1, 2)
                best = _top(by_parent, min(level.budget, by_parent.shape[-1]))
                opened = opened & best.transpose(1, 2).reshape(key.shape)
            key = key.masked_fill(~opened, -torch.inf)
        keys.append(key)
        active.append(_top(key, level.k))
        f = z if config.forward_standardized else s
        f = f if config.signed else f.relu()
        codes.append(torch.where(active[-1], f, 0))
    return codes


def _atoms(sae: CayleySAE, i: int, x: Tensor) -> Tensor:
    return sae.dictionary.atoms(torch.arange(1 << sae.levels[i].n), x.dtype)


def _standardised(sae: CayleySAE, i: int, s: Tensor) -> Tensor:
    features = slice(sae.offsets[i], sae.offsets[i] + s.shape[-1])
    bias = sae.bias[features]
    if sae.config.score_standardize == "feature":
        return (s - sae.mean[features]) / sae.std[features] + bias
    if sae.config.score_standardize == "token":
        return (s - s.mean(-1, keepdim=True)) / s.std(-1, correction=0, keepdim=True) + bias
    return s + bias


def _top(key: Tensor, k: int) -> Tensor:
    return torch.zeros_like(key, dtype=torch.bool).scatter(-1, key.topk(k).indices, True)

"""Jacobians as full matrices, by autograd in float64: what the closed forms are held against."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from analysis.jacobian import JacobianFaithfulness
from cayley_interp import CayleyGPT, CayleyGPTConfig
from molt_lens import LinearMap, MixtureOfDecoders, Molt, Replacement, SparseMap, Transcoder
from molt_lens.gates import BatchTopKGate
from molt_lens.hosts import Host, Site, load_host
from tests.molt_lens.host_models import D_VOCAB, tiny_host

IDS = torch.arange(40).reshape(2, 20) * 5 % 200
D = 32


def host_of(family: Any) -> Host:
    """Tiny, of random weights, in float64."""
    return tiny_host(family, n_layers=2, dtype=torch.float64)


def cayley_host(**options: Any) -> Host:
    torch.manual_seed(0)
    config = CayleyGPTConfig(
        n_layers=2, n_heads=4, d_model=D, n_ctx=64, d_vocab=D_VOCAB, levels="5,4,0;8,4,8", **options
    )
    model = CayleyGPT(config).double()
    for sae in model.bottlenecks():
        torch.nn.init.normal_(sae.bias, std=0.3)
        sae.mean.normal_(std=0.2)
        sae.std.uniform_(0.5, 2)
    for block in model.blocks():
        for weight in (block.mlp.fc_in.weight, block.mlp.fc_out.weight, block.norm2.weight):
            torch.nn.init.normal_(weight, std=0.3)
    return load_host(model, dtype=torch.float64)


def inputs(host: Host, site: Site, tokens: int = 12) -> Tensor:
    return host.capture(site, IDS)[0].flatten(0, 1)[:tokens]


def function_of(host: Host, site: Site) -> Callable[[Tensor], Tensor]:
    """Input to target by the host's own modules; norms written out, for transformers computes them in float32."""
    modules = host.modules(site)

    def compute(x: Tensor) -> Tensor:
        if site.input == "pre_norm_in":
            x = norm(modules.input_module, x)
        if modules.bottleneck is not None:
            x = modules.bottleneck(x)
        y = modules.mlp(x[None])[0]
        return norm(modules.post_norm, y) if site.target == "post_norm_out" else y

    return compute


def norm(module: Any, x: Tensor) -> Tensor:
    weight = module.weight
    if isinstance(module, torch.nn.LayerNorm):
        return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, module.bias, module.eps)
    eps = getattr(module, "variance_epsilon", None) or module.eps
    gain = 1 + weight if type(module).__name__.startswith("Gemma") else weight
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[token, d_out, d_in] by torch.func.jacrev."""
    return torch.func.vmap(torch.func.jacrev(lambda row: f(row[None])[0]))(x)


def jacobian_by_rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The same by a backward pass for each output: of modules with autograd functions that torch.func cannot enter."""
    x = x.detach().requires_grad_()
    y = f(x)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(y.shape[1])]
    return torch.stack(rows, dim=1)


def replacement_of(kind: str, gate: str, x: Tensor, d_out: int) -> Replacement:
    """Random weights, biases and standardisers in float64, gates open at about half of x; in eval mode."""
    torch.manual_seed(1)
    d_in = x.shape[1]
    map = _map(kind, gate, d_in, d_out)
    replacement = Replacement(map).double()
    for standardizer in (replacement.input, replacement.output):
        standardizer.mean.normal_(std=0.2)
        standardizer.std.uniform_(0.5, 2)
    for parameter in (map.b_enc, map.b_dec, map.W_skip):
        if parameter is not None:
            torch.nn.init.normal_(parameter, std=0.2)
    if isinstance(map.gate, BatchTopKGate):
        replacement.train()(x)
        map.gate.threshold *= 0.999  # it is the act of one of x: which side of it that is, rounding would decide
    return replacement.eval().requires_grad_(False)


def _map(kind: str, gate: str, d_in: int, d_out: int) -> SparseMap:
    skip = "skip" in kind
    if kind.startswith("molt"):
        return Molt(d_in, d_out, gate=gate, skip=skip, ladder=((8, 2), (4, 3), (1, 2)))
    if kind.endswith("transcoder"):
        return Transcoder(d_in, d_out, n_features=40, gate=gate, skip=skip)
    if kind.startswith("mxd"):
        return MixtureOfDecoders(d_in, d_out, n_experts=12, hidden=20, gate=gate, skip=skip)
    return LinearMap(d_in, d_out)


def figures(J: Tensor, other: Tensor) -> dict[str, Tensor]:
    """What JacobianFaithfulness defines, from full matrices; the cosine with a Jacobian of 0 is 0."""
    size, other_size = J.flatten(1).norm(dim=1), other.flatten(1).norm(dim=1)
    return {
        "cosine": ((J * other).sum((1, 2)) / (size * other_size)).nan_to_num(0),
        "relative_error": (J - other).flatten(1).norm(dim=1) / size,
        "norm_ratio": other_size / size,
    }


def assert_figures(found: JacobianFaithfulness, expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), values, rtol=1e-10, atol=1e-12)

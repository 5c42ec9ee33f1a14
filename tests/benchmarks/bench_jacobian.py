"""Exact Jacobian faithfulness in closed form against both Jacobians by batched jacrev, at the size of Gemma 3 270M."""

import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from analysis.jacobian import JacobianMeter
from molt_lens import Molt, Replacement
from molt_lens.hosts import Host, Site, load_host
from molt_lens.transforms import dense_transforms
from tests.benchmarks.measure import DTYPES, Bound, Call, Group
from tests.molt_lens.host_models import shake_vectors

NOTES = [
    "Jacobian faithfulness: the closed form takes tokens in blocks of 512, jacrev four at a time; what is the same for "
    "all tokens is made before. The bound is the MLP's forward pass and the quadratic form of half a [2m, 2m] kernel.",
]

D, HIDDEN, ACTIVE = 640, 2_048, 4
TOKENS, JACREV_TOKENS = {"cpu": 1_024, "cuda": 16_384}, 4
SITE = Site(0, target="post_norm_out")


def host_and_replacement(device: str) -> tuple[Host, Replacement, Tensor]:
    """One block of Gemma's layer-9 size with random weights, and a MOLT of N = 1 whose gate has seen its tokens."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=D,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=64,
        pad_token_id=0,
    )
    model = Gemma3ForCausalLM(config)
    shake_vectors(model)
    x = torch.randn(TOKENS[device], D, device=device)
    replacement = Replacement(Molt(D, D, n=1, gate=f"batchtopk:{ACTIVE}")).to(device)
    replacement.train()(x)
    return load_host(model.to(device)), replacement.eval().requires_grad_(False), x


def closed_form_case(dtype: torch.dtype, device: str) -> Call:
    host, replacement, x = host_and_replacement(device)
    meter = JacobianMeter(host, SITE, replacement, dtype=dtype)

    return lambda: meter.add(x)


def jacrev_case(dtype: torch.dtype, device: str) -> Call:
    """Cosines from both Jacobians of a few tokens at a time, as vmap(jacrev) gives them."""
    host, replacement, x = host_and_replacement(device)
    modules = host.modules(SITE)
    mlp, gain, x = modules.mlp.to(dtype), 1 + modules.target_module.weight.to(dtype), x.to(dtype)
    map = replacement.to(dtype).folded()

    def true(x: Tensor) -> Tensor:
        y = mlp(x)
        return y * (y.square().mean() + modules.target_module.eps).rsqrt() * gain

    def molt(x: Tensor) -> Tensor:
        acts = map.gate((x - map.centre) @ map.W_enc.T + map.b_enc)
        return dense_transforms(acts, x - map.centre, map.U, map.V, map.ranks)

    both = torch.func.vmap(torch.func.jacrev(lambda x: (true(x), molt(x))))

    def call() -> int:
        J, other = (J.flatten(1) for J in both(x[:JACREV_TOKENS]))
        (J * other).sum(1).div_(J.norm(dim=1) * other.norm(dim=1))
        return JACREV_TOKENS

    return call


def groups(device: str) -> list[Group]:
    of_token = (2 * HIDDEN) ** 2 + 6 * D * HIDDEN
    return [
        Group(
            "Jacobian faithfulness",
            f"d={D}, m={HIDDEN} gated, post-norm; MOLT N=1, BatchTopK {ACTIVE}",
            dtype,
            {
                "jacrev of both maps": lambda dtype=dtype: jacrev_case(DTYPES[dtype], device),
                "closed form": lambda dtype=dtype: closed_form_case(DTYPES[dtype], device),
            },
            Bound(flops=TOKENS[device] * of_token),
            tokens=TOKENS[device],
            rounds=5,
            memory=True,
        )
        for dtype in ("fp32", "fp64")
    ]

"""CayleyGPT: published sizes, causality, the bottleneck in its place, generation, and the folder on disk."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cayley_interp import CayleyGPT, CayleyGPTConfig
from cayley_interp.model import token_losses

SMALL = {"n_layers": 2, "n_heads": 2, "d_model": 16, "n_ctx": 12, "d_vocab": 50}


def make(levels: str | None = "4,3,0;7,5,6", **options) -> CayleyGPT:
    torch.manual_seed(0)
    return CayleyGPT(CayleyGPTConfig(**{**SMALL, "levels": levels, **options})).double().eval()


def tokens(n=3, length=12) -> torch.Tensor:
    return torch.randint(50, (n, length), generator=torch.Generator().manual_seed(1))


def built_without_memory(**config) -> CayleyGPT:
    with torch.device("meta"):
        return CayleyGPT(CayleyGPTConfig(**config))


def test_published_size_of_the_large_models():
    model = built_without_memory(n_layers=24, n_heads=16, d_model=2048, n_ctx=1024, d_vocab=50257)
    assert model.num_parameters() == 1_313_083_392


def test_published_size_of_the_small_models():
    model = built_without_memory(n_layers=12, n_heads=8, d_model=1024, n_ctx=1024, d_vocab=50304)
    assert model.num_parameters(positions=False) == 202_531_840
    assert model.num_parameters() == 203_580_416


def test_a_bottleneck_adds_one_bias_per_feature():
    assert make().num_parameters() - make(None).num_parameters() == 2 * (16 + 128)


@pytest.mark.parametrize("levels", [None, "4,3,0;7,5,6"])
def test_a_token_sees_none_after_it(levels):
    model, ids = make(levels), tokens()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    torch.testing.assert_close(model(ids)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(ids)[:, 7:], model(changed)[:, 7:])


def test_one_block_written_out():
    model, ids = make(n_layers=1), tokens()
    block = model.blocks()[0]
    x = model.tok.weight[ids] + model.wpe.weight[:12]

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    h = norm(x, block.norm1)
    q, k, v = ((h @ w.weight.T).view(3, 12, 2, 8) for w in (block.attn.q, block.attn.k, block.attn.v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    pattern = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(2)
    x = x + z @ block.attn.o.weight.T
    h = block.sparse(norm(x, block.norm2)) @ block.mlp.fc_in.weight.T
    gelu = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    logits = norm(x + gelu @ block.mlp.fc_out.weight.T, model.norm_f) @ model.tok.weight.T
    torch.testing.assert_close(model(ids), logits)


def test_the_head_is_the_embedding_and_nothing_has_a_bias():
    model = make(None)
    assert model.head.weight is model.tok.weight
    assert all(module.bias is None for module in model.modules() if isinstance(module, nn.Linear))


def test_loss_is_the_mean_cross_entropy():
    model, ids = make(), tokens()
    expected = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(model.loss(ids), expected)
    assert token_losses(torch.zeros(1, 4, 50).bfloat16(), ids[:1, :4]).dtype == torch.float32


def test_codes_are_what_the_forward_pass_used():
    model, ids = make(), tokens()
    codes = model.codes(ids)
    assert len(codes) == 2
    seen = []

    def see(sae, args, out):
        seen.append((sae.encode(args[0]), out))

    handles = [sae.register_forward_hook(see) for sae in model.bottlenecks()]
    model(ids)
    for handle in handles:
        handle.remove()
    for mine, (theirs, out), sae in zip(codes, seen, model.bottlenecks(), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.indices, b.indices)
            assert torch.equal(a.values, b.values)
        torch.testing.assert_close(sae.decode(mine), out)
    assert make(None).codes(ids) == []


def test_gradients_reach_every_parameter():
    model = make().train()
    model.loss(tokens(8)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_generation_is_seeded_and_slides():
    model = make()
    first, second = (
        model.generate(tokens(1, 10), 8, top_k=5, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert first.shape == (1, 18)
    assert torch.equal(first, second)
    greedy = model.generate(tokens(1, 10), 1, top_k=1)
    assert greedy[0, -1] == model(tokens(1, 10))[0, -1].argmax()


@pytest.mark.parametrize("standardize", ["feature", "token", "none"])
@pytest.mark.parametrize("routing", ["per_parent", "parents"])
def test_two_threads_add_up_gradients_in_one_order(routing, standardize):
    """What bit-identical runs rest on: large enough that every operation is shared between the threads."""
    options = {"d_model": 128, "n_ctx": 128, "score_standardize": standardize, "routing": routing}
    model = make("7,8,0;12,16,32", **options).float().train()
    ids = torch.randint(50, (16, 128))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = [gradients_of(model, ids) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    for again in gradients[1:]:
        assert [name for name, gradient in again.items() if not torch.equal(gradient, gradients[0][name])] == []


def gradients_of(model: CayleyGPT, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    token_losses(model(ids), ids).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_context_too_long_is_named():
    with pytest.raises(ValueError, match="13 tokens are more than the model's n_ctx=12"):
        make()(tokens(1, 13))


def test_a_dictionary_that_does_not_exist_is_refused_not_guessed():
    # In a process of its own: here the run-time checks of annotations would answer first.
    code = "from cayley_interp import CayleySAEConfig; CayleySAEConfig(d_model=64, levels='6,8,0', dictionary='glod')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "no dictionary is called 'glod': use one of ('gold', 'bent', 'random')" in result.stderr

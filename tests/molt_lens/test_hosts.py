"""Hosts against the arithmetic of their own modules, TransformerBridge, and input that they cannot take."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cayley_interp.lens import to_bridge
from cayley_interp.model import CayleyGPT, CayleyGPTConfig
from molt_lens.hosts import Host, Site, load_host
from tests.molt_lens.host_models import (
    BOS_ID,
    D_VOCAB,
    EOS_ID,
    FAMILIES,
    N_CTX,
    shake_vectors,
    tiny_bridge,
    tiny_host,
    tiny_model,
    tiny_tokenizer,
)

INPUTS = ("pre_norm_in", "pre_norm_out")
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}


def cayley_gpt() -> CayleyGPT:
    torch.manual_seed(0)
    return CayleyGPT(
        CayleyGPTConfig(n_layers=3, n_heads=4, d_model=32, n_ctx=64, d_vocab=D_VOCAB, levels="5,4,0;8,4,8")
    )


def other_model(kind: str) -> PreTrainedModel:
    """A model of a family that shares its names with one of `FAMILIES`."""
    torch.manual_seed(0)
    if kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**TEXT_CONFIG))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**TEXT_CONFIG))
    elif kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**TEXT_CONFIG, head_dim=8, query_pre_attn_scalar=8))
    else:
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={**TEXT_CONFIG, "model_type": "gemma3_text", "head_dim": 8},
                vision_config={"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1, "image_size": 28},
                image_token_index=258,
            )
        )
    shake_vectors(model)
    return model


def make(kind: str) -> Host:
    if kind == "cayley":
        return load_host(cayley_gpt())
    return tiny_host(kind) if kind in FAMILIES else load_host(other_model(kind), tokenizer=tiny_tokenizer())  # pyright: ignore[reportArgumentType]


KINDS = (*FAMILIES, "cayley", "mistral", "qwen2", "gemma2", "gemma3 with images")


def sites(host: Host, layer: int = 1) -> list[Site]:
    targets = ["mlp_out"] if host.modules(Site(layer)).post_norm is None else ["mlp_out", "post_norm_out"]
    return [Site(layer, i, t) for i in INPUTS for t in targets]  # pyright: ignore[reportArgumentType]


def unchecked(function: Callable) -> Callable:
    """A function as its users have it: here the types and shapes it names are checked before its own checks."""
    return inspect.unwrap(function)


def by_name(host: Host, name: str) -> Tensor:
    """What passes the place that a name says, "path.input" or "path.output", in a forward pass that is not stopped."""
    path, _, side = name.rpartition(".")
    seen: list[Any] = []
    handle = host.model.get_submodule(path).register_forward_hook(
        lambda _module, args, output: seen.append(args[0] if side == "input" else output)
    )
    host.logits(IDS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_capture_is_what_an_unstopped_pass_has_at_the_named_places(kind):
    host = make(kind)
    for site in sites(host):
        x, y = host.capture(site, IDS)
        names = host.names(site)
        assert torch.equal(x, by_name(host, names.hf_input))
        assert torch.equal(y, by_name(host, names.hf_target))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sites_are_the_mlps_arithmetic(family):
    host = tiny_host(family)
    modules = host.modules(Site(1))
    residual, mlp_out = host.capture(Site(1, "pre_norm_in"), IDS)
    normed, _ = host.capture(Site(1, "pre_norm_out"), IDS)
    assert torch.equal(modules.input_module(residual), normed)
    assert torch.equal(modules.mlp(normed), mlp_out)
    written = mlp_out
    if modules.post_norm is not None:
        _, written = host.capture(Site(1, target="post_norm_out"), IDS)
        assert torch.equal(modules.post_norm(mlp_out), written)
    with torch.no_grad():
        states = host.model(input_ids=IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(residual + written, states[2])


def test_a_replacement_of_a_cayley_gpt_stands_for_bottleneck_and_mlp():
    host = load_host(cayley_gpt())
    x, y = host.capture(Site(1), IDS)
    block: Any = host.model.get_submodule("layers.1")
    with torch.no_grad():
        torch.testing.assert_close(block.mlp(block.sparse(x)), y)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "cayley"])
def test_nothing_runs_after_the_target_and_no_hook_stays(kind):
    host = make(kind)
    ran: list[str] = []
    for name, module in host.model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _module, _args, _output, name=name: ran.append(name))
    for site in sites(host):
        ran.clear()
        before = {name: len(module._forward_hooks) for name, module in host.model.named_modules()}
        host.capture(site, IDS)
        assert any("1." in name for name in ran)
        assert not [name for name in ran if ".2." in name or "head" in name or name in ("model.norm", "norm_f")]
        assert before == {name: len(module._forward_hooks) for name, module in host.model.named_modules()}


def test_hooks_are_removed_when_the_pass_fails():
    host = tiny_host()
    modules = host.modules(Site(1, "pre_norm_in"))
    handle = modules.mlp.register_forward_pre_hook(lambda _module, _args: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        host.capture(Site(1, "pre_norm_in", "post_norm_out"), IDS)
    handle.remove()
    assert not modules.input_module._forward_pre_hooks
    assert not modules.target_module._forward_hooks


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3"])
def test_padding_changes_no_token(kind, side):
    host = tiny_host(kind)
    short, long = IDS[:1, :9], IDS[1:]
    mask = torch.ones_like(IDS)
    tokens = slice(0, 9) if side == "right" else slice(24 - 9, 24)
    mask[0] = 0
    mask[0, tokens] = 1
    batch = torch.full_like(IDS, EOS_ID)
    batch[0, tokens], batch[1] = short[0], long[0]
    for got, alone, neighbour in zip(
        host.capture(Site(1), batch, mask), host.capture(Site(1), short), host.capture(Site(1), long), strict=True
    ):
        torch.testing.assert_close(got[0, tokens], alone[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got[1], neighbour[0], atol=1e-5, rtol=1e-4)


def test_a_cayley_gpt_is_padded_on_the_right_only():
    host = load_host(cayley_gpt())
    mask = torch.ones_like(IDS)
    mask[0, 9:] = 0
    x, _ = host.capture(Site(2), IDS, mask)
    torch.testing.assert_close(x[0, :9], host.capture(Site(2), IDS[:1, :9])[0][0])
    with pytest.raises(ValueError, match="pad on the right"):
        host.capture(Site(2), IDS, 1 - mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_lens_names(family):
    host, bridge = tiny_host(family), tiny_bridge(family)
    assert_named(host, bridge)


def test_transformer_lens_names_of_a_cayley_gpt():
    assert_named(load_host(cayley_gpt()), to_bridge(cayley_gpt().eval()))


def assert_named(host: Host, bridge: Any) -> None:
    for site in sites(host):
        names = host.names(site)
        _, cache = bridge.run_with_cache(IDS, names_filter=[names.tl_input, names.tl_target])
        for name, expected in zip((names.tl_input, names.tl_target), host.capture(site, IDS), strict=True):
            torch.testing.assert_close(cache[name], expected, atol=1e-5, rtol=1e-5, msg=name)


def test_sites_that_a_host_does_not_have():
    host = tiny_host("llama")
    with pytest.raises(ValueError, match="layers 0 to 2, got layer 3"):
        host.capture(Site(3), IDS)
    with pytest.raises(ValueError, match="use target mlp_out"):
        host.names(Site(0, target="post_norm_out"))
    with pytest.raises(ValueError, match="0 or more"):
        Site(-1)
    with pytest.raises(ValueError, match="pre_norm_in, pre_norm_out, got 'resid_mid'"):
        unchecked(Site.__init__)(object.__new__(Site), 0, "resid_mid")
    with pytest.raises(ValueError, match="mlp_out, post_norm_out, got 'mlp'"):
        unchecked(Site.__init__)(object.__new__(Site), 0, target="mlp")


def test_ids_that_a_host_cannot_take():
    host = tiny_host("qwen3")
    with pytest.raises(ValueError, match=rf"{N_CTX + 1} tokens are more than the n_ctx={N_CTX}"):
        host.capture(Site(0), torch.zeros(1, N_CTX + 1, dtype=torch.long))
    with pytest.raises(ValueError, match=f"outside the vocabulary of Qwen3ForCausalLM, 0 to {D_VOCAB - 1}"):
        host.logits(torch.tensor([[1, D_VOCAB]]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        host.logits(torch.tensor([[-1, 1]]))
    with pytest.raises(ValueError, match="at least one token"):
        host.logits(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must be \[batch, pos\]"):
        unchecked(Host.logits)(host, IDS[0])
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        unchecked(Host.logits)(host, IDS, torch.ones(2, 3, dtype=torch.long))


def test_what_a_host_says_of_itself():
    host = tiny_host("gemma3", n_layers=2, d_model=64)
    assert (host.d_model, host.n_layers, host.n_ctx, host.d_vocab) == (64, 2, N_CTX, D_VOCAB)
    assert (host.bos_id, host.special_ids) == (BOS_ID, {BOS_ID, EOS_ID})
    assert (host.device.type, host.dtype, host.name) == ("cpu", torch.float32, "Gemma3ForCausalLM")
    assert not host.model.training
    assert not any(parameter.requires_grad for parameter in host.model.parameters())


def test_documents_get_no_bos_and_chat_is_seen_by_the_template():
    host = tiny_host("llama")
    assert host.tokenize("hé") == list("hé".encode())
    assert not host.is_chat
    assert tiny_host("llama", chat=True).is_chat
    bare = load_host(tiny_model("llama"))
    assert (bare.bos_id, bare.special_ids, bare.is_chat) == (None, frozenset(), False)
    with pytest.raises(ValueError, match="has no tokenizer: give one"):
        bare.tokenize("a")


def test_a_cayley_gpt_brings_its_tokenizer():
    from cayley_interp.tokenizer import gpt2_tokenizer

    model = CayleyGPT(CayleyGPTConfig(n_layers=1, n_heads=2, d_model=16, n_ctx=32))
    model.tokenizer = gpt2_tokenizer()
    host = load_host(model)
    assert host.tokenize("Hello world") == [15496, 995]
    assert (host.bos_id, host.special_ids) == (None, {50256})


def test_the_dtype_is_that_of_the_weights_and_not_of_the_rotary_frequencies():
    half, exact = tiny_host("llama", dtype=torch.bfloat16), tiny_host("llama", dtype=torch.float64)
    assert half.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in half.model.buffers()} == {torch.float32}
    x, _ = half.capture(Site(1), IDS)
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(x.double(), exact.capture(Site(1), IDS)[0], atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="floating-point"):
        load_host(tiny_model("llama"), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"mostly ties in torch\.bfloat16"):
        load_host(cayley_gpt(), dtype=torch.bfloat16)


def test_models_that_are_no_host():
    other = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=D_VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
        )
    )
    with pytest.raises(ValueError, match=r"model_type 'gpt_neox'.* one of gemma2, gemma3, gemma3_text, gpt2, llama"):
        load_host(other)
    with pytest.raises(ValueError, match="model_type None"):
        load_host(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="GPT2Model gives no logits"):
        load_host(GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2)))
    with pytest.raises(ValueError, match="given as a module"):
        load_host(tiny_model("gpt2"), revision="main")

"""CayleyGPT inside TransformerLens: the same numbers, hooks that are really applied, names that cannot be mistyped.

Runs on TransformerLens 3.9 (both wrappings) and on 4 (the bridge), where HookedTransformer is gone.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cayley_interp import CayleyGPT, CayleyGPTConfig, LevelCodes, load_pretrained
from cayley_interp.pretrained import BUNDLED, wrapped
from cayley_interp.tokenizer import gpt2_tokenizer
from training.recipes import RECIPES

HAS_HOOKED = importlib.util.find_spec("transformer_lens.HookedTransformer") is not None
WRAPS = ["bridge", "hooked"] if HAS_HOOKED else ["bridge"]
TEXT = "The people of these states"
SPEECH = (BUNDLED / "speech.txt").read_text()


def make(levels: str | None = "6,4,0;9,8,4;11,8,4", dtype: torch.dtype = torch.float64, **changes) -> CayleyGPT:
    """A model whose every weight and statistic matters."""
    shape = {"n_layers": 2, "n_heads": 4, "d_model": 64, "n_ctx": 24, "d_vocab": 50257} | changes
    torch.manual_seed(0)
    model = CayleyGPT(CayleyGPTConfig(levels=levels, **shape)).to(dtype).eval()
    with torch.no_grad():
        for sae in model.bottlenecks():
            sae.bias.normal_(std=0.1)
            sae.mean.normal_(std=0.1)
            sae.std.uniform_(0.5, 1.5)
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def tokens(model: CayleyGPT, batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(model.config.d_vocab, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bare() -> CayleyGPT:
    model = make()
    model.tokenizer = gpt2_tokenizer()
    return model


@pytest.fixture(scope="module", params=WRAPS)
def lens(request, bare):
    return wrapped(bare, request.param, "test")


# ---- The same numbers ----

SHAPES = ["cayley-small-2L-mlp_in-20B", "cayley-small-3L-mlp_in-20B", "cayley-large-2L-mlp_in-20B"]
SHAPES += ["cayley-large-3L-mlp_in-20B", "cayley-32k-2L-mlp_in", "vanilla-small-20B", "vanilla-large-20B"]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("recipe", SHAPES)
def test_logits_of_released_shapes_are_those_of_the_bare_model(recipe, wrap):
    # One block and a small vocabulary: width, heads, levels and conventions are the released ones.
    config = replace(RECIPES[recipe][1].model, n_layers=1, n_ctx=24, d_vocab=256)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        torch.manual_seed(0)
        model = CayleyGPT(config).to(dtype).eval()
        ids = tokens(model, batch=1, length=12)
        with torch.no_grad():
            assert (wrapped(model, wrap, recipe)(ids) - model(ids)).abs().max() < tolerance


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", ["cayley-tiny-2L-sotu", "vanilla-tiny-sotu"])
def test_logits_of_the_bundled_models_are_those_of_the_bare_ones(name, wrap):
    ids = speech(load_pretrained(name, wrap=None))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = load_pretrained(name, wrap=None, dtype=dtype)
        with torch.no_grad():
            expected, logits = model(ids), load_pretrained(name, wrap=wrap, dtype=dtype)(ids)
        assert (logits - expected).abs().max() < tolerance
        assert model.loss(ids).mean() < 5  # text to a trained model
        if wrap == "bridge" and dtype == torch.float32:
            assert torch.equal(logits, expected)  # the same kernels: a near tie of two scores cannot fall another way


def speech(model: CayleyGPT) -> Tensor:
    ids = torch.tensor([model.tokenizer.encode(SPEECH).ids[: model.config.n_ctx]])
    assert ids.shape == (1, model.config.n_ctx)
    return ids


def test_logits_and_loss(bare, lens):
    ids = tokens(bare)
    torch.testing.assert_close(lens(ids), bare(ids), rtol=0, atol=1e-10)
    assert lens(ids, return_type="loss").item() == pytest.approx(bare.loss(ids).mean().item(), abs=1e-10)


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_bare_model_is_left_as_it_was(wrap):
    model = make()
    ids = tokens(model)
    names, logits = list(model.state_dict()), model(ids)
    with_hooks = wrapped(model, wrap, "test")
    with_hooks.run_with_hooks(ids, fwd_hooks=[("blocks.0.sparse.hook_out", lambda y, hook: y * 0)])  # noqa: ARG005
    assert list(model.state_dict()) == names
    assert torch.equal(model(ids), logits)


def test_gradients_reach_the_shared_parameters():
    model = make()
    ids = tokens(model)
    model.loss(ids).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    wrapped(model, "bridge", "test")(ids, return_type="loss").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10)


def test_weights_are_those_of_the_bare_model(bare, lens):
    first = bare.blocks()[0]
    assert torch.equal(lens.W_E, bare.tok.weight)
    assert torch.equal(lens.W_U, bare.tok.weight.T)
    assert torch.equal(lens.W_in[0], first.mlp.fc_in.weight.T)
    assert torch.equal(lens.W_out[0], first.mlp.fc_out.weight.T)
    assert torch.equal(lens.W_Q[0, 1], first.attn.q.weight[16:32].T)


def test_the_residual_stream_accumulates_to_the_logits(bare, lens):
    ids = tokens(bare)
    logits, cache = lens.run_with_cache(ids)
    stream, labels = cache.accumulated_resid(layer=-1, incl_mid=True, return_labels=True)
    assert stream.shape == (2 * bare.config.n_layers + 1, *ids.shape, bare.config.d_model)
    assert labels[-1] == "final_post"
    torch.testing.assert_close(bare.head(bare.norm_f(stream[-1])), logits, rtol=0, atol=1e-10)


# ---- The bottleneck's hooks ----


def test_the_hooks_see_the_bottleneck(bare, lens):
    ids = tokens(bare)
    _, cache = lens.run_with_cache(ids)
    for layer, sae in enumerate(bare.bottlenecks()):
        x, y = cache[f"blocks.{layer}.sparse.hook_in"], cache[f"blocks.{layer}.sparse.hook_out"]
        torch.testing.assert_close(x, cache[f"blocks.{layer}.ln2.hook_normalized"] * bare.blocks()[layer].norm2.weight)
        torch.testing.assert_close(sae(x), y, rtol=0, atol=1e-10)
        for level, acts in enumerate(sae.to_dense(bare.codes(ids)[layer])):
            torch.testing.assert_close(cache[f"blocks.{layer}.sparse.hook_codes_{level}"], acts, rtol=0, atol=1e-10)


def test_no_hook_of_ours_has_a_name_that_transformer_lens_gates(lens):
    ours = [name for name in lens.hook_dict if ".sparse." in name]
    assert len(ours) == 2 * (2 + 3)
    assert not any(name.endswith(("mlp_in", "attn_in")) for name in ours)


def test_looking_changes_no_bit(bare, lens):
    ids = tokens(bare)
    logits, cache = lens.run_with_cache(ids)
    assert torch.equal(logits, lens(ids))
    assert cache["blocks.0.attn.hook_pattern"].sum(-1).allclose(torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_ablating_a_feature_is_what_it_is_in_the_bare_module(bare, lens, level, monkeypatch):
    ids = tokens(bare)
    feature = int(bare.codes(ids)[0][level].indices[0, 3, 0])

    def ablate(acts, hook):  # noqa: ARG001
        acts[..., feature] = 0
        return acts

    sae = bare.bottlenecks()[0]
    plain, decode = lens(ids), sae.decode
    ablated = lens.run_with_hooks(ids, fwd_hooks=[(f"blocks.0.sparse.hook_codes_{level}", ablate)])

    def decode_ablated(codes):
        values = codes[level].values.masked_fill(codes[level].indices == feature, 0)
        return decode((*codes[:level], LevelCodes(codes[level].indices, values), *codes[level + 1 :]))

    monkeypatch.setattr(sae, "decode", decode_ablated)
    torch.testing.assert_close(ablated, bare(ids), rtol=0, atol=1e-10)
    assert (ablated - plain).abs().max() > 1e-4


def test_a_feature_that_was_not_active_can_be_switched_on(bare, lens):
    ids = tokens(bare)
    sae = bare.bottlenecks()[1]
    indices = bare.codes(ids)[1][2].indices
    feature = next(f for f in range(2048) if not (indices == f).any())
    before, after = [], []

    def steer(acts, hook):  # noqa: ARG001
        acts[..., feature] = 3.0
        return acts

    hooks = [("blocks.1.sparse.hook_codes_2", steer), ("blocks.1.sparse.hook_out", lambda y, hook: after.append(y))]  # noqa: ARG005
    lens.run_with_hooks(ids, fwd_hooks=[("blocks.1.sparse.hook_out", lambda y, hook: before.append(y))])  # noqa: ARG005
    lens.run_with_hooks(ids, fwd_hooks=hooks)
    atom = sae.dictionary.atoms(torch.tensor([feature]), torch.float64)
    torch.testing.assert_close(after[0] - before[0], 3.0 * atom.expand_as(after[0]), rtol=0, atol=1e-10)


def test_gradients_reach_the_selected_features_and_no_others(bare, lens):
    kept, ids = [], tokens(bare)
    with lens.hooks(fwd_hooks=[("blocks.0.sparse.hook_codes_1", lambda acts, hook: kept.append(acts) or acts)]):  # noqa: ARG005
        loss = lens(ids, return_type="loss")
    (gradient,) = torch.autograd.grad(loss, kept[0])
    selected = torch.zeros_like(gradient, dtype=torch.bool).scatter(-1, bare.codes(ids)[0][1].indices, True)
    selected[:, -1] = False  # the last token predicts nothing
    assert torch.equal(gradient != 0, selected)


def test_an_edited_attention_pattern_reaches_the_output(bare, lens):
    ids = tokens(bare)
    name = "blocks.0.hook_attn_out"
    out = []
    hooks = [("blocks.0.attn.hook_pattern", lambda p, hook: p * 0), (name, lambda a, hook: out.append(a))]  # noqa: ARG005
    lens.run_with_hooks(ids, fwd_hooks=hooks)
    assert out[0].abs().max() == 0


@pytest.mark.parametrize("name", ["blocks.0.sparse.hook_codes_3", "blocks.0.sparse.hook_mlp_in", "blocks.9.hook_in"])
def test_an_unknown_hook_name_raises_everywhere(bare, lens, name):
    ids = tokens(bare)
    pair = [(name, lambda x, hook: x)]  # noqa: ARG005
    with pytest.raises(KeyError, match=r"has no hook .*nearest are"):
        lens.run_with_hooks(ids, fwd_hooks=pair)
    with pytest.raises(KeyError, match="has no hook"):
        lens.run_with_hooks(ids, pair) if "Bridge" in type(lens).__name__ else lens.run_with_hooks(ids, bwd_hooks=pair)
    with pytest.raises(KeyError, match="has no hook"), lens.hooks(fwd_hooks=pair):
        pass
    with pytest.raises(KeyError, match="has no hook"):
        lens.add_hook(name, pair[0][1])
    with pytest.raises(KeyError, match="has no hook"):
        lens.run_with_cache(ids, names_filter=name)
    with pytest.raises(KeyError, match="has no hook"):
        lens.run_with_cache(ids, names_filter=["blocks.0.sparse.hook_in", name])


def test_a_filter_picks_what_is_cached(bare, lens):
    _, cache = lens.run_with_cache(tokens(bare), names_filter=lambda name: name.endswith("hook_codes_1"))
    assert sorted(cache.keys()) == ["blocks.0.sparse.hook_codes_1", "blocks.1.sparse.hook_codes_1"]


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_vanilla_model_has_no_bottleneck_hooks(wrap):
    model = make(None)
    with_hooks = wrapped(model, wrap, "test")
    assert not [name for name in with_hooks.hook_dict if "sparse" in name]
    torch.testing.assert_close(with_hooks(tokens(model)), model(tokens(model)), rtol=0, atol=1e-10)


# ---- Strings ----


def test_a_string_is_its_token_ids(bare, lens):
    ids = torch.tensor([bare.tokenizer.encode(TEXT).ids])
    assert torch.equal(lens.to_tokens(TEXT), ids)
    assert torch.equal(lens(TEXT), lens(ids))
    assert lens.to_str_tokens(TEXT)[1] == " people"
    assert lens.to_string(ids[0]) == TEXT


def test_strings_of_different_lengths_are_padded_without_effect(lens):
    logits = lens([TEXT, "The people"])
    torch.testing.assert_close(logits[1, :2], lens("The people")[0], rtol=0, atol=1e-10)


def test_generation_continues_like_the_bare_model(bare, lens):
    ids = torch.tensor([bare.tokenizer.encode(TEXT).ids])
    longer = ids
    for _ in range(6):
        longer = torch.cat((longer, bare(longer)[:, -1:].argmax(-1)), dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    assert torch.equal(lens.generate(ids, use_past_kv_cache=False, **options), longer)
    assert lens.generate(TEXT, **options) == bare.tokenizer.decode(longer[0].tolist())


def test_more_tokens_than_the_context_are_refused(bare):
    with pytest.raises(ValueError, match="25 tokens are more than the model's n_ctx=24"):
        wrapped(bare, "bridge", "test")(tokens(bare, length=25))


# ---- Which class ----


def test_the_classes_are_those_of_transformer_lens(bare):
    from transformer_lens.model_bridge import TransformerBridge

    assert isinstance(wrapped(bare, "bridge", "test"), TransformerBridge)
    if HAS_HOOKED:
        from transformer_lens import HookedTransformer

        assert isinstance(wrapped(bare, "hooked", "test"), HookedTransformer)
    else:
        with pytest.raises(ImportError, match=r'has no HookedTransformer.*use wrap="bridge"'):
            wrapped(bare, "hooked", "test")


def test_the_adapter_is_found_through_the_entry_point():
    from importlib.metadata import entry_points

    found = entry_points(group="transformer_lens.architectures")["CayleyGPT"]
    assert found.load().__name__ == "CayleyAdapter"

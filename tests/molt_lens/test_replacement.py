"""Replacements in the forward pass of real hosts: the true MLP changes no bit, and every mode does what it says."""

import contextlib

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from cayley_interp import CayleyGPT, CayleyGPTConfig
from molt_lens import Molt, Replacement, Transcoder
from molt_lens.hosts import Host, Site, load_host
from molt_lens.replacement import spliced, true_mlp
from tests.molt_lens.host_models import D_VOCAB, FAMILIES, tiny_host

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
SITE = Site(1, target="post_norm_out")


def replacement(host: Host, seed: int = 0, dtype: torch.dtype = torch.float32) -> Replacement:
    """An untrained MOLT with standardisers that are not the identity."""
    torch.manual_seed(seed)
    d = host.d_model
    made = Replacement(Molt(d, d, gate="topk:3", ladder=((8, 1), (4, 4)), skip=True)).eval()
    made.map.W_skip.data.normal_(std=0.2)  # pyright: ignore[reportOptionalMemberAccess]
    made.input.set(torch.randn(d), torch.rand(d) + 0.5)
    made.output.set(torch.randn(d), torch.rand(d) + 0.5)
    return made.to(dtype)


def cayley_host(levels: str | None = "4,3,0;6,4,2") -> Host:
    torch.manual_seed(0)
    model = CayleyGPT(
        CayleyGPTConfig(n_layers=3, n_heads=2, d_model=16, n_ctx=12, d_vocab=D_VOCAB, levels=levels)
    ).eval()
    for sae in model.bottlenecks():
        sae.bias.data.normal_()
    return load_host(model)


HOSTS = {
    **{family: lambda family=family: tiny_host(family) for family in FAMILIES},
    "cayley": cayley_host,
    "vanilla cayley": lambda: cayley_host(None),
}


# ---- The true MLP ----


@pytest.mark.parametrize("input_name", ["pre_norm_in", "pre_norm_out"])
@pytest.mark.parametrize(("name", "target"), [*((name, "mlp_out") for name in HOSTS), ("gemma3", "post_norm_out")])
def test_the_true_mlp_changes_no_bit(name, target, input_name):
    host = HOSTS[name]()
    sites = [Site(layer, input_name, target) for layer in range(host.n_layers)]
    expected = host.logits(IDS)
    for chosen in ([sites[1]], sites):
        with spliced(host, {site: true_mlp(host, site) for site in chosen}, "replace"):
            torch.testing.assert_close(host.logits(IDS), expected, rtol=0, atol=0)
        with spliced(host, dict.fromkeys(chosen, torch.zeros_like), "replace"):
            assert (host.logits(IDS) - expected).abs().max() > 1e-3


@pytest.mark.gemma
def test_the_true_mlps_of_the_real_gemma_change_no_bit():
    host = load_host("gemma-3-270m")
    ids = torch.tensor([[host.bos_id, *host.tokenize("We must keep the peace among nations, and")]])
    sites = [Site(layer, target="post_norm_out") for layer in range(host.n_layers)]
    expected = host.logits(ids)
    with spliced(host, {site: true_mlp(host, site) for site in sites}, "replace"):
        torch.testing.assert_close(host.logits(ids), expected, rtol=0, atol=0)


# ---- The modes ----


def test_replaced_logits_are_those_of_a_host_whose_module_was_exchanged():
    host, other = tiny_host("gemma3"), tiny_host("gemma3")
    made = replacement(host)

    class Exchanged(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return made(x)

    block = other.model.get_submodule("model.layers.1")
    block.mlp, block.post_feedforward_layernorm = Exchanged(), torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    with spliced(host, {SITE: made}, "replace") as record:
        torch.testing.assert_close(host.logits(IDS), other.logits(IDS), rtol=0, atol=0)
    assert record == {}


def test_all_layers_at_once_read_what_the_replacements_before_them_wrote():
    host = tiny_host("llama")
    made = {Site(layer): replacement(host, layer) for layer in range(3)}
    with spliced(host, made, "replace"):
        logits = host.logits(IDS)
        x, _ = host.capture(Site(2), IDS)
    with spliced(host, {site: made[site] for site in (Site(0), Site(1))}, "replace"):
        expected, _ = host.capture(Site(2), IDS)
        partly = host.logits(IDS)
    torch.testing.assert_close(x, expected, rtol=0, atol=0)
    assert (logits - partly).abs().max() > 1e-3


def test_observed_are_the_host_and_the_replacement_as_they_are():
    host = tiny_host("gemma3")
    made, expected = replacement(host), host.logits(IDS)
    sites = {SITE: made, Site(2): true_mlp(host, Site(2))}
    with spliced(host, sites, "observe") as record:
        torch.testing.assert_close(host.logits(IDS), expected, rtol=0, atol=0)
    for site in sites:
        x, y = host.capture(site, IDS)
        torch.testing.assert_close((record[site].x, record[site].y), (x, y), rtol=0, atol=0)
    acts = made.encode(record[SITE].x)
    torch.testing.assert_close(record[SITE].acts, acts, rtol=0, atol=0)
    torch.testing.assert_close(record[SITE].recons, made.decode(acts, record[SITE].x), rtol=0, atol=0)
    assert 0 < (acts != 0).float().mean() < 1
    assert record[Site(2)].acts is None
    torch.testing.assert_close(record[Site(2)].recons, record[Site(2)].y, rtol=0, atol=0)


def test_the_error_term_restores_the_logits_at_all_layers():
    host = tiny_host("gemma3")
    expected = host.logits(IDS)
    made = {Site(layer, target="post_norm_out"): replacement(host, layer) for layer in range(3)}
    with spliced(host, made, "replace"):
        assert (host.logits(IDS) - expected).abs().max() > 1e-2
    with spliced(host, made, "add_error"):
        torch.testing.assert_close(host.logits(IDS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["replace", "add_error"])
def test_gradients_pass_through_the_replacement_alone(mode):
    """Of the last layer's MLP input, by the chain rule: the replacement's Jacobian after the gradient at its output."""
    host = tiny_host("llama", dtype=torch.float64)
    site = Site(2)
    made = replacement(host, dtype=torch.float64)
    modules, upstream = host.modules(site), torch.randn(2, 9, D_VOCAB, dtype=torch.float64)
    x, y = host.capture(site, IDS)
    x.requires_grad_()

    def backward() -> None:
        host.model(input_ids=IDS, use_cache=False).logits.backward(upstream)

    handle = modules.input_module.register_forward_hook(lambda *_: x)
    with spliced(host, {site: made}, mode):
        backward()
    handle.remove()

    written = (made(x.detach()) if mode == "replace" else y).detach().requires_grad_()
    handle = modules.target_module.register_forward_hook(lambda *_: written)
    backward()
    handle.remove()
    (expected,) = torch.autograd.grad(made(x), x, written.grad)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(x.grad, expected)


# ---- Edits, kept positions, dtypes ----


@pytest.mark.parametrize("mode", ["replace", "add_error"])
def test_an_edit_in_place_moves_the_output_by_what_it_moves_the_replacement(mode):
    host = tiny_host("gemma3")
    made = replacement(host)
    seen = {}

    def ablate_most_active(site: Site, acts: Tensor) -> Tensor:
        seen[site] = acts.clone()
        acts.scatter_(-1, acts.argmax(-1, keepdim=True), 0)
        return acts

    def moved(x: Tensor) -> Tensor:
        acts = made.encode(x)
        edited = acts.scatter(-1, acts.argmax(-1, keepdim=True), 0)
        before = made.decode(acts, x) if mode == "replace" else true_mlp(host, SITE)(x)
        return before + made.decode(edited, x) - made.decode(acts, x)

    with spliced(host, {SITE: made}, mode, edit=ablate_most_active):
        logits = host.logits(IDS)
    with spliced(host, {SITE: moved}, "replace"):
        torch.testing.assert_close(logits, host.logits(IDS), rtol=0, atol=1e-4)
    with spliced(host, {SITE: made}, mode):
        assert (host.logits(IDS) - logits).abs().max() > 1e-3
    assert seen[SITE].count_nonzero() > 0


@pytest.mark.parametrize("mode", ["replace", "add_error"])
def test_kept_positions_have_the_true_output(mode):
    host = tiny_host("gpt2")
    site = Site(1)
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[:, :3] = keep[1] = True
    expected = host.logits(IDS)
    with spliced(host, {site: replacement(host)}, mode, keep=keep, edit=lambda _, acts: acts * 2):
        logits = host.logits(IDS)
    torch.testing.assert_close(logits[keep], expected[keep], rtol=0, atol=0)
    assert (logits[~keep] - expected[~keep]).abs().max(-1).values.min() > 1e-3


@pytest.mark.parametrize(("host_dtype", "map_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
def test_each_computes_in_its_own_dtype(host_dtype, map_dtype):
    host = tiny_host("gemma3", dtype=host_dtype)
    made, expected = replacement(host, dtype=map_dtype), host.logits(IDS)
    with spliced(host, {SITE: made}, "observe") as record:
        host.logits(IDS)
    observed = record[SITE]
    assert (observed.x.dtype, observed.y.dtype, observed.recons.dtype) == (host_dtype, host_dtype, map_dtype)
    with spliced(host, {SITE: made}, "replace"):
        assert host.logits(IDS).dtype == host_dtype
        _, y = host.capture(SITE, IDS)
    torch.testing.assert_close(y, made(observed.x.to(map_dtype)).to(host_dtype))
    with spliced(host, {SITE: made}, "add_error"):
        torch.testing.assert_close(host.logits(IDS), expected, rtol=0, atol=1e-9)


# ---- Leaving, and what is refused ----


def n_hooks(host: Host) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules())


def test_hooks_are_gone_after_an_exception_and_after_a_refusal():
    host = tiny_host("gemma3")
    expected, before = host.logits(IDS), n_hooks(host)
    with contextlib.suppress(KeyError), spliced(host, {SITE: replacement(host)}, "replace"):
        assert n_hooks(host) == before + 2
        raise KeyError
    with pytest.raises(ValueError, match="layers 0 to 2"), spliced(host, {SITE: abs, Site(7): abs}, "replace"):
        pass
    assert n_hooks(host) == before
    torch.testing.assert_close(host.logits(IDS), expected, rtol=0, atol=0)


def test_one_layer_has_one_replacement():
    host = tiny_host("gemma3")
    both = {SITE: abs, Site(1): abs}
    with pytest.raises(ValueError, match="layer 1 is given two"), spliced(host, both, "replace"):
        pass
    with spliced(host, {SITE: abs}, "observe"):
        with pytest.raises(ValueError, match="layer 1 has a replacement"), spliced(host, {Site(1): abs}, "replace"):
            pass
        with spliced(host, {Site(0): abs}, "replace"):
            host.logits(IDS)


@pytest.mark.parametrize(
    ("mode", "options", "complaint"),
    [
        ("remove", {}, "'?replace'?, '?add_error'?, '?observe'?"),
        ("observe", {"edit": lambda _, acts: acts}, "nothing comes of"),
        ("replace", {"keep": torch.ones(2, 8, dtype=torch.bool)}, r"\(2, 9\) in this forward pass, got \(2, 8\)"),
        ("replace", {"edit": lambda _, acts: acts[..., :2]}, r"got \(2, 9, 2\)"),
        ("replace", {"edit": lambda *_: None}, "got NoneType"),
    ],
)
def test_what_cannot_be_meant_is_refused(mode, options, complaint):
    host = tiny_host("gemma3")
    refusal = pytest.raises((ValueError, TypeCheckError), match=complaint)  # of a mode, the tests' own check is faster
    with refusal, spliced(host, {SITE: replacement(host)}, mode, **options):
        host.logits(IDS)


def test_replacements_that_do_not_fit_are_refused():
    host = tiny_host("gemma3")
    cases = [
        (Replacement(Transcoder(16, 32, n_features=9, gate="relu")).eval(), {}, "made for another host"),
        (replacement(host).train(), {}, "eval"),
        (abs, {"edit": lambda _, acts: acts}, "no acts to edit"),
        (lambda x: x[..., :3], {}, "its target has"),
        (Replacement(Transcoder(32, 32, n_features=9, gate="relu")).eval().to("meta"), {}, "is on meta"),
    ]
    for stand_in, options, complaint in cases:
        with pytest.raises(ValueError, match=complaint), spliced(host, {SITE: stand_in}, "replace", **options):
            host.logits(IDS)

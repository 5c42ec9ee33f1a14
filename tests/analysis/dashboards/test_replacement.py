"""Replacements as sources: what a unit writes against closing it, in every family of hosts, for every kind of map."""

import pytest
import torch

from analysis.dashboards.replacement import ReplacementSource
from molt_lens import LinearMap, MixtureOfDecoders, Molt, Replacement, Transcoder
from molt_lens.hosts import Host, Site
from molt_lens.replacement import spliced
from tests.molt_lens.host_models import FAMILIES, tiny_host

IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
COUNTED = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.9
D = 32
KINDS = {
    "molt": lambda: Molt(D, D, gate="jumprelu", ladder=((8, 1), (4, 3)), skip=True),
    "transcoder": lambda: Transcoder(D, D, n_features=24, gate="topk:3"),
    "mxd": lambda: MixtureOfDecoders(D, D, n_experts=6, hidden=16, gate="topk:2"),
}


def make(kind: str, seed: int = 0) -> Replacement:
    """Random weights, and standardisers that matter."""
    torch.manual_seed(seed)
    replacement = Replacement(KINDS[kind]())
    for standardizer in (replacement.input, replacement.output):
        standardizer.set(torch.randn(D), torch.rand(D) + 0.5)
    with torch.no_grad():
        replacement.map.b_dec.normal_()
        if replacement.map.W_skip is not None:
            replacement.map.W_skip.normal_()
    return replacement.eval()


def last_site(host: Host, target: str = "mlp_out") -> Site:
    return Site(host.n_layers - 1, target=target)  # pyright: ignore[reportArgumentType]


def norm_input(source: ReplacementSource, run) -> torch.Tensor:
    """What the final norm reads while `run` runs the host."""
    seen = []
    handle = source.readout.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_acts_are_the_replacements_own_at_the_tokens_that_count(kind):
    host = tiny_host("llama")
    site, replacement = Site(1), make(kind)
    source = ReplacementSource(host, site, replacement, "x")
    (acts,) = source.run(IDS, COUNTED).codes
    expected = replacement.encode(host.capture(site, IDS)[0])
    torch.testing.assert_close(acts, expected * COUNTED[..., None])
    assert [group.name for group in source.groups] == ["L1"]
    assert source.groups[0].kind == ("transform" if kind == "molt" else "feature")
    assert source.groups[0].ranks == replacement.map.ranks


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_its_reconstruction_is_the_replacements_own(kind):
    host = tiny_host("llama")
    site, replacement = Site(1), make(kind)
    target, made = ReplacementSource(host, site, replacement, "x").run(IDS, COUNTED).reconstruction(0)
    x, y = host.capture(site, IDS)
    torch.testing.assert_close(target, y)
    torch.testing.assert_close(made, replacement(x))


CASES = [("gemma3", "molt", "post_norm_out"), ("gemma3", "transcoder", "mlp_out")] + [
    (family, kind, "mlp_out") for family in FAMILIES if family != "gemma3" for kind in KINDS
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "kind", "target"), CASES)
def test_what_a_unit_writes_is_what_the_logits_lose_without_it(family, kind, target):
    """In the last layer the direct path is the whole one, with the scales of the norms held where the host has them."""
    host = tiny_host(family)
    replacement = make(kind)
    site = last_site(host, target)
    source = ReplacementSource(host, site, replacement, "x")
    run = source.run(IDS, COUNTED)
    (acts,) = run.codes
    events = acts.nonzero()
    window, pos, unit = events[:: len(events) // 8].T
    written = run.writes(0, window, pos, unit)
    final = norm_input(source, lambda: host.logits(IDS))
    norm = source.readout.module
    W_U = host.model.get_output_embeddings().weight
    for i in range(len(unit)):
        w, p, u = int(window[i]), int(pos[i]), int(unit[i])

        def close(_, acts, w=w, p=p, u=u):
            acts[w, p, u] = 0
            return acts

        def without(close=close):
            with spliced(host, {site: replacement}, "add_error", edit=close):
                host.logits(IDS)

        if source.post_norm is None:
            change = (final - norm_input(source, without))[w, p]
        else:  # the norm behind the MLP, linearised by hand
            x, y = (t[w, p] for t in host.capture(site, IDS))
            one = torch.zeros(replacement.map.n_units)
            one[u] = acts[w, p, u]
            raw = replacement.decode(one, x) - replacement.decode(torch.zeros_like(one), x)
            post = host.modules(site).post_norm
            change = raw * (1 + post.weight) / (y.square().mean() + post.eps).sqrt()
        at, direction = final[w, p].double(), change.double()
        if family == "gpt2":
            centred = at - at.mean()
            scale = (centred.square().mean() + norm.eps).sqrt()
            expected = (direction - direction.mean()) * norm.weight.double() / scale
        else:
            eps = norm.eps if family == "gemma3" else norm.variance_epsilon
            gain = norm.weight.double() + (1 if family == "gemma3" else 0)
            expected = direction * gain / (at.square().mean() + eps).sqrt()
        torch.testing.assert_close(written[i].double(), expected, rtol=1e-3, atol=1e-4)
        logits = source.logits(written[i : i + 1])[0]
        by_hand = (W_U.double() @ expected) - (W_U.double() @ expected).mean()
        torch.testing.assert_close(logits.double(), by_hand, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_all_units_together_add_what_the_map_writes_without_its_bias(kind):
    host = tiny_host("gemma3")
    replacement = make(kind)
    source = ReplacementSource(host, Site(1, target="post_norm_out"), replacement, "x")
    run = source.run(IDS, torch.ones_like(IDS, dtype=torch.bool))
    window, pos = torch.tensor([0, 1, 2]), torch.tensor([3, 20, 7])
    x = host.capture(source.site, IDS)[0][window, pos]
    acts = replacement.encode(x)
    expected = replacement.decode(acts, x) - replacement.decode(torch.zeros_like(acts), x)
    torch.testing.assert_close(run.added_by_all(window, pos), expected, rtol=1e-4, atol=1e-4)
    event, unit = acts.nonzero(as_tuple=True)
    parts = run.added(window[event], pos[event], unit)
    torch.testing.assert_close(torch.zeros_like(expected).index_add_(0, event, parts), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_a_source_is_refused():
    host = tiny_host("llama")
    with pytest.raises(ValueError, match="kind 'linear', which has no units"):
        ReplacementSource(host, Site(0), Replacement(LinearMap(D, D)), "ridge")
    with pytest.raises(ValueError, match=r"maps 16 to 16 dimensions, and .* has d_model=32"):
        ReplacementSource(host, Site(0), Replacement(Transcoder(16, 16, n_features=4, gate="relu")), "narrow")

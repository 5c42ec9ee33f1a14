"""Exact Jacobian faithfulness against full matrices by autograd, for every family, kind, gate and coordinates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from analysis import jacobian_maps
from analysis.jacobian import JacobianMeter, jacobian_faithfulness, mean_jacobian
from molt_lens import LinearMap, Molt, Replacement
from molt_lens.hosts import Site, load_host
from tests.analysis.autograd_jacobians import (
    D,
    assert_figures,
    cayley_host,
    figures,
    function_of,
    host_of,
    inputs,
    jacobian,
    jacobian_by_rows,
    replacement_of,
)
from tests.molt_lens.host_models import FAMILIES, tiny_host

SITES = [
    *((family, Site(1)) for family in FAMILIES),
    ("gemma3", Site(1, target="post_norm_out")),
    ("gpt2", Site(1, input="pre_norm_in")),
    ("llama", Site(1, input="pre_norm_in")),
    ("gemma3", Site(1, input="pre_norm_in", target="post_norm_out")),
]
KINDS = [
    *(("molt", gate) for gate in ("relu", "jumprelu", "topk:2", "batchtopk:2")),
    ("molt-skip", "batchtopk:2"),
    *(("transcoder", gate) for gate in ("relu", "jumprelu", "topk:5", "batchtopk:5")),
    ("skip-transcoder", "topk:5"),
    ("mxd", "topk:3"),
    ("mxd-skip", "relu"),
    ("linear", "relu"),
]
POST_NORM = Site(1, target="post_norm_out")


def statistics() -> dict[str, dict]:
    torch.manual_seed(2)
    factor = torch.randn(D, D, dtype=torch.float64)
    return {
        "raw": {},
        "standardized": {
            "std_in": torch.rand(D, dtype=torch.float64) + 0.5,
            "std_out": torch.rand(D, dtype=torch.float64) + 0.5,
        },
        "covariance": {"covariance": factor @ factor.T / D},
    }


def in_coordinates(J, given: dict):
    if "covariance" in given:
        values, vectors = torch.linalg.eigh(given["covariance"])
        return J @ (vectors * values.sqrt())  # another root of it: figures do not depend on which
    return J * given["std_in"] / given["std_out"][:, None] if given else J


@pytest.fixture(scope="module")
def gemma():
    return host_of("gemma3")


@pytest.fixture(scope="module")
def x(gemma):
    return inputs(gemma, POST_NORM)


@pytest.mark.parametrize("kind", ["molt-skip", "mxd"])
@pytest.mark.parametrize(("family", "site"), SITES, ids=lambda v: f"{v.input},{v.target}" if isinstance(v, Site) else v)
def test_every_family_and_site(family, site, kind):
    host = host_of(family)
    x = inputs(host, site)
    replacement = replacement_of(kind, "topk:2", x, D)
    J, other = jacobian(function_of(host, site), x), jacobian_by_rows(replacement, x)
    assert_figures(jacobian_faithfulness(host, site, replacement, x), figures(J, other))


@pytest.mark.parametrize("coordinates", ["raw", "standardized", "covariance"])
@pytest.mark.parametrize(("kind", "gate"), KINDS)
def test_every_kind_and_gate_in_all_coordinates(gemma, x, kind, gate, coordinates):
    replacement, given = replacement_of(kind, gate, x, D), statistics()[coordinates]
    J, other = (
        in_coordinates(J, given) for J in (jacobian(function_of(gemma, POST_NORM), x), jacobian_by_rows(replacement, x))
    )
    found = jacobian_faithfulness(gemma, POST_NORM, replacement, x, coordinates=coordinates, **given)
    assert_figures(found, figures(J, other))
    assert found.coordinates == coordinates


def test_the_reference_gate_has_the_derivative_of_its_value_not_its_surrogate(gemma, x):
    replacement = replacement_of("molt", "reference", x, D)
    map = replacement.map
    nothing = torch.zeros_like

    def plain(x):
        z = replacement.input(x)
        pre = z @ map.W_enc.T + map.b_enc
        acts = torch.where(map.gate(pre.detach()) != 0, pre, nothing(pre))
        gates = acts.repeat_interleave(torch.tensor(map.ranks), dim=-1, output_size=len(map.U))
        return replacement.output.inverse((z @ map.V.T * gates) @ map.U + map.b_dec)

    map.gate.threshold.fill_(0.4)
    torch.testing.assert_close(plain(x), replacement(x))
    J = jacobian(function_of(gemma, POST_NORM), x)
    found = jacobian_faithfulness(gemma, POST_NORM, replacement, x)
    assert_figures(found, figures(J, jacobian_by_rows(plain, x)))
    surrogate = figures(J, jacobian_by_rows(replacement, x))["cosine"]
    assert (found.cosine - surrogate).abs().max() > 1e-3


def test_a_large_transcoder_is_taken_by_its_open_features(gemma, x, monkeypatch):
    replacement = replacement_of("skip-transcoder", "batchtopk:5", x, D)
    static = jacobian_faithfulness(gemma, POST_NORM, replacement, x)
    monkeypatch.setattr(jacobian_maps, "STATIC_FEATURES", 10)
    meter = JacobianMeter(gemma, POST_NORM, replacement)
    meter.add(x)
    assert_figures(meter.result(), figures_of(static))


def test_a_large_molt_is_taken_by_its_open_transforms(gemma, x, monkeypatch):
    replacement = replacement_of("molt-skip", "batchtopk:2", x, D)
    meter = JacobianMeter(gemma, POST_NORM, replacement)
    meter.add(x)
    kept = meter.static_bytes()
    monkeypatch.setattr(jacobian_maps, "STATIC_LATENTS", 10)
    other = JacobianMeter(gemma, POST_NORM, replacement)
    other.add(x)
    assert_figures(other.result(), figures_of(meter.result()))
    assert other.static_bytes() < kept


def figures_of(found) -> dict:
    return {name: getattr(found, name) for name in ("cosine", "relative_error", "norm_ratio")}


@pytest.mark.parametrize("site", [Site(1), Site(1, input="pre_norm_in")], ids=lambda site: site.input)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_standardize": "token"},
        {"score_standardize": "none"},
        {"forward_standardized": False, "signed": True},
        {"signed": True, "routing": "parents", "dictionary": "random"},
    ],
    ids=str,
)
def test_a_cayley_gpts_block_through_its_active_features(options, site):
    host = cayley_host(**options)
    x = inputs(host, site)
    for kind in ("molt", "mxd", "transcoder"):
        replacement = replacement_of(kind, "topk:2", x, D)
        J, other = jacobian_by_rows(function_of(host, site), x), jacobian_by_rows(replacement, x)
        assert J.norm() > 0.1
        assert_figures(jacobian_faithfulness(host, site, replacement, x), figures(J, other))
    assert_close(mean_jacobian(host, site, x), J.mean(0))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# ---- Controls and identities ----


def test_controls_go_through_the_same_forms(gemma, x):
    given = statistics()["standardized"]
    replacement = replacement_of("molt-skip", "batchtopk:2", x, D)
    controls = {
        "skip": replacement.folded().W_skip,
        "random": torch.randn(D, D),
        "mean": mean_jacobian(gemma, POST_NORM, x),
    }
    J = jacobian(function_of(gemma, POST_NORM), x)
    assert_close(controls["mean"], J.mean(0))
    found = jacobian_faithfulness(
        gemma, POST_NORM, replacement, x, coordinates="standardized", controls=controls, **given
    )
    assert list(found.controls) == ["skip", "random", "mean"]
    for name, matrix in controls.items():
        other = matrix.double().expand(len(x), D, D)
        assert_figures(found.controls[name], figures(in_coordinates(J, given), in_coordinates(other, given)))
        assert found.controls[name].coordinates == "standardized"


@pytest.mark.parametrize(("family", "site"), SITES, ids=str)
def test_the_mean_jacobian_of_every_site(family, site):
    host = host_of(family)
    x = inputs(host, site)
    expected = jacobian(function_of(host, site), x).mean(0)
    assert_close(mean_jacobian(host, site, x, block_tokens=5), expected)


@pytest.mark.parametrize("scale", [1.0, 3.0, -0.5])
def test_the_true_jacobian_itself_scaled(gemma, x, scale):
    """At a single token the mean Jacobian is the Jacobian."""
    J = mean_jacobian(gemma, POST_NORM, x[:1])
    found = jacobian_faithfulness(
        gemma, POST_NORM, replacement_of("linear", "relu", x, D), x[:1], controls={"own": scale * J}
    ).controls["own"]
    assert found.cosine.item() == pytest.approx(1 if scale > 0 else -1, abs=1e-12)
    assert found.norm_ratio.item() == pytest.approx(abs(scale), rel=1e-12)
    assert found.relative_error.item() == pytest.approx(abs(scale - 1), abs=1e-7)


def test_a_linear_replacement_and_its_matrix_as_a_control_agree(gemma, x):
    replacement = replacement_of("linear", "relu", x, D)
    torch.nn.init.normal_(replacement.map.W_skip)
    found = jacobian_faithfulness(gemma, POST_NORM, replacement, x, controls={"same": replacement.folded().W_skip})
    assert_figures(found.controls["same"], figures_of(found))


def test_a_map_whose_jacobian_is_zero(gemma, x):
    found = jacobian_faithfulness(gemma, POST_NORM, Replacement(LinearMap(D, D)).double().eval(), x)
    assert_figures(found, {"cosine": 0 * x[:, 0], "relative_error": 0 * x[:, 0] + 1, "norm_ratio": 0 * x[:, 0]})


@given(blocks=st.lists(st.integers(1, 12), min_size=1, max_size=4), block_tokens=st.integers(1, 16))
def test_neither_blocks_nor_calls_matter(gemma_case, blocks, block_tokens):
    host, x, replacement, whole = gemma_case
    meter = JacobianMeter(host, POST_NORM, replacement, block_tokens=block_tokens)
    taken = 0
    for size in blocks:
        meter.add(x[taken : taken + size])
        taken = min(taken + size, len(x))
    assert_figures(meter.result(), {name: values[:taken] for name, values in figures_of(whole).items()})


@pytest.fixture(scope="module")
def gemma_case(gemma, x):
    replacement = replacement_of("molt-skip", "batchtopk:2", x, D)
    return gemma, x, replacement, jacobian_faithfulness(gemma, POST_NORM, replacement, x)


def test_float32_is_near(gemma, x):
    replacement = replacement_of("molt-skip", "batchtopk:2", x, D)
    exact = jacobian_faithfulness(gemma, POST_NORM, replacement, x)
    rounded = jacobian_faithfulness(gemma, POST_NORM, replacement, x, dtype=torch.float32)
    assert rounded.cosine.dtype == torch.float64
    assert (rounded.cosine - exact.cosine).abs().max() < 1e-5


def test_mean_median_and_quantiles(gemma_case):
    found = gemma_case[-1]
    assert found.mean()["cosine"] == pytest.approx(found.cosine.mean().item())
    assert found.median()["norm_ratio"] == pytest.approx(found.norm_ratio.quantile(0.5).item())
    low, high = found.quantiles([0.0, 1.0])["relative_error"]
    assert (low, high) == (found.relative_error.min().item(), found.relative_error.max().item())


# ---- Errors ----


def test_errors_name_what_disagrees(gemma, x):
    good = replacement_of("molt", "topk:2", x, D)
    with pytest.raises(ValueError, match=r"maps 16 to 32 dimensions, and Site.* 32 to 32"):
        jacobian_faithfulness(gemma, POST_NORM, replacement_of("molt", "topk:2", x[:, :16], D), x)
    with pytest.raises(ValueError, match=r"x is \(12, 16\), and Site.* of Gemma3ForCausalLM reads 32 dimensions"):
        jacobian_faithfulness(gemma, POST_NORM, good, x[:, :16])
    with pytest.raises(ValueError, match="1 of 12 tokens of x are not finite"):
        jacobian_faithfulness(gemma, POST_NORM, good, torch.where(torch.arange(12)[:, None] == 3, torch.nan, x))
    with pytest.raises(ValueError, match="x has no tokens"):
        jacobian_faithfulness(gemma, POST_NORM, good, x[:0])
    with pytest.raises(ValueError, match="x has no tokens"):
        mean_jacobian(gemma, POST_NORM, x[:0])
    with pytest.raises(ValueError, match="no tokens have been added"):
        JacobianMeter(gemma, POST_NORM, good).result()
    with pytest.raises(ValueError, match="training mode"):
        jacobian_faithfulness(gemma, POST_NORM, good.train(), x)
    good.eval()
    with pytest.raises(ValueError, match=r"control 'mean' is \(32, 16\), and Site.* is \(32, 32\)"):
        jacobian_faithfulness(gemma, POST_NORM, good, x, controls={"mean": torch.zeros(32, 16)})
    with pytest.raises(ValueError, match="Gemma3ForCausalLM has layers 0 to 1, got layer 9"):
        jacobian_faithfulness(gemma, Site(9), good, x)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no norm behind its MLPs, so no post_norm_out"):
        jacobian_faithfulness(tiny_host("llama"), POST_NORM, good, x)


def test_errors_of_coordinates(gemma, x):
    good, given = replacement_of("molt", "topk:2", x, D), statistics()
    cases = [
        ("standardized", {}, "need std_in and std_out, and were given nothing"),
        ("raw", given["covariance"], "need nothing else, and were given covariance"),
        ("covariance", given["standardized"], "need covariance, and were given std_in and std_out"),
        ("whitened", {}, "raw.*, .*standardized.*, .*covariance"),
        ("covariance", {"covariance": -torch.eye(D)}, "expected none below 0"),
        ("covariance", {"covariance": torch.eye(3)}, r"must be finite and \(32, 32\)"),
        ("standardized", {"std_in": torch.zeros(D), "std_out": torch.ones(D)}, "std_in must be above 0"),
    ]
    for coordinates, statistics_given, message in cases:
        # Of a name, the tests' own check of types is faster.
        with pytest.raises((ValueError, TypeCheckError), match=message):
            jacobian_faithfulness(gemma, POST_NORM, good, x, coordinates=coordinates, **statistics_given)


def test_a_gate_whose_acts_depend_on_the_batch_is_refused(gemma, x):
    replacement = replacement_of("molt", "batchtopk:2", x, D)
    replacement.map.gate.threshold.fill_(-1)
    with pytest.raises(ValueError, match="has no threshold yet"):
        jacobian_faithfulness(gemma, POST_NORM, replacement, x)


@pytest.mark.gemma
def test_the_real_gemma_in_float64():
    """Layer 9 of Gemma 3 270M at eight tokens of a sentence, a MOLT of N = 1 in its place."""
    host, site = load_host("gemma-3-270m"), Site(9, target="post_norm_out")
    ids = torch.tensor([[host.bos_id, *host.tokenize("We must keep the peace among nations, and")]])
    x = host.capture(site, ids)[0][0, 1:9].double()
    torch.manual_seed(0)
    replacement = Replacement(Molt(640, 640, n=1, gate="topk:4")).eval().requires_grad_(False).double()
    replacement.input.set(x.mean(0), x.std(0))
    modules = host.modules(site)
    modules.mlp.double()  # after the forward pass, so that the Jacobian too is of float64 copies
    J, other = jacobian(function_of(host, site), x), jacobian_by_rows(replacement, x)
    modules.mlp.float()
    found = jacobian_faithfulness(host, site, replacement, x, controls={"mean": mean_jacobian(host, site, x)})
    assert_figures(found, figures(J, other))
    assert_figures(found.controls["mean"], figures(J, J.mean(0).expand_as(J)))

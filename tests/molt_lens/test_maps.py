"""Sparse maps against their formulas in float64: values, every gradient, norms, folding, and how they start."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from molt_lens import LinearMap, MixtureOfDecoders, Molt, Replacement, SparseMap, Transcoder, make_map, matched_map
from molt_lens.molt import ladder_ranks
from molt_lens.transforms import active_transforms, dense_transforms, frobenius_norms

LADDER = ((8, 1), (4, 2), (2, 4))
GATES = ["relu", "jumprelu", "topk:2", "batchtopk:2"]
D_IN, D_OUT = 12, 10


def molt(gate: str = "topk:2", **options) -> Molt:
    torch.manual_seed(0)
    made = Molt(D_IN, D_OUT, gate=gate, ladder=LADDER, **options)
    return randomised(made)


def randomised(made: SparseMap) -> SparseMap:
    for name, parameter in made.named_parameters():
        if name != "gate.log_threshold":
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    made.centre.normal_()
    return made.double().eval()


def every_map(gate: str = "topk:2") -> list[SparseMap]:
    torch.manual_seed(0)
    return [
        randomised(made)
        for made in (
            Molt(D_IN, D_OUT, gate=gate, ladder=LADDER),
            Molt(D_IN, D_OUT, gate=gate, ladder=LADDER, skip=True),
            Transcoder(D_IN, D_OUT, n_features=40, gate=gate),
            Transcoder(D_IN, D_OUT, n_features=40, gate=gate, skip=True),
            MixtureOfDecoders(D_IN, D_OUT, n_experts=20, hidden=15, gate=gate),
            LinearMap(D_IN, D_OUT),
        )
    ]


def by_definition(made: Molt, x: Tensor) -> Tensor:
    """The sum over transforms, each of them a matrix."""
    x = x - made.centre
    acts = made.gate(x @ made.W_enc.T + made.b_enc)
    y = made.b_dec + (x @ made.W_skip.T if made.W_skip is not None else 0)
    for t, (u, v) in enumerate(zip(made.U.split(made.ranks), made.V.split(made.ranks), strict=True)):
        y = y + acts[:, t, None] * (x @ (u.T @ v).T)
    return y


# ---- MOLT ----


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("way", ["active", "dense"])
def test_a_molt_is_its_definition_with_all_gradients(gate, skip, way, monkeypatch):
    monkeypatch.setattr("molt_lens.molt.DENSE_ABOVE", {"active": 1.0, "dense": -1.0}[way])
    made = molt(gate, skip=skip)
    x = torch.randn(9, D_IN, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, D_OUT, dtype=torch.float64)
    leaves = {"x": x, **dict(made.named_parameters())}
    gradients = []
    for y in (made(x), by_definition(made, x)):
        gradients.append((y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream)))
    for name, fast, slow in zip(["y", *leaves], *gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12, msg=name)
    assert gradients[0][1 + list(leaves).index("W_enc")].count_nonzero() > 0


def test_only_what_is_open_is_touched():
    """Poison in the weights of closed transforms does not reach the output of the active path."""
    made = molt("topk:1")
    x = torch.randn(1, D_IN, dtype=torch.float64)
    acts = made.encode(x)
    expected = made(x)
    closed = (acts[0] == 0).repeat_interleave(torch.tensor(made.ranks))
    made.U.data[closed] = torch.nan
    torch.testing.assert_close(made(x), expected, rtol=0, atol=0)


def test_edited_acts_are_decoded():
    made = molt("topk:2")
    x = torch.randn(4, D_IN, dtype=torch.float64)
    acts = made.encode(x)
    acts[:, 3] = 1.5
    acts[:, 0] = 0
    centred = x - made.centre
    expected = dense_transforms(acts, centred, made.U, made.V, made.ranks) + made.b_dec
    torch.testing.assert_close(made.decode(acts, x), expected)


def test_any_leading_shape():
    for made in every_map():
        x = torch.randn(2, 3, D_IN, dtype=torch.float64)
        torch.testing.assert_close(made(x), made(x.flatten(0, 1)).view(2, 3, D_OUT))
        torch.testing.assert_close(made(x[0, 0]), made(x)[0, 0])


def test_norms_and_their_gradients():
    made = molt()
    U, V = made.U, made.V
    explicit = torch.stack([(u.T @ v).norm() for u, v in zip(U.split(made.ranks), V.split(made.ranks), strict=True)])
    fast = frobenius_norms(U, V, made.ranks)
    torch.testing.assert_close(fast, explicit)
    upstream = torch.randn(len(explicit), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(fast, (U, V), upstream), torch.autograd.grad(explicit, (U, V), upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_an_unreachable_act_has_no_gradient_and_a_reachable_closed_one_has():
    made = molt()
    x = torch.randn(1, D_IN, dtype=torch.float64)
    acts = torch.zeros(1, made.n_units, dtype=torch.float64, requires_grad=True)
    reachable = torch.zeros(1, made.n_units, dtype=torch.bool)
    reachable[0, 2] = True
    active_transforms(acts, x, made.U, made.V, made.ranks, reachable).sum().backward()
    assert acts.grad is not None
    u, v = made.U.split(made.ranks)[2], made.V.split(made.ranks)[2]
    expected = torch.zeros_like(acts)
    expected[0, 2] = ((v @ x[0]) @ u).sum()
    torch.testing.assert_close(acts.grad, expected)


def test_the_ladder():
    assert ladder_ranks(1, 4096) == [512] + 2 * [256] + 4 * [128] + 8 * [64] + 16 * [32]
    assert ladder_ranks(2, 64) == 30 * [64] + 32 * [32]
    assert len(ladder_ranks(50, 768)) == 1550
    assert sum(ladder_ranks(50, 768)) == 128_000


# ---- The others ----


def test_transcoder_by_its_formula():
    _, _, plain, skip, *_ = every_map()
    assert isinstance(plain, Transcoder)
    assert isinstance(skip, Transcoder)
    x = torch.randn(6, D_IN, dtype=torch.float64)
    for made in (plain, skip):
        pre = (x - made.centre) @ made.W_enc.T + made.b_enc
        acts = pre.relu() * F.one_hot(pre.topk(2).indices, 40).sum(1)
        expected = acts @ made.W_dec + made.b_dec
        if made.W_skip is not None:
            expected = expected + (x - made.centre) @ made.W_skip.T
        torch.testing.assert_close(made(x), expected)


def test_mixture_of_decoders_is_a_sum_of_expert_matrices():
    made = every_map()[4]
    assert isinstance(made, MixtureOfDecoders)
    x = torch.randn(6, D_IN, dtype=torch.float64)
    hidden = F.gelu((x - made.centre) @ made.E.T)
    experts = made.D[None] * made.C[:, None]
    expected = torch.einsum("bn,nho,bh->bo", made.encode(x), experts, hidden) + made.b_dec
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(made.norms(), experts.flatten(1).norm(dim=1))


def test_ridge_is_the_least_squares_solution_and_its_floor_the_mean():
    torch.manual_seed(0)
    x = torch.randn(500, D_IN, dtype=torch.float64)
    y = x @ torch.randn(D_IN, D_OUT, dtype=torch.float64) + torch.randn(500, D_OUT, dtype=torch.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    made = LinearMap(D_IN, D_OUT).double()
    torch.testing.assert_close(made(x), torch.zeros_like(y))
    made.fit(x.T @ x / 500, x.T @ y / 500, ridge=0.0)
    torch.testing.assert_close(made(x), x @ torch.linalg.lstsq(x, y).solution)


# ---- Sizes ----


@pytest.mark.parametrize("d", [640, 768, 1152, 2560])
@pytest.mark.parametrize("n", [1, 4])
def test_kinds_match_in_parameters(d, n):
    with torch.device("meta"):
        sizes = {
            kind: sum(p.numel() for p in matched_map(kind, d, d, n=n, gate="topk:4").parameters())
            for kind in ("molt", "molt-skip", "transcoder", "skip-transcoder", "mxd")
        }
    capped = 2 * d * (sum(ladder_ranks(n, d))) + 31 * n * (d + 1) + d
    assert sizes["molt"] == capped
    for kind in ("transcoder", "mxd"):
        assert sizes[kind] == pytest.approx(sizes["molt"], rel=2e-3)
    assert sizes["molt-skip"] - sizes["molt"] == sizes["skip-transcoder"] - sizes["transcoder"] == d * d


def test_a_map_is_made_again_from_its_config():
    for made in every_map():
        again = make_map(made.config())
        assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in made.state_dict().items()}
        assert again.config() == made.config()


@pytest.mark.parametrize(
    "config", [{}, {"kind": "sae"}, {"kind": "molt", "d_in": 4}, {"kind": "linear", "d_in": 4, "d_out": 4, "k": 2}]
)
def test_configs_that_describe_no_map_are_refused(config):
    with pytest.raises(ValueError, match=r"kind|settings"):
        make_map(config)


# ---- Standardised and folded ----


@pytest.mark.parametrize("gate", GATES)
def test_folding_into_raw_coordinates_is_exact(gate):
    for made in every_map(gate):
        replacement = Replacement(made).double().eval()
        replacement.input.set(torch.randn(D_IN), torch.rand(D_IN) * 10 + 0.1)
        replacement.output.set(torch.randn(D_OUT), torch.rand(D_OUT) * 10 + 0.1)
        x = torch.randn(7, D_IN, dtype=torch.float64) * replacement.input.std + replacement.input.mean
        folded = replacement.folded()
        torch.testing.assert_close(folded.encode(x), replacement.encode(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(folded(x), replacement(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(replacement.decode(replacement.encode(x), x), replacement(x))


def test_a_dimension_without_variance_stays_finite():
    replacement = Replacement(molt()).double()
    std = torch.ones(D_IN)
    std[3] = 0.0
    replacement.input.set(torch.full((D_IN,), 2.0), std)
    assert replacement.input(torch.full((1, D_IN), 2.0, dtype=torch.float64)).tolist() == [[0.0] * D_IN]
    assert replacement(torch.randn(4, D_IN, dtype=torch.float64)).isfinite().all()
    with pytest.raises(ValueError, match="finite"):
        replacement.input.set(torch.full((D_IN,), torch.inf), std)


# ---- How they start ----


def test_all_transforms_start_with_equal_norms():
    torch.manual_seed(0)
    made = Molt(640, 640)
    assert made.norms().detach().tolist() == pytest.approx([1.0] * 31, rel=0.05)


@pytest.mark.parametrize("gate", ["relu", "jumprelu", "topk:4", "batchtopk:4"])
@pytest.mark.parametrize("kind", ["molt", "molt-skip", "transcoder", "skip-transcoder", "mxd"])
def test_calibration_sets_the_variance_written_and_the_open_rate(kind, gate):
    torch.manual_seed(0)
    made = matched_map(kind, 64, 48, n=1, gate=gate)
    x = torch.randn(2000, 64)
    made.calibrate(x, open_rate=0.2, variance=0.01)
    assert made(x).var(0).mean().item() == pytest.approx(0.01, rel=1e-3)
    open_rate = (made.encode(x) != 0).float().mean(0)
    if gate == "relu":
        assert open_rate.tolist() == pytest.approx([0.2] * made.n_units, abs=1e-3)

"""What a transform's page says, against the matrix itself and against brute force on the text."""

import math

import pytest
import torch

from analysis.dashboards.details import look_at
from analysis.dashboards.replacement import ReplacementSource
from analysis.dashboards.sources import Text
from analysis.dashboards.survey import survey
from analysis.dashboards.transform_page import PLACES, SERVED, TransformExtras, oriented, transform_svd
from analysis.unit_worth import transform_worth
from molt_lens import Molt, Replacement, Transcoder
from molt_lens.hosts import Site
from molt_lens.packing import keep_mask
from tests.molt_lens.host_models import tiny_host

D, N_CTX = 32, 24


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_singular_values_are_those_of_the_product(rank):
    torch.manual_seed(rank)
    U, V = torch.randn(rank, 40), torch.randn(rank, D)
    svd = transform_svd(U, V)
    product = (U.T @ V).double()
    torch.testing.assert_close(svd.singular, torch.linalg.svdvals(product)[:rank], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(svd.left * svd.singular @ svd.right.T, product, rtol=1e-5, atol=1e-5)
    for vectors in (svd.left, svd.right):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64))
    assert svd.frobenius == pytest.approx(product.norm().item(), rel=1e-5)
    largest = torch.linalg.matrix_norm(product, 2).item()
    assert svd.stable_rank == pytest.approx((product.norm().item() / largest) ** 2, rel=1e-5)


def test_a_transform_of_rank_0_in_effect_has_stable_rank_0():
    assert transform_svd(torch.zeros(3, D), torch.randn(3, D)).stable_rank == 0


def test_signs_turn_right_vectors_towards_what_is_read_and_keep_the_matrix():
    svd = transform_svd(torch.randn(4, D), torch.randn(4, D))
    towards = torch.randn(D)
    left, right = oriented(svd, towards)
    assert (towards.double() @ right >= 0).all()
    torch.testing.assert_close(left * svd.singular @ right.T, svd.left * svd.singular @ svd.right.T)


@pytest.fixture(scope="module", params=[("gemma3", "post_norm_out"), ("gpt2", "mlp_out")], ids=["gemma3", "gpt2"])
def source(request) -> ReplacementSource:
    family, target = request.param
    host = tiny_host(family)
    torch.manual_seed(0)
    replacement = Replacement(Molt(D, D, gate="topk:2", ladder=((8, 1), (4, 3))))
    for standardizer in (replacement.input, replacement.output):
        standardizer.set(torch.randn(D), torch.rand(D) + 0.5)
    return ReplacementSource(host, Site(1, target=target), replacement.eval(), "molt")


@pytest.fixture(scope="module")
def text(source) -> Text:
    windows = torch.randint(0, 256, (6, N_CTX), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(6)[:, None].expand(6, N_CTX).contiguous()
    return Text(windows, documents, keep_mask(source.host, windows))


@pytest.fixture(scope="module")
def details(source, text):
    surveys = survey(source, text)
    units = surveys[0].counter.opened.nonzero().flatten().tolist()
    return look_at(source, text, surveys, [units])[0]


@pytest.fixture(scope="module")
def pages(source, text, details):
    return TransformExtras(source, text)(0, details, lambda token: token)


@torch.no_grad()
def test_the_matrix_is_given_in_both_coordinates(source, details, pages):
    for own, page in zip(details, pages, strict=True):
        rows = slice(sum(source.replacement.map.ranks[: own.unit]), sum(source.replacement.map.ranks[: own.unit + 1]))
        for name, map in (("raw", source.folded), ("standardised", source.replacement.map)):
            expected = torch.linalg.svdvals(map.U[rows].T @ map.V[rows])[: page["rank"]]
            torch.testing.assert_close(torch.tensor(page["singular"][name]), expected, rtol=1e-4, atol=1e-5)
        assert page["frobenius"] == pytest.approx(source.replacement.map.norms()[own.unit].item(), rel=1e-4)


@torch.no_grad()
def test_pairs_are_read_through_gains_embedding_and_unembedding(source, text, details, pages):
    model, norm = source.host.model, source.readout.module
    shift = 1 if "Gemma" in type(norm).__name__ else 0
    pre = source.host.modules(source.site).input_module.weight + shift
    final = norm.weight + shift
    W_E, W_U = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    svd = transform_svd(*TransformExtras(source, text).raw[details[0].unit])
    pairs = pages[0]["pairs"]
    assert [pair["gain"] for pair in pairs] == pytest.approx(svd.singular[: len(pairs)].tolist())
    for i, pair in enumerate(pairs):
        left, right = svd.left[:, i].float(), svd.right[:, i].float()
        if not shift:  # a LayerNorm centres what passes it
            left, reads = left - left.mean(), pre * right - (pre * right).mean()
        else:
            reads = pre * right
        ends = {"reads": W_E @ reads, "writes": W_U @ (final * left)}
        for name, scores in ends.items():
            best = {frozenset((s * scores).topk(8).indices.tolist()) for s in (1, -1)}
            assert {frozenset(pair[name]), frozenset(pair[f"{name}_against"])} == best


@torch.no_grad()
def test_worth_and_share_are_those_of_the_text(source, text, details, pages):
    x, y = source.host.capture(source.site, text.windows)
    x, y = x[text.counted], y[text.counted]
    worth = transform_worth(source.replacement, x, y)
    acts = source.replacement.encode(x)
    base = source.replacement.decode(torch.zeros_like(acts), x)
    std = source.replacement.output.std
    total = ((source.replacement.decode(acts, x) - base) / std).square().sum().item()
    for own, page in zip(details, pages, strict=True):
        expected = worth.transforms[own.unit]
        assert page["nmse_without"] == pytest.approx(expected.nmse_without, rel=1e-5)
        assert page["nmse_always"] == pytest.approx(expected.nmse_always, rel=1e-5)
        only = torch.zeros_like(acts)
        only[:, own.unit] = acts[:, own.unit]
        written = ((source.replacement.decode(only, x) - base) / std).square().sum().item()
        assert page["share_written"] == pytest.approx(written / total, rel=1e-3)


@torch.no_grad()
def test_tokens_served_are_those_at_which_it_is_open(source, text, details, pages):
    x, _ = source.host.capture(source.site, text.windows)
    tokens, is_open = text.windows[text.counted], source.replacement.encode(x[text.counted]) != 0
    for own, page in zip(details, pages, strict=True):
        at = is_open[:, own.unit]
        assert page["measured_on"] == len(tokens)
        assert 0 < len(page["serves"]) <= SERVED
        worths = []
        for token, times, share, rate in page["serves"]:
            of_token = tokens == token
            assert times == (at & of_token).sum() > 0
            assert share == pytest.approx(times / at.sum().item())
            assert rate == pytest.approx(times / of_token.sum().item())
            worths.append(share * math.log(rate / at.double().mean().item()))
        assert worths == pytest.approx(sorted(worths, reverse=True))


@torch.no_grad()
def test_what_is_added_where_the_transform_is_strongest(source, text, details, pages):
    x, _ = source.host.capture(source.site, text.windows)
    for own, page in zip(details, pages, strict=True):
        strongest = [context for context in own.contexts if context.which == "strongest"]
        assert [place["context"] for place in page["at"]] == list(range(min(PLACES, len(strongest))))
        for place, context in zip(page["at"], strongest, strict=False):
            acts = source.replacement.encode(x[context.window]) * text.counted[context.window][:, None]
            pos = int(acts[:, own.unit].abs().argmax())
            assert acts[pos, own.unit].item() == pytest.approx(context.acts[context.peak], rel=1e-5)
            only = torch.zeros_like(acts[pos])
            bare = source.replacement.decode(only, x[context.window, pos])
            whole = source.replacement.decode(acts[pos], x[context.window, pos]) - bare
            only[own.unit] = acts[pos, own.unit]
            added = source.replacement.decode(only, x[context.window, pos]) - bare
            assert place["added_norm"] == pytest.approx(added.norm().item(), rel=1e-3)
            assert place["share_of_written"] == pytest.approx((added.norm() / whole.norm()).item(), rel=1e-3)
            moved = [value for _, value in place["promoted"]]
            assert moved == sorted(moved, reverse=True)
            assert moved[0] > 0 > place["suppressed"][0][1]


def test_only_a_molt_has_transforms(text):
    host = tiny_host("llama")
    source = ReplacementSource(host, Site(0), Replacement(Transcoder(D, D, n_features=4, gate="relu")), "tc")
    with pytest.raises(ValueError, match="tc is a transcoder: only a MOLT has transforms"):
        TransformExtras(source, text)

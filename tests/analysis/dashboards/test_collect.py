"""Both passes over a text against its dense acts, by brute force; the batch size does not matter."""

import math
from collections import Counter

import pytest
import torch

from analysis.dashboards.cayley import CayleySource
from analysis.dashboards.details import BINS, POSITION_BINS, look_at
from analysis.dashboards.sources import Text
from analysis.dashboards.survey import SAMPLED, STRONGEST, survey
from cayley_interp import CayleyGPT, CayleyGPTConfig

N_CTX, N_WINDOWS, D_VOCAB = 16, 40, 50


@pytest.fixture(scope="module", params=[False, True], ids=["unsigned", "signed"])
def model(request) -> CayleyGPT:
    torch.manual_seed(0)
    config = CayleyGPTConfig(
        n_layers=2, n_heads=2, d_model=16, n_ctx=N_CTX, d_vocab=D_VOCAB, levels="4,3,0;6,4,4", signed=request.param
    )
    model = CayleyGPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def text() -> Text:
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(D_VOCAB, (N_WINDOWS, N_CTX), generator=generator)
    documents = (torch.rand(N_WINDOWS * N_CTX, generator=generator) < 0.02).cumsum(0).view(N_WINDOWS, N_CTX)
    counted = torch.rand(N_WINDOWS, N_CTX, generator=generator) < 0.9
    return Text(windows, documents, counted)


@torch.no_grad()
def dense(model: CayleyGPT, text: Text) -> list[torch.Tensor]:
    """Acts [token, unit] of each group, 0 where a token does not count."""
    acts = []
    for sae, codes in zip(model.bottlenecks(), model.codes(text.windows), strict=True):
        acts += [a * text.counted[..., None] for a in sae.to_dense(codes)]
    return [a.flatten(0, 1) for a in acts]


def test_every_unit_is_counted_and_its_strongest_events_kept(model, text):
    surveys = survey(CayleySource(model, "tiny", batch_size=7), text)
    for own, acts in zip(surveys, dense(model, text), strict=True):
        assert own.counter.tokens == text.tokens
        assert torch.equal(own.counter.opened, (acts != 0).sum(0))
        entropies = own.entropies(text)
        for unit in range(acts.shape[1]):
            by_window = acts[:, unit].abs().view(N_WINDOWS, N_CTX).amax(1)
            strongest = by_window[by_window > 0].sort(descending=True).values[:STRONGEST]
            kept = own.strongest.score[unit]
            torch.testing.assert_close(kept[kept > -torch.inf].float(), strongest)
            opened = set(acts[:, unit].nonzero().flatten().tolist())
            sample = [t for t in own.sample.token[unit].tolist() if t >= 0]
            assert len(sample) == len(set(sample)) == min(len(opened), SAMPLED)
            assert set(sample) <= opened
            if opened:
                counts = Counter(text.windows.flatten()[sample].tolist()).values()
                expected = -sum(c / len(sample) * math.log2(c / len(sample)) for c in counts)
                assert entropies[unit] == pytest.approx(expected, abs=1e-5)
            else:
                assert entropies[unit].isnan()


@torch.no_grad()
def test_the_nmse_of_a_level_is_of_what_it_and_those_above_hand_to_the_mlp(model, text):
    source = CayleySource(model, "tiny", batch_size=7)
    surveys = survey(source, text)
    for i, (group, own) in enumerate(zip(source.groups, surveys, strict=True)):
        read: list[torch.Tensor] = []
        norm = model.blocks()[group.layer].norm2
        handle = norm.register_forward_hook(lambda *of_call, read=read: read.append(of_call[-1]))
        codes = model.codes(text.windows)[group.layer]
        handle.remove()
        x = read[0][text.counted].double()
        sparse = model.bottlenecks()[group.layer]
        h = sum(sparse.dictionary.combine(sparse.to_dense(codes)[j]) for j in range(group.level + 1))
        h = h[text.counted].double()
        x, h, weight = x - x.mean(0), h - h.mean(0), 1 / x.var(0, correction=0)
        scale = (x * h * weight).sum() / (h.square() * weight).sum()
        nmse = ((scale * h - x).square() * weight).mean()
        assert own.nmse == pytest.approx(nmse.item(), rel=1e-4), i


def chosen_of(surveys) -> list[list[int]]:
    return [own.counter.opened.nonzero().flatten()[::3].tolist() for own in surveys]


def test_details_are_what_the_dense_acts_say(model, text):
    source = CayleySource(model, "tiny", batch_size=7)
    surveys = survey(source, text)
    all_details = look_at(source, text, surveys, chosen_of(surveys))
    for details, own, acts in zip(all_details, surveys, dense(model, text), strict=True):
        for found in details:
            act = acts[:, found.unit]
            largest = act.abs().max()
            assert found.has_negative == bool((act < 0).any())
            lowest = -largest if found.has_negative else 0
            histogram = torch.histc(act[act != 0], BINS, float(lowest), float(largest))
            assert sum(found.histogram) == int((act != 0).sum())
            assert (torch.tensor(found.histogram) - histogram).abs().sum() <= 2  # at an edge by rounding
            by_position = (act != 0).view(N_WINDOWS, POSITION_BINS, -1).sum((0, 2)) / text.counted.view(
                N_WINDOWS, POSITION_BINS, -1
            ).sum((0, 2))
            assert found.by_position == pytest.approx(by_position.tolist())
            documents = Counter(text.documents.flatten()[act != 0].tolist())
            assert found.documents == len(documents)
            assert found.busiest == min(documents.items(), key=lambda item: (-item[1], item[0]))
            for context in found.contexts:
                tokens = text.windows[context.window].tolist()
                start = next(
                    s
                    for s in range(N_CTX)
                    if tokens[s : s + len(context.tokens)] == context.tokens
                    and act.view(N_WINDOWS, N_CTX)[context.window, s : s + len(context.tokens)].tolist()
                    == pytest.approx(context.acts)
                )
                assert context.acts[context.peak] != 0
                assert context.document == text.documents[context.window, start + context.peak]
            sample = [t for t in own.sample.token[found.unit].tolist() if t >= 0]
            for unit, share, lift in found.co_firing:
                together = sum(bool(acts[t, unit] != 0) for t in sample) / len(sample)
                assert share == pytest.approx(together)
                assert lift == pytest.approx(share / (acts[:, unit] != 0).sum().item() * text.tokens)
            assert found.unit not in [unit for unit, *_ in found.co_firing]


def test_which_contexts_there_are(model, text):
    source = CayleySource(model, "tiny")
    surveys = survey(source, text)
    for found in look_at(source, text, surveys, chosen_of(surveys))[1]:
        peaks = {w: [abs(c.acts[c.peak]) for c in found.contexts if c.which == w] for w in ("strongest", "middle")}
        assert peaks["strongest"] == sorted(peaks["strongest"], reverse=True)
        assert len({c.window for c in found.contexts if c.which == "strongest"}) == len(peaks["strongest"])
        assert max(peaks["middle"]) <= peaks["strongest"][0]


@torch.no_grad()
def test_what_a_feature_writes_is_its_own_path_through_the_mlp(model, text):
    """With the last block's MLP the direct path is the whole: closing the feature there moves the logits by as much."""
    source = CayleySource(model, "tiny")
    run = source.run(text.windows[:3], text.counted[:3])
    codes = model.codes(text.windows[:3])[1][1]
    window, pos, place = (codes.values != 0).nonzero()[::5].T
    unit = codes.indices[window, pos, place]
    written = run.writes(3, window, pos, unit)
    block = model.blocks()[1]
    gain = model.norm_f.weight
    residual = model.residual(text.windows[:3])
    for i in range(len(unit)):
        edited = [list(level) for level in model.codes(text.windows[:3])[1]]
        edited[1][1] = torch.where(codes.indices == unit[i], 0, codes.values)
        h = block.sparse.decode(tuple(type(codes)(*level) for level in edited))
        whole = block.sparse.decode(model.codes(text.windows[:3])[1])
        change = (block.mlp(whole) - block.mlp(h))[window[i], pos[i]]
        rms = (residual[window[i], pos[i]].square().mean() + model.norm_f.eps).sqrt()
        torch.testing.assert_close(written[i], change * gain / rms, rtol=1e-4, atol=1e-5)
    logits = source.logits(written)
    torch.testing.assert_close(logits.mean(-1), torch.zeros(len(unit)), atol=1e-5, rtol=0)


def test_the_batch_size_does_not_matter(model, text):
    sources = [CayleySource(model, "tiny", batch_size=size) for size in (3, 40)]
    surveys = [survey(source, text) for source in sources]
    for a, b in zip(*surveys, strict=True):
        assert torch.equal(a.sample.token, b.sample.token)
        torch.testing.assert_close(a.strongest.score, b.strongest.score)
    chosen = chosen_of(surveys[0])
    looks = [look_at(source, text, own, chosen) for source, own in zip(sources, surveys, strict=True)]
    for a, b in zip(looks[0][1], looks[1][1], strict=True):
        assert (a.histogram, a.documents, a.busiest, a.co_firing) == (b.histogram, b.documents, b.busiest, b.co_firing)
        torch.testing.assert_close(a.written, b.written)


def test_a_dead_unit_and_a_vanilla_model_are_refused(model, text):
    source = CayleySource(model, "tiny")
    surveys = survey(source, text)
    surveys[0].counter.opened[5] = 0
    with pytest.raises(ValueError, match=r"unit 5 of L0\.0 of tiny never opens on this text"):
        look_at(source, text, surveys, [[5], [], [], []])
    vanilla = CayleyGPT(CayleyGPTConfig(n_layers=1, n_heads=2, d_model=16, n_ctx=N_CTX, d_vocab=D_VOCAB))
    with pytest.raises(ValueError, match="a vanilla model has no features"):
        CayleySource(vanilla, "plain")

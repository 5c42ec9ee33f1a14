"""Pooled activations and codes against one text at a time, and what the random control shares with the original."""

from typing import Any

import numpy as np
import pytest
import torch

from analysis.pooled import bottleneck_of, pooled_activations, random_control, sources_of
from cayley_interp import CayleyGPT, CayleyGPTConfig
from molt_lens.hosts import Host, Site, load_host
from tests.analysis.fabricated import make_tokenizer
from tests.molt_lens.host_models import BOS_ID, tiny_host

TEXTS = ["we the people", "of", "the states", "in order to form a more perfect union and beyond the context's end"]


@pytest.fixture(scope="module")
def cayley() -> Host:
    torch.manual_seed(0)
    model = CayleyGPT(CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=32, d_vocab=280, levels="4,3,0;6,4,4"))
    model.tokenizer = make_tokenizer()
    return load_host(model)


@pytest.mark.parametrize("source", ["mlp_in", "resid"])
def test_dense_activations_are_those_of_each_text_alone(source):
    host = tiny_host()
    site = Site(1, input="pre_norm_in" if source == "resid" else "pre_norm_out")
    got = pooled_activations(host, TEXTS, 1, source)
    for i, text in enumerate(TEXTS):
        x = host.capture(site, torch.tensor([[BOS_ID, *host.tokenize(text)]]))[0][0, 1:]
        np.testing.assert_allclose(got["mean"][i], x.mean(0), atol=1e-4)
        np.testing.assert_allclose(got["max"][i], x.amax(0), atol=1e-4)


def test_codes_are_those_of_the_model(cayley):
    got = pooled_activations(cayley, TEXTS, 1, "codes")
    model: Any = cayley.model
    sae = bottleneck_of(cayley, 1)
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([cayley.tokenize(text)[:32]])
        codes = torch.cat(sae.to_dense(model.codes(ids)[1]), -1)[0, 1:]
        np.testing.assert_allclose(got["mean"][i], codes.mean(0), atol=1e-4)
        np.testing.assert_allclose(got["max"][i], codes.amax(0), atol=1e-4)


def test_the_random_control_has_the_same_shape_and_its_own_statistics(cayley):
    codes, control = (pooled_activations(cayley, TEXTS, 1, source)["mean"] for source in ("codes", "random_codes"))
    assert codes.shape == control.shape == (len(TEXTS), 16 + 64)
    assert not np.allclose(codes, control)
    sae = bottleneck_of(cayley, 1)
    x = torch.randn(1, 500, 16) * 3 + 1
    made = random_control(sae, iter([(x, torch.ones(1, 500, dtype=torch.bool))]))
    scores = made.dictionary.scores(x[0])
    torch.testing.assert_close(made.mean[16:], scores.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.std[16:], scores.std(0, correction=0), atol=1e-4, rtol=1e-4)
    assert sae.config.dictionary == "gold"


def test_bad_input(cayley):
    assert sources_of(tiny_host()) == ["mlp_in", "resid"]
    assert sources_of(cayley) == ["codes", "random_codes", "mlp_in", "resid"]
    with pytest.raises(ValueError, match="Gemma3ForCausalLM has layers 0 to 2, got layer 9"):
        pooled_activations(tiny_host(), TEXTS, 9, "resid")
    with pytest.raises(ValueError, match="0 texts to pool resid of layer 1 of Gemma3ForCausalLM"):
        pooled_activations(tiny_host(), [], 1, "resid")
    with pytest.raises(ValueError, match="Gemma3ForCausalLM has no CayleySAE"):
        pooled_activations(tiny_host(), TEXTS, 1, "codes")
    with pytest.raises(ValueError, match="no token after its first"):
        pooled_activations(cayley, ["a"], 1, "codes")

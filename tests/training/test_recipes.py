"""Recipes are the published hyper-parameters: each figure here is on a model card or in docs/design.md's table."""

import json
from dataclasses import FrozenInstanceError, asdict

import pytest

from training.optim import warmdown_start
from training.recipes import RECIPES, config_from_dict

SMALL, LARGE = (12, 8, 1024), (24, 16, 2048)
TOKENS = 1_572_864  # an iteration of the 20B campaign
# name: (shape, levels, steps, tokens a step, sequences a micro-batch, muon, adamw, warm-up, warm-down start)
PUBLISHED = {
    "cayley-small-2L-mlp_in-20B": (SMALL, "10,16,0;15,32,256", 12716, 32, (1.2e-2, 1.5e-4), (1.2e-2, 1.5e-4), 1271),
    "cayley-small-3L-mlp_in-20B": (
        SMALL,
        "10,16,0;15,32,256;17,64,256",
        12716,
        32,
        (1.2e-2, 1.5e-4),
        (1.2e-2, 1.5e-4),
        1271,
    ),
    "cayley-32k-2L-mlp_in": (SMALL, "10,16,0;15,32,256", 6358, 24, (1e-3, 5e-5), (1e-3, 5e-5), 1907),
    "cayley-large-2L-mlp_in-20B": (LARGE, "11,16,0;15,32,256", 12716, 32, (8e-3, 1e-4), (3e-4, 1e-5), 6358),
    "cayley-large-3L-mlp_in-20B": (LARGE, "11,16,0;15,32,256;17,64,256", 12716, 32, (8e-3, 1e-4), (3e-4, 1e-5), 6358),
    "vanilla-small-20B": (SMALL, None, 12716, 32, (1.2e-2, 1.5e-4), (1.2e-2, 1.5e-4), 1271),
    "vanilla-large-20B": (LARGE, None, 12716, 32, (8e-3, 1e-4), (3e-4, 1e-5), 6358),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    shape, levels, steps, micro_batch, muon, adamw, start = PUBLISHED[name]
    _, run = RECIPES[name]
    model, optim = run.model, run.optim
    assert (model.n_layers, model.n_heads, model.d_model) == shape
    assert (model.levels, model.n_ctx, model.d_vocab) == (levels, 1024, 50304)
    assert (run.max_steps, run.batch_size, run.tokens_per_step) == (steps, micro_batch, TOKENS)
    assert (optim.muon_lr, optim.muon_min_lr) == muon
    assert (optim.adamw_lr, optim.adamw_min_lr) == adamw
    assert optim.warmup == 200
    assert warmdown_start(run.max_steps, optim.warmdown_frac) == start
    assert (run.data.data, run.data.tokenizer) == ("hf:HuggingFaceFW/fineweb-edu:sample-100BT", "gpt2")
    assert (model.routing, model.score_standardize, model.signed) == ("per_parent", "feature", False)
    assert model.forward_standardized == (name != "cayley-32k-2L-mlp_in")  # that run predates the zombie fix


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith("20B")])
def test_the_campaign_is_twenty_billion_tokens(name):
    run = RECIPES[name][1]
    assert run.max_steps * run.tokens_per_step == pytest.approx(20.0e9, rel=1e-3)


def test_the_earlier_run_is_ten_billion_tokens():
    run = RECIPES["cayley-32k-2L-mlp_in"][1]
    assert run.max_steps * run.tokens_per_step == pytest.approx(10.0e9, rel=1e-3)


def test_tiny_and_its_controls_differ_in_one_thing_each():
    tiny, vanilla, control = (asdict(RECIPES[name][1]) for name in ("tiny", "tiny-vanilla", "tiny-random"))
    assert {k for k in tiny["model"] if tiny["model"][k] != vanilla["model"][k]} == {"levels"}
    assert {k for k in tiny["model"] if tiny["model"][k] != control["model"][k]} == {"dictionary"}
    for other in (vanilla, control):
        assert {k for k in tiny if tiny[k] != other[k]} == {"name", "model"}


@pytest.mark.parametrize("name", RECIPES)
def test_configs_are_complete_frozen_and_survive_json(name):
    line, run = RECIPES[name]
    assert run.name == name
    assert line
    assert "\n" not in line
    with pytest.raises(FrozenInstanceError):
        run.seed = 1
    assert config_from_dict(json.loads(json.dumps(asdict(run), default=str))) == run

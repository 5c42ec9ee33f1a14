"""The models that come with the package: small, at equal loss, made by committed recipes, and alive in every block."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from cayley_interp import bundled_models, load_pretrained
from cayley_interp.pretrained import BUNDLED
from training.recipes import RECIPES, config_from_dict

PAIR = ["cayley-tiny-2L-sotu", "vanilla-tiny-sotu"]
LOGS = Path(__file__).parents[2] / "docs" / "results"


def test_the_pair_is_there():
    assert bundled_models() == PAIR


@pytest.mark.parametrize("name", PAIR)
def test_it_is_small_and_its_log_is_committed(name):
    assert sum(file.stat().st_size for file in (BUNDLED / name).iterdir()) < 8_000_000
    training = json.loads((BUNDLED / name / "training.json").read_text())
    records = [json.loads(line) for line in (BUNDLED / name / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == training["steps"]
    assert records[-1]["final"]["val_loss"] == training["val_loss"]
    ran = config_from_dict(json.loads((LOGS / name / "config.json").read_text()))
    assert asdict(replace(ran, out=None)) == asdict(RECIPES[name][1])
    assert asdict(load_pretrained(name, wrap=None).config) == asdict(ran.model)


def test_they_are_at_equal_validation_loss():
    cayley, vanilla = (json.loads((BUNDLED / name / "training.json").read_text()) for name in PAIR)
    assert cayley["val_tokens"] == vanilla["val_tokens"]
    assert abs(cayley["val_loss"] - vanilla["val_loss"]) < 0.02
    assert cayley["val_loss"] < cayley["bigram_loss"] - 0.2
    assert vanilla["tokens"] < cayley["tokens"]


@pytest.mark.parametrize("name", PAIR)
def test_every_mlp_and_every_attention_earns_its_place(name):
    # A model can have a good loss, the right L0 and no dead feature while most of its MLPs write nothing.
    model = load_pretrained(name, wrap=None)
    ids = torch.tensor(model.tokenizer.encode((BUNDLED / "speech.txt").read_text()).ids)
    windows = ids[: 8 * (model.config.n_ctx + 1)].view(8, -1)
    with torch.no_grad():
        loss = model.loss(windows).mean()
        for block in model.blocks():
            for part in (block.mlp, block.attn):
                handle = part.register_forward_hook(lambda _module, _inputs, out: torch.zeros_like(out))
                assert model.loss(windows).mean() > loss + 0.002
                handle.remove()

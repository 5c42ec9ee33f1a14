"""Checkpoints of our own, written as strangers might, are read back exactly; what cannot be told apart is refused."""

import io
import json
import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from cayley_interp.bottleneck import parse_levels
from cayley_interp.conventions import (
    CHOICES,
    Bottlenecks,
    Reading,
    check_understood,
    file_order,
    identify,
    install,
    possible_readings,
)
from cayley_interp.foreign import load_foreign
from cayley_interp.foreign_tensors import match_roles, read_backbone
from cayley_interp.losses import window_losses
from tests.cayley_interp.foreign_writer import (
    LEVELS,
    OBSCURE,
    PLAIN,
    corpus,
    corpus_tokens,
    model_config,
    state_dict,
    theirs_in_order,
    trained,
    untrained,
    write_checkpoint,
)

SECONDS = 120
FLAGS = {
    "cayley_per_parent_budget": lambda options: options["routing"] == "per_parent",
    "cayley_score_standardize": lambda options: options["score_standardize"] != "none",
    "cayley_forward_standardized": lambda options: options["forward_standardized"],
}


def silent() -> Console:
    return Console(quiet=True)


def draw(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random options of a model and ways to write it."""
    rng = random.Random(seed)
    options = {name: rng.choice(values) for name, values in CHOICES.items()}
    as_variance = rng.random() < 0.5
    plain = PLAIN | ({"std": "sae.running_var"} if as_variance else {})
    writing = {"bit_order": options.pop("bit_order"), "names": rng.choice([plain, OBSCURE])}
    return options, writing | {"as_variance": as_variance, "per_level": rng.random() < 0.5}


def assert_identified(tmp_path, seed: int, steps: int, documented: list[str]) -> None:
    options, writing = draw(seed)
    model = trained(seed=seed, steps=steps, **options)
    flags = {name: FLAGS[name](options) for name in documented}
    path = write_checkpoint(tmp_path, state_dict(model, **writing), model_config(model, **flags))
    start = time.process_time()
    loaded = load_foreign(path, text=corpus(), console=silent())
    assert time.process_time() - start < SECONDS
    ids = corpus_tokens()[-640:].view(10, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=1e-4)
    record = json.loads((tmp_path / "conventions.json").read_text())
    assert record["tokens"] == 8192


@pytest.mark.parametrize("seed", [0, 1])
def test_a_checkpoint_with_the_flags_of_the_cards_is_identified(tmp_path, seed):
    assert_identified(tmp_path, seed, steps=120, documented=list(FLAGS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 10))
def test_a_checkpoint_that_documents_only_whether_scores_are_standardised_is_identified(tmp_path, seed):
    # The cards say it. Without it one pair is too close for a margin: signed raw scores picked by |s - x_0 / sqrt(d)|,
    # standardised over the token, or by |s|, not at all.
    assert_identified(tmp_path, seed, steps=500, documented=["cayley_score_standardize"])


@pytest.mark.parametrize("bit_order", CHOICES["bit_order"])
def test_file_order_undoes_what_a_writer_did_one_feature_at_a_time(bit_order):
    levels = parse_levels("4,2,0;6,2,4;9,2,4")
    ours = torch.arange(16 + 64 + 512).float()
    theirs = torch.cat(theirs_in_order(ours, levels, bit_order))
    assert torch.equal(theirs[file_order(levels, bit_order)], ours)
    assert torch.equal(theirs, ours) == (bit_order == "parent_low")


def read(model, **writing) -> Bottlenecks:
    backbone = read_backbone(state_dict(model, **writing))
    families, _ = match_roles(backbone.rest, parse_levels(LEVELS))
    return Bottlenecks(LEVELS, CHOICES, families)


def default_reading(**changes) -> Reading:
    values = {name: values[0] for name, values in CHOICES.items()}
    return replace(Reading(roles=("bias", "mean", "std"), **values), **changes)


def windows() -> torch.Tensor:
    return corpus_tokens()[: 16 * 65].view(16, 65)


def test_every_combination_is_possible_until_levels_or_tensors_forbid_it():
    model = untrained()
    every = 2 * 3 * 2 * 3 * 2 * 2
    assert len(possible_readings(model.config, read(model))) == every
    bias_only = read(model, names={"bias": "sae.bias"})
    assert len(possible_readings(model.config, bias_only)) == every * 2 // 3  # nothing to standardise by feature with
    too_many_parents = read(model)._replace(levels="6,4,0;9,8,65")
    readings = possible_readings(model.config, too_many_parents)
    assert {reading.routing for reading in readings} == {"per_parent"}
    impossible = read(model)._replace(levels="5,4,0;9,8,16")
    with pytest.raises(ValueError, match=r"no reading can build levels.*its n must be log2\(d_model\)"):
        possible_readings(model.config, impossible)


def test_roles_that_names_leave_open_are_readings_of_their_own():
    model = untrained()
    for sae in model.bottlenecks():
        sae.bias.data.normal_()
        sae.mean.normal_()
        sae.std.uniform_(0.5, 2)
    readings = possible_readings(model.config, read(model, names=OBSCURE))
    by_feature = {reading.roles for reading in readings if reading.score_standardize == "feature"}
    assert by_feature == {(a, b, c) for a, b in (("bias", "mean"), ("mean", "bias")) for c in ("std", "var")}
    assert len({r.roles for r in readings if r.score_standardize == "token"}) == 2


def test_readings_that_make_one_function_count_as_one():
    # Zero biases and means, unit deviations: order of bits and standardisation by feature change nothing.
    model = untrained(signed=True)
    bottlenecks = read(model)
    narrow = {name: values[:1] for name, values in CHOICES.items()}
    narrow |= {name: CHOICES[name] for name in ("bit_order", "score_standardize")} | {"signed": (True,)}
    narrow["score_standardize"] = ("feature", "none")
    results = identify(model, bottlenecks._replace(choices=narrow), windows(), silent())
    assert len(results) == 1
    assert len(results[0].readings) == 6
    assert results[0].readings[0] == default_reading(signed=True)
    assert model.config.signed


def test_no_clear_margin_stops_the_load_and_names_both_readings():
    model = untrained()  # its MLPs write next to nothing yet, so every reading has nearly the same loss
    message = r"ambiguous on this text: \(dictionary .* is only .* ± .* above it, where .* is needed"
    choices = {name: values[:1] for name, values in CHOICES.items()} | {"dictionary": CHOICES["dictionary"]}
    with pytest.raises(ValueError, match=message):
        identify(model, read(model)._replace(choices=choices), windows(), silent())


def test_the_table_shows_the_published_loss_and_every_choice():
    model, printed = untrained(), io.StringIO()
    bottlenecks = read(model)._replace(choices={name: values[:1] for name, values in CHOICES.items()})
    identify(model, bottlenecks, windows(), Console(file=printed, width=250), published_loss=3.1671)
    shown = printed.getvalue()
    assert "published validation loss 3.1671" in shown
    assert all(name in shown for name in CHOICES)


def test_installing_a_variance_takes_its_root():
    model = untrained()
    for sae in model.bottlenecks():
        sae.std.uniform_(0.5, 2)
    bottlenecks = read(model, as_variance=True, names=PLAIN | {"std": "sae.running_var"})
    expected = [sae.std.clone() for sae in model.bottlenecks()]
    install(model, bottlenecks, default_reading(roles=("bias", "mean", "var")))
    for sae, std in zip(model.bottlenecks(), expected, strict=True):
        torch.testing.assert_close(sae.std, std)


def test_a_loss_above_token_frequencies_is_not_understood():
    model = untrained()
    with pytest.raises(ValueError, match=r"not understood: its loss of 5\.\d+ nats is no better than the 4\.\d+ of"):
        check_understood(model, window_losses(model, windows(), 16), windows())

"""The Greater-Than figure against probabilities multiplied out token by token, for every kind of tokenizer."""

import functools
import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from analysis.greater_than import DigitTokens, Prompt, greater_than, make_prompts, year_probabilities
from cayley_interp import CayleyGPT, CayleyGPTConfig
from molt_lens.hosts import Host, Site, load_host
from molt_lens.replacement import true_mlp
from tests.molt_lens.host_models import tiny_host

TEXT = "The war lasted from the year 1732 to the year 17"


def host_with_double_digits() -> Host:
    """Tokens for some two-digit numbers beside the single digits, as in a BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("3", "2"), ("3", "3"), ("9", "9"), ("1", "7")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in pairs), "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    model = CayleyGPT(CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=64, d_vocab=280, levels="4,3,0;6,4,4"))
    model.tokenizer = tokenizer
    return load_host(model, dtype=torch.float64)


@pytest.fixture(scope="module", params=["digits", "double digits"])
def host(request) -> Host:
    return tiny_host(dtype=torch.float64) if request.param == "digits" else host_with_double_digits()


def brute_force(host: Host, text: str) -> list[float]:
    """Every way to spell the two digits in tokens, one forward pass a token."""
    start = ([] if host.bos_id is None else [host.bos_id]) + host.tokenize(text)

    @functools.cache
    def after(before: tuple[int, ...]) -> torch.Tensor:
        return host.logits(torch.tensor([[*start, *before]]))[0, -1].double().softmax(-1)

    def probability(ids: tuple[int, ...]) -> float:
        return math.prod(after(ids[:i])[token].item() for i, token in enumerate(ids))

    years = [f"{year:02d}" for year in range(100)]
    return [
        sum(probability(ids) for ids in {tuple(host.tokenize(y)), (*host.tokenize(y[0]), *host.tokenize(y[1]))})
        for y in years
    ]


def test_probabilities_are_those_of_every_spelling(host):
    tokens = DigitTokens(host)
    assert sum(token is not None for token in tokens.double) in (0, 4)
    got = year_probabilities(host, TEXT, tokens, {})
    assert got.tolist() == pytest.approx(brute_force(host, TEXT), rel=1e-9)


def test_the_figure_is_later_minus_earlier(host):
    prompts = make_prompts(3, seed=1)
    by_hand = []
    for prompt in prompts:
        p = brute_force(host, prompt.text)
        by_hand.append(sum(p[prompt.year + 1 :]) - sum(p[: prompt.year + 1]))
    got = greater_than(host, prompts=prompts)
    assert got.difference == pytest.approx(sum(by_hand) / 3, rel=1e-8)
    assert got.standard_error == pytest.approx(torch.tensor(by_hand).std().item() / 3**0.5, rel=1e-5)
    assert got.n_prompts == 3


def test_a_host_that_gives_years_no_order_scores_what_the_years_left_over_say():
    """With all logits equal, years 33 to 99 have 67 shares and 00 to 32 have 33."""
    host = tiny_host(dtype=torch.float64)
    model: Any = host.model
    model.get_output_embeddings().weight.data.zero_()
    got = greater_than(host, prompts=[Prompt(TEXT, 32), Prompt(TEXT, 32)])
    assert got.difference == pytest.approx((67 - 33) / host.d_vocab**2)
    assert got.mass == pytest.approx(100 / host.d_vocab**2)
    assert got.standard_error == pytest.approx(0)


def test_replacements_take_part(host):
    mlp, prompts = true_mlp(host, Site(1)), make_prompts(2)
    own = greater_than(host, prompts=prompts)
    assert greater_than(host, {Site(1): mlp}, prompts) == own
    assert greater_than(host, {Site(1): lambda x: 0.2 * mlp(x)}, prompts).difference != own.difference


def test_prompts():
    prompts = make_prompts(200)
    assert prompts == make_prompts(200)
    assert len({prompt.text for prompt in prompts}) == 200
    assert all(f"{prompt.year:02d} to the year" in prompt.text and 2 <= prompt.year <= 98 for prompt in prompts)


def test_bad_input():
    with pytest.raises(ValueError, match="n must be from 2"):
        make_prompts(1)
    host = tiny_host()
    with pytest.raises(ValueError, match="two prompts or more"):
        greater_than(host, prompts=make_prompts(2)[:1])
    host.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        greater_than(host)


@pytest.mark.gemma
@pytest.mark.slow
def test_gemma_knows_that_wars_end_after_they_begin():
    host, prompts = load_host("gemma-3-270m"), make_prompts(8)
    own = greater_than(host, prompts=prompts)
    assert own.difference > 0.6
    assert own.mass > 0.95
    # Without the MLP of one layer in the middle it says less.
    assert greater_than(host, {Site(9): torch.zeros_like}, prompts).difference < own.difference

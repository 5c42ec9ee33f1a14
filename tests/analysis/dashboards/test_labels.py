"""Names by a provider: a real endpoint on this machine that answers by rule, and a real language model."""

import pytest
import torch

from analysis.dashboards.details import Context, Details
from analysis.dashboards.labels import Label, LocalModel, OpenAICompatible, label_unit, open_provider
from tests.analysis.dashboards.endpoint import serving

STRINGS = [" the", " whale", " swims", " ship", " sinks", " <|im_end|>", " 'quoted'", " sea"]


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a secret")
    with serving() as server:
        yield server, open_provider(f"openai:rules@http://127.0.0.1:{server.server_port}/v1")


def context(which: str, *tokens: int, open_at: int | None = None) -> Context:
    acts = [1.0 if i == open_at else 0.0 for i in range(len(tokens))]
    return Context(which, list(tokens), acts, open_at or 0, window=0, document=0)


CLOSED = [context("closed", 0, 3, 4), context("closed", 7, 4, 6), *[context("closed", 0, 3)] * 3]


def details(n_others: int = 3, n_closed: int = 5) -> Details:
    contexts = [context("strongest", 0, 1, 2, open_at=1), context("strongest", 7, 1, open_at=1)]
    contexts += [context("middle", 1, 4, 5, open_at=0), *[context("random", 6, 1, 2, open_at=1)] * n_others]
    return Details(3, contexts, CLOSED[:n_closed], [1], False, [0.1], 1, (0, 1), [], torch.zeros(4))


def test_a_name_that_tells_has_score_one(endpoint):
    server, provider = endpoint
    label = label_unit(provider, details(), STRINGS, frequency=0.05)
    assert label == Label("whale", 1.0, 8, provider.name)
    assert {headers["Authorization"] for headers in server.seen} == {"Bearer a secret"}
    assert "secret" not in provider.name


def test_a_name_that_fits_everything_or_nothing_has_the_score_of_chance(endpoint):
    server, provider = endpoint
    for answer in ("none", "1, 2, 3, 4, 5, 6, 7, 8"):
        server.answer = (200, answer)
        assert label_unit(provider, details(), STRINGS, frequency=0.05).score == 0.5


def test_what_cannot_be_scored_is_not_named(endpoint):
    server, provider = endpoint
    assert label_unit(provider, details(), STRINGS, frequency=0.3) is None
    assert label_unit(provider, details(0), STRINGS, frequency=0.05) is None
    assert label_unit(provider, details(n_closed=2), STRINGS, frequency=0.05) is None
    assert server.seen == []


def test_an_endpoint_that_fails_is_named(endpoint):
    server, provider = endpoint
    for answer, message in (
        ((500, ""), r"rules at http://127.0.0.1.* answers 500: 'broken'"),
        ((200, "  \n"), "has no name"),
        ((200, None), "its content is None and not text"),
    ):
        server.answer = answer
        with pytest.raises(ValueError, match=message):
            label_unit(provider, details(), STRINGS, frequency=0.05)
    nobody = OpenAICompatible("http://127.0.0.1:9/v1", "rules")
    with pytest.raises(ValueError, match="gives no completion"):
        nobody.complete("hello", 3)


def test_unknown_providers_are_refused():
    for name in ("gpt", "openai:model", "hf:", "openai:@http://x"):
        with pytest.raises(ValueError, match="expected openai:MODEL@URL"):
            open_provider(name)


@pytest.mark.gemma
def test_a_real_language_model_completes():
    assert LocalModel("gemma-3-270m").complete("1, 2, 3, 4, 5, 6,", 3).strip().startswith("7")

"""The model card: what is known is on it, what is not known is not, and no text escapes its cell."""

import re

import pytest
from huggingface_hub import ModelCard

from cayley_interp import CayleyGPTConfig
from cayley_interp.card import model_card

CONFIG = CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=12, d_vocab=50, levels="4,3,0;7,5,6")
LEVEL = {"layer": 0, "level": 1, "n_features": 2048, "l0": 15.98765, "dead": 1234, "zombie": 7, "dense": 0}
TRAINING = {
    "recipe": "tiny",
    "data": "sotu",
    "steps": 900,
    "tokens": 1_843_200,
    "val_loss": 4.38123,
    "val_tokens": 128_000,
    "bigram_loss": 4.5219,
    "levels": [LEVEL, LEVEL | {"layer": 1, "dead": 0}],
    "environment": {"torch": "2.13.0", "commit": "abc123", "processes": 2, "gpu": None},
}


def rows(card: str) -> list[list[str]]:
    """Cells of the card's table rows."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]


def test_the_hub_reads_the_front_matter():
    card = ModelCard(model_card(CONFIG, 1000, TRAINING))
    assert card.data.to_dict() == {
        "library_name": "cayley-interp",
        "pipeline_tag": "text-generation",
        "tags": ["cayley-sae", "interpretability", "sparse-autoencoder"],
    }
    assert card.text.strip().startswith("# tiny")


def test_what_is_known_is_on_it():
    table = rows(model_card(CONFIG, 1000, TRAINING))
    for row in (
        ["recipe", "tiny"],
        ["data", "sotu"],
        ["steps", "900"],
        ["tokens", "1,843,200"],
        ["validation loss (nats per token)", "4.3812"],
        ["validation tokens", "128,000"],
        ["bigram model on the same tokens", "4.5219"],
        ["layer", "level", "features", "L0", "dead", "zombie", "dense"],
        ["0", "1", "2,048", "15.988", "1,234", "7", "0"],
        ["1", "1", "2,048", "15.988", "0", "7", "0"],
        ["torch", "2.13.0"],
        ["commit", "abc123"],
        ["processes", "2"],
    ):
        assert row in table, row


def test_the_model_is_described():
    card = model_card(CONFIG, 123_456)
    assert "A GPT of 123,456 parameters: 2 blocks, d_model 16, 2 heads, context 12, vocabulary 50" in card
    assert "levels `4,3,0;7,5,6`: 8 of 16 + 128 features active at each token, over the `gold` dictionary" in card
    vanilla = model_card(CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16), 1000)
    assert "It has no bottleneck." in vanilla
    assert "CayleySAE" not in vanilla


@pytest.mark.parametrize("training", [None, {}, {"val_loss": None, "levels": [], "environment": {"gpu": None}}])
def test_what_is_not_known_is_not_on_it(training):
    card = model_card(CONFIG, 1000, training)
    assert "None" not in card
    assert re.findall(r"^#+ .*", card, re.MULTILINE) == ["# CayleyGPT"]
    assert rows(card) == []


def test_a_value_that_is_not_known_has_no_row():
    card = model_card(CONFIG, 1000, TRAINING | {"bigram_loss": None})
    assert "None" not in card
    assert not {"gpu", "bigram model on the same tokens"} & {row[0] for row in rows(card)}


@pytest.mark.parametrize(
    "hostile",
    [
        "a | b",
        "a \\| b",
        "<script>alert(1)</script>",
        "&lt;script&gt;",
        "two\n\n# lines\r\n---\n| x | y |",
        "![x](http://example.com/?leak) [y](javascript:z)",
        "`code` and ```fence",
    ],
)
@pytest.mark.parametrize("where", ["recipe", "value", "key", "level"])
def test_hostile_text_stays_in_its_place(hostile, where):
    changes = {
        "recipe": {"recipe": hostile},
        "value": {"data": hostile},
        "key": {"environment": {hostile: "x"}},
        "level": {"levels": [LEVEL | {"layer": hostile}]},
    }
    plain = {
        "recipe": {"recipe": "x"},
        "value": {"data": "x"},
        "key": {"environment": {"x": "x"}},
        "level": {"levels": [LEVEL | {"layer": "x"}]},
    }
    card = model_card(CONFIG, 1000, TRAINING | changes[where])
    expected = model_card(CONFIG, 1000, TRAINING | plain[where])
    assert [len(row) for row in rows(card)] == [len(row) for row in rows(expected)]
    assert card.count("\n") == expected.count("\n")
    for character in "<>[]\\":
        assert card.count(character) == expected.count(character), character
    assert card.count("`") == expected.count("`")
    assert ModelCard(card).data.to_dict() == ModelCard(expected).data.to_dict()

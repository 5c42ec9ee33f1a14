"""The card of a model: the README.md that a page on the Hub shows, made of what is known and nothing else."""

from collections.abc import Iterable
from typing import Any

from cayley_interp.bottleneck import parse_levels
from cayley_interp.model import CayleyGPTConfig

FRONT_MATTER = """---
library_name: cayley-interp
pipeline_tag: text-generation
tags:
- cayley-sae
- interpretability
- sparse-autoencoder
---
"""

# As entities: Markdown reads no structure from them, so that text can neither leave its cell nor become a link or HTML.
ENTITIES = {ord(c): f"&#{ord(c)};" for c in "&<>|[]`*\\"}

FEATURE_COLUMNS = {
    "layer": "layer",
    "level": "level",
    "features": "n_features",
    "L0": "l0",
    "dead": "dead",
    "zombie": "zombie",
    "dense": "dense",
}
"""Columns of the feature table, and their keys in a level's summary."""


def model_card(config: CayleyGPTConfig, n_parameters: int, training: dict[str, Any] | None = None) -> str:
    """Markdown with the Hub's front matter; `training` as in `save_pretrained`."""
    training = training or {}
    name = training.get("recipe") or ("CayleyGPT" if config.levels else "Vanilla GPT")
    parts = [
        FRONT_MATTER,
        f"# {_cell(name)}\n",
        f"{describe(config, n_parameters)}\n",
        "```python\nfrom cayley_interp import load_pretrained\n\nmodel = load_pretrained(FOLDER_OR_HUB_ID)"
        "  # a TransformerBridge\n```\n",
    ]
    if table := training_table(training):
        parts.append(f"## Training\n\n{table}\n")
    if training.get("levels"):
        parts.append(f"## Features\n\n{feature_table(training['levels'])}\n")
    if table := key_table((training.get("environment") or {}).items()):
        parts.append(f"## Environment\n\n{table}\n")
    return "\n".join(parts)


def describe(config: CayleyGPTConfig, n_parameters: int) -> str:
    """One paragraph: backbone, and bottleneck if there is one."""
    backbone = (
        f"A GPT of {n_parameters:,} parameters: {config.n_layers} blocks, d_model {config.d_model}, {config.n_heads} "
        f"heads, context {config.n_ctx}, vocabulary {config.d_vocab:,}; RMSNorm, learned positions, GELU, tied head."
    )
    if config.levels is None:
        return f"{backbone} It has no bottleneck."
    levels = parse_levels(config.levels)
    sizes = " + ".join(f"{1 << level.n:,}" for level in levels)
    return (
        f"{backbone} Every MLP reads its input through a CayleySAE, levels `{config.levels}`: "
        f"{sum(level.k for level in levels)} of {sizes} features active at each token, over the `{config.dictionary}` "
        f"dictionary; routing `{config.routing}`, scores standardised by `{config.score_standardize}`, "
        f"{'standardised scores' if config.forward_standardized else 'raw scores'} forward"
        f"{', signed' if config.signed else ''}."
    )


def training_table(training: dict[str, Any]) -> str:
    """Recipe, data, tokens and losses, whichever are known; empty if none is."""
    rows = {
        "recipe": "recipe",
        "data": "data",
        "steps": "steps",
        "tokens": "tokens",
        "validation loss (nats per token)": "val_loss",
        "validation tokens": "val_tokens",
        "bigram model on the same tokens": "bigram_loss",
    }
    return key_table((title, training.get(key)) for title, key in rows.items())


def feature_table(levels: list[dict[str, Any]]) -> str:
    """L0 and dead, zombie and dense features of each layer and level, over the validation tokens."""
    rows = ["| " + " | ".join(_cell(s.get(key)) for key in FEATURE_COLUMNS.values()) + " |" for s in levels]
    return "\n".join([f"| {' | '.join(FEATURE_COLUMNS)} |", "|" + " --- |" * len(FEATURE_COLUMNS), *rows])


def key_table(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of two columns, without the rows whose value is not known; empty if none is."""
    known = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *known]) if known else ""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split()).translate(ENTITIES)

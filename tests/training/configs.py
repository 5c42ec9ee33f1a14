"""Configs that the preflight is tried on."""

from dataclasses import replace
from typing import Any

from cayley_interp import CayleyGPTConfig
from training.recipes import RECIPES

TINY = replace(RECIPES["tiny"][1], device="cpu")
LEVELS = "6,8,0;9,16,32"


def gpt(**changes: Any) -> CayleyGPTConfig:
    """A small vanilla GPT, or what `changes` make of it."""
    return replace(CayleyGPTConfig(n_layers=2, n_heads=4, d_model=64, n_ctx=64, d_vocab=512), **changes)

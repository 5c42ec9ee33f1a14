"""Cayley-GPT: language models whose MLP inputs pass through a sparse bottleneck over an algebraic dictionary."""

from cayley_interp.bottleneck import CayleySAE, CayleySAEConfig, Level, LevelCodes, parse_levels
from cayley_interp.dictionary import CayleyDictionary
from cayley_interp.folder import save_pretrained
from cayley_interp.model import CayleyGPT, CayleyGPTConfig
from cayley_interp.pretrained import bundled_models, load_pretrained, push_to_hub
from cayley_interp.walsh import walsh_hadamard

__all__ = [
    "CayleyDictionary",
    "CayleyGPT",
    "CayleyGPTConfig",
    "CayleySAE",
    "CayleySAEConfig",
    "Level",
    "LevelCodes",
    "bundled_models",
    "load_pretrained",
    "parse_levels",
    "push_to_hub",
    "save_pretrained",
    "walsh_hadamard",
]

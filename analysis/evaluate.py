"""Everything measured on a finished model in one call: for the last line of metrics.jsonl and for the report."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from tokenizers import Tokenizer
from torch import Tensor

from analysis.dead_features import LevelSummary, summarise
from analysis.features import FeatureContexts, Progress, collect_features
from analysis.mlp_worth import mlp_worths
from analysis.ngram import NgramBaselines
from analysis.sparsity import FrequencyHistogram, frequency_histogram
from analysis.tokens import token_strings
from cayley_interp import CayleyGPT, CayleyGPTConfig
from cayley_interp.losses import PairedDifference, window_losses

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Sample:
    """Token ids that were given and token ids that the model went on with."""

    prompt: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats per token, all over the same `val_tokens` predicted tokens.

    `mlp_worths`, by layer and over fewer of these tokens (mlp_worth.py), are there for a vanilla model too. `levels`
    and `histograms` are indexed [layer][level]; with `features` they are empty for a vanilla model.
    """

    val_loss: float
    unigram_loss: float
    bigram_loss: float
    val_tokens: int
    mlp_worths: list[PairedDifference]
    levels: list[list[LevelSummary]]
    histograms: list[list[FrequencyHistogram]]
    features: list[FeatureContexts]
    sample: Sample
    token_strings: list[str] = field(repr=False)
    """How each id of the vocabulary is shown."""

    def scalars(self) -> dict[str, Any]:
        """The figures, ready for JSON; `mlp_worth` has a flat dict per layer, `levels` one per layer and level."""
        return {
            "val_loss": self.val_loss,
            "unigram_loss": self.unigram_loss,
            "bigram_loss": self.bigram_loss,
            "val_tokens": self.val_tokens,
            "mlp_worth": [
                {"layer": layer, "nats": worth.mean, "standard_error": worth.standard_error, "tokens": worth.n_tokens}
                for layer, worth in enumerate(self.mlp_worths)
            ],
            "levels": [
                {"layer": layer, "level": level, **asdict(summary)}
                for layer, summaries in enumerate(self.levels)
                for level, summary in enumerate(summaries)
            ],
        }


def evaluate_run(
    model: CayleyGPT,
    tokenizer: Tokenizer,
    train_tokens: np.ndarray | Tensor,
    val_windows: Int64[Tensor, "n pos_plus_1"],
    *,
    batch_size: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Losses against count models, what each MLP is worth, feature statistics with contexts, and a sample of text.

    All on `val_windows`.

    The figures do not depend on `batch_size`; `seed` draws the features shown and the sampled text. The model runs in
    eval mode on the device it is on and comes back in the mode it was in.

    Raises:
        ValueError: windows that are not [n, pos + 1] with n >= 1 and 1 <= pos <= n_ctx, token ids outside d_vocab, a
            tokenizer of more tokens than d_vocab, or losses that are not finite.
    """
    config = model.config
    _check_input(config, tokenizer, val_windows)
    was_training = model.training
    model.eval()
    try:
        unigram, bigram = NgramBaselines(train_tokens, config.d_vocab).loss(val_windows)
        losses = window_losses(model, val_windows, batch_size)
        _check_finite(losses)
        worths = mlp_worths(model, val_windows, losses, batch_size, progress)
        counters, features = [], []
        if config.levels is not None:
            collected = collect_features(
                model, val_windows[:, :-1], batch_size=batch_size, seed=seed, progress=progress
            )
            counters, features = collected.counters, collected.features
        sample = sample_text(model, val_windows, seed)
    finally:
        model.train(was_training)
    return Evaluation(
        val_loss=losses.mean().item(),
        unigram_loss=unigram,
        bigram_loss=bigram,
        val_tokens=losses.numel(),
        mlp_worths=worths,
        levels=[[summarise(counter) for counter in layer] for layer in counters],
        histograms=[[frequency_histogram(counter) for counter in layer] for layer in counters],
        features=features,
        sample=sample,
        token_strings=token_strings(tokenizer, config.d_vocab),
    )


def sample_text(model: CayleyGPT, val_windows: Int64[Tensor, "n pos_plus_1"], seed: int) -> Sample:
    """120 tokens after the first 16 of a validation window, at temperature 0.8 among the 50 likeliest."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    prompt = val_windows[:1, : min(PROMPT_TOKENS, val_windows.shape[1])].to(device)
    top_k = min(50, model.config.d_vocab)
    text = model.generate(prompt, SAMPLE_TOKENS, temperature=0.8, top_k=top_k, generator=generator)[0].tolist()
    return Sample(text[: prompt.shape[1]], text[prompt.shape[1] :])


def _check_input(config: CayleyGPTConfig, tokenizer: Tokenizer, val_windows: Tensor) -> None:
    if val_windows.ndim != 2 or len(val_windows) == 0 or not 2 <= val_windows.shape[1] <= config.n_ctx + 1:
        raise ValueError(
            f"expected val_windows of shape [n, pos + 1] with n >= 1 and 1 <= pos <= n_ctx = {config.n_ctx}, got "
            f"{tuple(val_windows.shape)}: cut the validation tokens into windows of n_ctx + 1"
        )
    if tokenizer.get_vocab_size() > config.d_vocab:
        raise ValueError(
            f"a tokenizer of {tokenizer.get_vocab_size()} tokens for a model of d_vocab = {config.d_vocab}: give the "
            "one that the model was trained with"
        )


def _check_finite(losses: Tensor) -> None:
    if not losses.isfinite().all():
        raise ValueError(
            f"the model's loss is not finite at {int((~losses.isfinite()).sum())} of {losses.numel()} tokens: look "
            "for nan or inf in its weights"
        )

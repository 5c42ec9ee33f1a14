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
from analysis.ngram import NgramBaselines
from analysis.sparsity import FrequencyHistogram, frequency_histogram
from analysis.tokens import token_strings
from cayley_interp import CayleyGPT
from cayley_interp.losses import window_losses

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

    `levels` and `histograms` are indexed [layer][level]; with `features` they are empty for a vanilla model.
    """

    val_loss: float
    unigram_loss: float
    bigram_loss: float
    val_tokens: int
    levels: list[list[LevelSummary]]
    histograms: list[list[FrequencyHistogram]]
    features: list[FeatureContexts]
    sample: Sample
    token_strings: list[str] = field(repr=False)
    """How each id of the vocabulary is shown."""

    def scalars(self) -> dict[str, Any]:
        """The figures, JSON-serialisable: losses, val_tokens, and `levels`, one flat dict per layer and level."""
        return {
            "val_loss": self.val_loss,
            "unigram_loss": self.unigram_loss,
            "bigram_loss": self.bigram_loss,
            "val_tokens": self.val_tokens,
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
    """Losses against count models, feature statistics with contexts, and a sample of text, all on `val_windows`.

    The figures do not depend on `batch_size`; `seed` draws the features shown and the sampled text. The model runs in
    eval mode on the device it is on and comes back in the mode it was in.

    Raises:
        ValueError: windows that are not [n, pos + 1] with n >= 1 and 1 <= pos <= n_ctx, or token ids outside d_vocab.
    """
    config = model.config
    if val_windows.ndim != 2 or len(val_windows) == 0 or not 2 <= val_windows.shape[1] <= config.n_ctx + 1:
        raise ValueError(
            f"expected val_windows of shape [n, pos + 1] with n >= 1 and 1 <= pos <= n_ctx = {config.n_ctx}, got "
            f"{tuple(val_windows.shape)}: cut the validation tokens into windows of n_ctx + 1"
        )
    was_training = model.training
    model.eval()
    try:
        unigram, bigram = NgramBaselines(train_tokens, config.d_vocab).loss(val_windows)
        losses = window_losses(model, val_windows, batch_size)
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

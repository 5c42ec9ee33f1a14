"""Unigram and bigram count models: the losses a language model has to beat before anything in it is worth reading."""

import numpy as np
import torch
from torch import Tensor

MAX_TOKENS = 50_000_000


class NgramBaselines:
    """Count models of the first `max_tokens` training tokens, in float64.

    Unigram: add-one, p(b) = (c(b) + 1) / (N + d_vocab). Bigram: Witten and Bell (1991),
    p(b|a) = (c(a, b) + T(a) p(b)) / (c(a) + T(a)) with T(a) the distinct successors of a; p(b) where a was never seen.

        unigram_loss, bigram_loss = NgramBaselines(train_tokens, d_vocab).loss(val_windows)

    Raises:
        ValueError: tokens that are not one-dimensional integers from 0 to d_vocab - 1, or none at all.
    """

    def __init__(self, tokens: np.ndarray | Tensor, d_vocab: int, max_tokens: int = MAX_TOKENS):
        self.d_vocab = d_vocab
        ids = _as_ids(tokens[:max_tokens], d_vocab)  # cut before the conversion: a memory map stays one
        if ids.ndim != 1 or len(ids) == 0:
            raise ValueError(f"expected the training tokens as one non-empty sequence, got shape {ids.shape}")
        self._unigram = (np.bincount(ids, minlength=d_vocab) + 1) / (len(ids) + d_vocab)
        self._pairs, self._pair_counts = np.unique(ids[:-1] * d_vocab + ids[1:], return_counts=True)
        firsts = self._pairs // d_vocab
        self._successors = np.bincount(firsts, minlength=d_vocab)
        self._firsts = np.bincount(ids[:-1], minlength=d_vocab)

    def unigram(self, b: np.ndarray | Tensor) -> np.ndarray:
        """p(b), float64, of the shape of b."""
        return self._unigram[_as_ids(b, self.d_vocab)]

    def bigram(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> np.ndarray:
        """p(b|a), float64, of the common shape of a and b."""
        a, b = np.broadcast_arrays(_as_ids(a, self.d_vocab), _as_ids(b, self.d_vocab))
        pair = a * self.d_vocab + b
        at = np.searchsorted(self._pairs, pair).clip(max=max(len(self._pairs) - 1, 0))
        counts = np.zeros(pair.shape)
        if len(self._pairs):
            counts = np.where(self._pairs[at] == pair, self._pair_counts[at], 0)
        firsts, successors = self._firsts[a], self._successors[a]
        backed_off = counts + successors * self._unigram[b]
        return np.where(firsts > 0, backed_off / np.maximum(firsts + successors, 1), self._unigram[b])

    def loss(self, windows: np.ndarray | Tensor) -> tuple[float, float]:
        """Mean nats per predicted token, (unigram, bigram), over windows [n, pos + 1], as a model's loss is."""
        ids = _as_ids(windows, self.d_vocab)
        if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError(f"expected windows of shape [n, pos + 1] with n, pos >= 1, got {ids.shape}")
        unigram, bigram = self.unigram(ids[:, 1:]), self.bigram(ids[:, :-1], ids[:, 1:])
        return -np.log(unigram).mean().item(), -np.log(bigram).mean().item()


def _as_ids(tokens: np.ndarray | Tensor, d_vocab: int) -> np.ndarray:
    ids = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"expected token ids as integers, got {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() < d_vocab:
        raise ValueError(
            f"token ids run from 0 to d_vocab - 1 = {d_vocab - 1}, got {ids.min()}..{ids.max()}: "
            "are the tokens from this model's tokenizer?"
        )
    return ids.astype(np.int64)

"""The text a replacement is trained and measured on: the same documents held out as for a Cayley-GPT."""

import random
from collections.abc import Iterator
from itertools import islice

import torch
from jaxtyping import Int64
from torch import Tensor

from molt_lens.hosts import Host
from molt_lens.packing import pack_documents
from training.molt_recipes import MoltRun
from training.text import DataError, Split, is_validation, iter_documents, split_documents


def documents(config: MoltRun, split: Split) -> Iterator[str]:
    """Texts of a split: those of files shuffled, those of a stream as they come.

    The order is the same for every run, so that runs differ in their seed and not in their text, and share activations.
    """
    if config.data.startswith("hf:"):
        for document in iter_documents(config.data):
            if is_validation(document.text, config.val_fraction) == (split == "val"):
                yield document.text
        return
    texts = [text for which, text in split_documents(config.data, config.val_fraction) if which == split]
    random.Random(0).shuffle(texts)
    yield from texts


def train_sequences(config: MoltRun, host: Host) -> Iterator[Int64[Tensor, " pos"]]:
    return pack_documents(documents(config, "train"), host, config.n_ctx)


def val_sequences(config: MoltRun, host: Host) -> Int64[Tensor, "sequence pos"]:
    """Held-out sequences, twice as many as are measured on, drawn from all over a finite corpus.

    Raises:
        DataError: the held-out documents are shorter than one sequence.
    """
    needed = -(-2 * max(config.val_tokens, config.behaviour_tokens) // config.n_ctx)
    sequences = pack_documents(documents(config, "val"), host, config.n_ctx)
    found = list(islice(sequences, needed) if config.data.startswith("hf:") else sequences)
    if not found:
        raise DataError(f"{config.data} holds out no sequence of {config.n_ctx} tokens: raise --val-fraction")
    return torch.stack(found)[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:needed]]

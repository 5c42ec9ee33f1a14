"""Tokenizers: GPT-2's from its two files, a byte-level BPE trained on the corpus, or a tokenizer.json; and encoding."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from cayley_interp.tokenizer import EOS, byte_level, gpt2_tokenizer, read_tokenizer, vocab_size
from training.text import DataError, Split, split_documents

WORD_END = re.compile(r"(?<=\S)(?=[ \n])")
PIECE_CHARS = 20_000  # longer texts are encoded in pieces
BATCH_CHARS = 4_000_000  # text encoded at once
STREAM_BPE_CHARS = 50_000_000  # text of a stream that a BPE is trained on


# ---- Tokenizers ----


def load_tokenizer(name: str, spec: str, d_vocab: int, val_fraction: float) -> Tokenizer:
    """`bpe`, trained on the training split of `spec`; `gpt2`; or the tokenizer.json at the path `name`.

    Raises:
        DataError: no such file, no `<|endoftext|>`, or more than `d_vocab` entries.
        ValueError: not a tokenizer.json.
    """
    if name == "bpe":
        tokenizer = _train_bpe(spec, d_vocab, val_fraction)
    elif name == "gpt2":
        tokenizer = gpt2_tokenizer()
    elif Path(name).is_file():
        tokenizer = read_tokenizer(Path(name))
    else:
        raise DataError(f"no tokenizer at {name}: expected `bpe`, `gpt2` or the path of a tokenizer.json")
    eos_id(tokenizer)
    check_vocab(tokenizer, d_vocab, name)
    return tokenizer


def eos_id(tokenizer: Tokenizer) -> int:
    """Id of `<|endoftext|>`; DataError if the tokenizer has none."""
    eos = tokenizer.token_to_id(EOS)
    if eos is None:
        raise DataError(f"the tokenizer has no {EOS} to end a document with: add it as a special token")
    return eos


def check_vocab(tokenizer: Tokenizer, d_vocab: int, name: str) -> None:
    if vocab_size(tokenizer) > d_vocab:
        raise DataError(
            f"the tokenizer {name} has {vocab_size(tokenizer)} entries, more than d_vocab = {d_vocab}: "
            "raise d_vocab or use a smaller tokenizer"
        )


def _train_bpe(spec: str, d_vocab: int, val_fraction: float) -> Tokenizer:
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS],
        show_progress=False,
    )
    texts = (text for split, text in split_documents(spec, val_fraction) if split == "train")
    pieces = (piece for text in texts for piece in _pieces(text))
    tokenizer.train_from_iterator(_first_chars(pieces, STREAM_BPE_CHARS) if spec.startswith("hf:") else pieces, trainer)
    return tokenizer


def _first_chars(texts: Iterable[str], n_chars: int) -> Iterator[str]:
    for text in texts:
        yield text
        n_chars -= len(text)
        if n_chars <= 0:
            return


# ---- Encoding ----


def _pieces(text: str) -> Iterator[str]:
    # GPT-2's pattern never joins a non-space to the space after it, so cutting there changes no token, and a
    # huge text is encoded on all cores in bounded memory.
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = WORD_END.search(text, start + PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


class EncodedPiece(NamedTuple):
    split: Split
    tokens: Int64[np.ndarray, " n"]


def encode_documents(tokenizer: Tokenizer, documents: Iterable[tuple[Split, str]]) -> Iterator[EncodedPiece]:
    """Token ids of the documents in order, each ended by the EOS id; a long one comes in several pieces.

    A document that spells `<|endoftext|>` is ordinary text: no document can contain the EOS id.
    """
    eos, before = eos_id(tokenizer), tokenizer.pre_tokenizer
    cuttable = isinstance(before, pre_tokenizers.ByteLevel) and before.use_regex and not before.add_prefix_space
    cuttable = cuttable and tokenizer.normalizer is None
    batch: list[tuple[Split, str, bool]] = []
    n_chars = 0

    def encode_batch() -> Iterator[EncodedPiece]:
        kept, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
        encodings = tokenizer.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
        tokenizer.encode_special_tokens = kept
        for (split, _, last), encoding in zip(batch, encodings, strict=True):
            yield EncodedPiece(split, np.array(encoding.ids + [eos] * last, dtype=np.int64))
        batch.clear()

    for split, text in documents:
        pieces = list(_pieces(text)) if cuttable else [text]
        for i, piece in enumerate(pieces):
            batch.append((split, piece, i == len(pieces) - 1))
            n_chars += len(piece)
            if n_chars >= BATCH_CHARS:
                yield from encode_batch()
                n_chars = 0
    yield from encode_batch()

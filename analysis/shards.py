"""Token shards as measurements read them: validation windows, and how often each token is in the training text."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from tokenizers import Tokenizer
from torch import Tensor

from cayley_interp.tokenizer import read_tokenizer

COUNTED_TOKENS = 20_000_000
"""Training tokens that the frequencies of tokens are counted on."""


@dataclass(frozen=True)
class TokenShards:
    """A folder of token shards: what models are compared on, and what made it so."""

    folder: Path
    tokenizer: Tokenizer
    dtype: str
    train: list[Path]
    val: list[Path]
    val_sums: list[str]


def shard_folder_of(run: Path) -> Path | None:
    """Where a run's token shards are: in its data/, or in the shard folder that it was trained on."""
    if (run / "data" / "index.json").is_file():
        return run / "data"
    if not (run / "config.json").is_file():
        return None
    data = json.loads((run / "config.json").read_text()).get("data")  # a model's own config.json has none
    folder = Path(data["data"]) if data else None
    return folder if folder and (folder / "index.json").is_file() else None


def read_shards(folder: Path) -> TokenShards:
    """The index of a folder of token shards.

    Raises:
        FileNotFoundError: index.json or tokenizer.json is missing.
        ValueError: an index.json of another form.
    """
    for name in ("index.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not a folder of token shards, it has no {name}: make one with "
                "python training/data.py tokenize TEXT --out FOLDER"
            )
    try:
        index = json.loads((folder / "index.json").read_text())
        train, val = ([folder / entry["file"] for entry in index["splits"][split]] for split in ("train", "val"))
        sums = [entry["sha256"] for entry in index["splits"]["val"]]
        return TokenShards(folder, read_tokenizer(folder / "tokenizer.json"), index["dtype"], train, val, sums)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'index.json'} is not an index of token shards: {error!r}") from error


def read_windows(shards: TokenShards, n_ctx: int, n_tokens: int) -> Int64[Tensor, "n pos_plus_1"]:
    """The first windows of the validation shards with at most n_tokens predicted tokens: n_ctx + 1 ids, n_ctx apart.

    Raises:
        ValueError: not one whole window.
    """
    parts, missing = [], n_tokens // n_ctx
    for shard in shards.val:
        tokens = np.memmap(shard, shards.dtype, "r")
        n = min(missing, (len(tokens) - 1) // n_ctx)
        parts += [tokens[i * n_ctx : (i + 1) * n_ctx + 1].astype(np.int64) for i in range(n)]
        missing -= n
    if not parts:
        raise ValueError(f"no window of n_ctx + 1 = {n_ctx + 1} validation tokens in {shards.folder}: raise --tokens")
    return torch.from_numpy(np.stack(parts))


def training_counts(shards: TokenShards, d_vocab: int) -> Int64[Tensor, " d_vocab"]:
    """Occurrences of every token id in the first training tokens of the shards."""
    counts, missing = np.zeros(d_vocab, np.int64), COUNTED_TOKENS
    for shard in shards.train:
        tokens = np.memmap(shard, shards.dtype, "r")[:missing]
        counts += np.bincount(tokens, minlength=d_vocab)
        missing -= len(tokens)
        if not missing:
            break
    return torch.from_numpy(counts)

"""Small corpora for tests, and what became of them."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cayley_interp.tokenizer import read_tokenizer
from training.shards import read_index
from training.tokenizer import encode_documents, eos_id

WORDS = ["the", "state", "of", "our", "union", "is", "strong", "and", "we", "keep", "it", "people"]


def make_texts(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(3, 40))) for i in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def read_tokens(folder: Path, split: str) -> np.ndarray:
    index = read_index(folder)
    files = [folder / entry["file"] for entry in index["splits"][split]]
    return np.concatenate([np.fromfile(file, index["dtype"]) for file in files]).astype(np.int64)


def decoded_documents(folder: Path, split: str) -> list[str]:
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    tokens = read_tokens(folder, split)
    ends = np.flatnonzero(tokens == eos_id(tokenizer))
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in np.split(tokens, ends + 1)[:-1]]


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    documents = [("train", text) for text in texts]
    return [int(i) for piece in encode_documents(tokenizer, documents) for i in piece.tokens]

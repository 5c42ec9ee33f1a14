"""Streams and their resuming, what the trainer opens, and the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from cayley_interp.tokenizer import vocab_size
from tests.training.texts import decoded_documents, encode, make_texts, read_tokens, write_jsonl
from training import data
from training.data import TokenStream
from training.recipes import DataConfig
from training.shards import TokenWindows
from training.text import SPLITS, DataError, is_validation, iter_documents, split_documents

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

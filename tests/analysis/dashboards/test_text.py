"""The text that units are looked at on."""

import json

import numpy as np
import pytest
import torch

from analysis.dashboards import text as text_module
from analysis.dashboards.text import all_count, pack_with, text_of_prompt, text_of_shards, text_of_speeches
from analysis.shards import read_shards
from analysis.speeches import Speech
from tests.analysis.fabricated import SPECIAL, make_tokenizer


def test_a_document_ends_with_its_end_of_text(tmp_path):
    tokenizer = make_tokenizer()
    eos = tokenizer.token_to_id(SPECIAL)
    ids = np.array([1, 2, eos, 3, 4, 5, eos, eos, 6, 7, 8, 9], dtype="<u2")
    ids.tofile(tmp_path / "val-00000.bin")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    entry = {"file": "val-00000.bin", "tokens": len(ids), "documents": 3, "sha256": ""}
    (tmp_path / "index.json").write_text(json.dumps({"dtype": "<u2", "splits": {"train": [], "val": [entry]}}))
    text = text_of_shards(read_shards(tmp_path), n_ctx=5, n_tokens=10)
    assert text.windows.tolist() == [ids[:5].tolist(), ids[5:10].tolist()]
    assert text.documents.tolist() == [[0, 0, 0, 1, 1], [1, 1, 2, 3, 3]]
    assert text.tokens == 10


def test_windows_are_spread_over_the_speeches(monkeypatch):
    lengths = [90, 30, 400, 80]
    speeches = [Speech(str(i), 2000, "", "", "", chr(ord("a") + i) * n) for i, n in enumerate(lengths)]
    monkeypatch.setattr(text_module, "read_speeches", lambda: speeches)
    tokenizer = make_tokenizer()
    every = text_of_speeches(pack_with(tokenizer, 4), all_count, 4, 32)
    assert [tokenizer.decode(row.tolist()) for row in every.windows] == [c * 4 for c in "aabccdd"]
    assert every.documents[:, 0].tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert torch.equal(every.documents, every.documents[:, :1].expand(-1, 4))
    assert every.counted.all()
    with pytest.raises(ValueError, match="is no window of n_ctx = 4 tokens"):
        text_of_speeches(pack_with(tokenizer, 4), all_count, 4, 3)


def test_a_prompt_is_cut_to_the_window():
    text = text_of_prompt(make_tokenizer(), "abcdef", 4)
    assert text.windows.shape == (1, 4)
    assert text.counted.all()

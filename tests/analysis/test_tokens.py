"""Tokens as strings: of byte-level and SentencePiece vocabularies, all of them visible, none of them wrong."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from analysis.tokens import MAX_LENGTH, token_strings, visible
from tests.analysis.fabricated import make_tokenizer

PIECES = ["▁", "▁the", "the", "▁of", "a", "é", "日", "▁▁"]


def sentencepiece() -> Tokenizer:
    """As Gemma's: ▁ for a space, <0xNN> for what no piece spells, newlines and runs of spaces as added tokens."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: i for i, piece in enumerate(["<unk>", *bytes_, *PIECES])}
    model = models.BPE(vocab=vocab, merges=[("▁", "▁")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken("\n", normalized=False), AddedToken("▁▁▁", normalized=True)])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "▁a": 2}, merges=[("▁", "a")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_pieces_of_sentencepiece_are_shown_as_what_they_spell():
    tokenizer = sentencepiece()
    strings = token_strings(tokenizer, 270)
    shown = {token: strings[tokenizer.token_to_id(token)] for token in ("▁", "▁the", "▁▁", "é", "\n", "▁▁▁")}
    assert shown == {"▁": " ", "▁the": " the", "▁▁": "  ", "é": "é", "\n": "↵", "▁▁▁": "   "}
    shown = {byte: strings[tokenizer.token_to_id(byte)] for byte in ("<0x0A>", "<0x41>", "<0x00>", "<0xE2>")}
    assert shown == {"<0x0A>": "↵", "<0x41>": "A", "<0x00>": "\\x00", "<0xE2>": "\\xe2"}
    assert strings[269] == "<unused 269>"
    assert token_strings(metaspace(), 3) == [" ", "a", " a"]


def test_a_byte_level_vocabulary_keeps_marks_that_are_text_there():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["▁x", "<0x0A>"])
    strings = token_strings(tokenizer, 300)
    assert strings[tokenizer.token_to_id("▁x")] == "▁x"
    assert strings[tokenizer.token_to_id("<0x0A>")] == "<0x0A>"


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece, metaspace])
def test_a_transformers_tokenizer_is_shown_as_the_one_it_is_built_on(make):
    assert token_strings(wrapped(make()), 300) == token_strings(make(), 300)


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece])
def test_all_that_is_shown_is_visible(make):
    for string in token_strings(make(), 300):
        assert all(c == " " or unicodedata.category(c)[0] not in "CZ" for c in string)
        assert 0 < len(string) <= MAX_LENGTH + len("… (10,000 characters)")


SHOWN = {make: token_strings(make(), 300) for make in (make_tokenizer, sentencepiece)}
PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)


@pytest.mark.parametrize("make", SHOWN)
@given(text=PLAIN)
def test_plain_tokens_together_are_the_text(make, text):
    assert "".join(SHOWN[make][i] for i in make().encode(text).ids) == text


@given(text=st.text(st.sampled_from(["a", " ", "the", "é", "日", "\n"]).map(lambda s: s[0]), max_size=20))
def test_pieces_together_are_the_text(text):
    assert "".join(SHOWN[sentencepiece][i] for i in sentencepiece().encode(text).ids) == visible(text)


@given(text=st.text(max_size=100))
def test_any_text_is_made_visible(text):
    assert all(c == " " or unicodedata.category(c)[0] not in "CZ" for c in visible(text))


def test_what_is_no_tokenizer_of_the_library_is_refused():
    with pytest.raises(TypeError, match="str is not built on the `tokenizers` library"):
        token_strings("gpt2", 3)

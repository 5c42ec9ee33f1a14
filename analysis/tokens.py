"""Tokens as strings a reader can see: whitespace, controls and broken UTF-8 made visible."""

import json
import re
import unicodedata
from typing import Any

from tokenizers import Tokenizer

MAX_LENGTH = 80
MARKS = {"\n": "↵", "\t": "⇥"}


def token_strings(tokenizer: Tokenizer | Any, d_vocab: int) -> list[str]:
    """The display string of every id below d_vocab; ids that the tokenizer lacks read `<unused 50300>`.

    Each id is decoded alone, by the steps of the tokenizer's own decoder that concern single tokens: of a byte-level
    BPE the bytes, of SentencePiece ▁ for a space and <0x0A> for a byte. Bytes that are not valid UTF-8 by themselves
    read `\\xNN`. What a decoder does to whole texts, such as taking the first space away, is left out.

    Args:
        tokenizer: of the `tokenizers` library, or a transformers tokenizer that is built on one.

    Raises:
        TypeError: it is built on something else.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise TypeError(
            f"{type(tokenizer).__name__} is not built on the `tokenizers` library: expected one with a tokenizer.json"
        )
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    steps = _decoder_steps(backend)
    strings = []
    for i in range(d_vocab):
        token = added.get(i, backend.id_to_token(i))
        strings.append(f"<unused {i}>" if token is None else visible(_decoded(token, steps, i in added)))
    return strings


def visible(text: str) -> str:
    """The text with ↵ for newlines, escapes for other control and formatting characters, and cut at 80 characters."""
    shown = "".join(_visible_character(c) for c in text[:MAX_LENGTH])
    return shown if len(text) <= MAX_LENGTH else f"{shown}… ({len(text):,} characters)"


def _visible_character(c: str) -> str:
    if c in MARKS:
        return MARKS[c]
    # Cc controls, Cf formatting such as direction marks, Cs surrogates, Co private, Cn unassigned, Z* separators
    if c != " " and unicodedata.category(c)[0] in "CZ":
        return c.encode("unicode_escape", "surrogatepass").decode("ascii")
    return c


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte (encoder.py, bytes_to_unicode), inverted."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(moved)}


BYTE_OF = _byte_characters()


BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The decoder as tokenizer.json has it, a sequence taken apart; [] without one."""
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _decoded(token: str, steps: list[dict[str, Any]], is_added: bool) -> str:
    """What a token says by itself; an added one is plain text but for SentencePiece's spaces."""
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"]:
            token = token.replace(step["pattern"]["String"], step["content"])
        elif kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif is_added:
            continue
        elif kind == "ByteLevel" and all(c in BYTE_OF for c in token):
            token = _of_bytes(bytes(BYTE_OF[c] for c in token))
        elif kind == "ByteFallback" and (byte := BYTE.fullmatch(token)):
            token = _of_bytes(bytes.fromhex(byte[1]))
    return token


def _of_bytes(content: bytes) -> str:
    return content.decode("utf-8", errors="backslashreplace")

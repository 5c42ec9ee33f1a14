"""Tokens as strings a reader can see: whitespace, controls and broken UTF-8 made visible."""

import unicodedata

from tokenizers import Tokenizer

MAX_LENGTH = 80
MARKS = {"\n": "↵", "\t": "⇥"}


def token_strings(tokenizer: Tokenizer, d_vocab: int) -> list[str]:
    """The display string of every id below d_vocab; ids that the tokenizer lacks read `<unused 50300>`.

    Each id is decoded alone: in a byte-level BPE, bytes that are not valid UTF-8 by themselves read `\\xNN`.
    """
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    strings = []
    for i in range(d_vocab):
        token = tokenizer.id_to_token(i)
        if i in added:
            strings.append(visible(added[i]))
        elif token is None:
            strings.append(f"<unused {i}>")
        else:
            strings.append(visible(_from_byte_level(token)))
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


def _from_byte_level(token: str) -> str:
    if not all(c in BYTE_OF for c in token):
        return token  # not of a byte-level vocabulary
    return bytes(BYTE_OF[c] for c in token).decode("utf-8", errors="backslashreplace")

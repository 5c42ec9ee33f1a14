"""Packing: documents as token sequences of one length, and which of their tokens count as text.

    sequences = pack_documents(texts, host, ctx_len=256)     # [pos] ids, pos = 256, one after the other
    keep = keep_mask(host, ids)                              # False at what is no text

Documents share sequences, and a token attends to the documents before its own in the same sequence, as in most models'
training. No document is cut short: what does not fit goes on in the next sequence.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from molt_lens.hosts import Host

FILL = 0.9
"""Share of a sequence that a part of a long text aims at: parts cut by characters differ in their number of tokens."""


@dataclass
class PackingCounts:
    """What became of the documents, in tokens; final once the last sequence has been read."""

    documents: int = 0
    """Documents with any text."""
    sequences: int = 0
    dropped: int = 0
    """Tokens after the last whole sequence, separators included. 0 for chat hosts, whose last sequence is padded."""


def pack_documents(
    texts: Iterable[str],
    host: Host,
    ctx_len: int,
    *,
    chat: bool | None = None,
    counts: PackingCounts | None = None,
) -> Iterator[Int64[Tensor, " pos"]]:
    """Sequences of exactly ctx_len ids, each starting with BOS where the host has one.

    Base hosts read one stream of tokens, cut anywhere: between two documents stand the tokenizer's EOS and BOS, those
    it has, once where they are the same token.

    Chat hosts read whole conversations, as many as fit, in their chat template: a document that is a JSON list of
    {"role": ..., "content": ...} is one, any other is the content of a user's turn. A text too long for one sequence is
    cut at spaces into several such turns; a conversation too long goes on in the next sequence. The end of a sequence
    is padded with a special token, which no earlier token sees and `keep_mask` leaves out.

    Args:
        ctx_len: tokens in a sequence, BOS included.
        chat: whether to use the chat template; by default where the tokenizer has one. Some base models come with
            a template that they were not trained on.
        counts: is added to as sequences are read.

    Raises:
        ValueError: a ctx_len that is too short or longer than the host's n_ctx, a host without a tokenizer or, with
            `chat`, without a template, or a conversation that the template refuses.
    """
    if not 2 <= ctx_len <= host.n_ctx:
        raise ValueError(f"ctx_len must be from 2 to the n_ctx={host.n_ctx} of {host.name}, got {ctx_len}")
    if host.tokenizer is None:
        raise ValueError(f"{host.name} has no tokenizer: give one, load_host(..., tokenizer=...)")
    chat = host.is_chat if chat is None else chat
    if chat and not host.is_chat:
        raise ValueError(
            f"the tokenizer of {host.name} has no chat template: leave out chat, or give another tokenizer"
        )
    return (_pack_chats if chat else _pack_stream)(texts, host, ctx_len, counts or PackingCounts())


def keep_mask(host: Host, ids: Int64[Tensor, "*batch pos"]) -> Bool[Tensor, "*batch pos"]:
    """Which tokens count as text: not BOS or any other special token, and not the first of a sequence.

    The first position is the attention sink whatever stands there: its activations are of another size than all others,
    in hosts without BOS too.
    """
    special = torch.tensor(sorted(host.special_ids), dtype=torch.int64, device=ids.device)
    keep = ~torch.isin(ids, special)
    keep[..., 0] = False
    return keep


def _pack_stream(
    texts: Iterable[str], host: Host, ctx_len: int, counts: PackingCounts
) -> Iterator[Int64[Tensor, " pos"]]:
    bos = [] if host.bos_id is None else [host.bos_id]
    eos = [] if host.tokenizer.eos_token_id is None else [host.tokenizer.eos_token_id]
    between = eos + bos if eos != bos else bos
    sequence = list(bos)
    for text in texts:
        ids = _without_bos(host.tokenize(text), host)
        if not ids:
            continue
        counts.documents += 1
        if len(sequence) > len(bos):
            # What of the separator does not fit is not needed: a new sequence separates too.
            ids = between[: ctx_len - len(sequence)] + ids
        taken = 0
        while (room := ctx_len - len(sequence)) <= len(ids) - taken:
            counts.sequences += 1
            yield torch.tensor(sequence + ids[taken : taken + room])
            taken += room
            sequence = list(bos)
        sequence += ids[taken:]
    counts.dropped += len(sequence) - len(bos)


def _pack_chats(
    texts: Iterable[str], host: Host, ctx_len: int, counts: PackingCounts
) -> Iterator[Int64[Tensor, " pos"]]:
    bos = [] if host.bos_id is None else [host.bos_id]
    padding = _padding_id(host)

    def padded(sequence: list[int]) -> Tensor:
        counts.sequences += 1
        return torch.tensor(sequence + [padding] * (ctx_len - len(sequence)))

    sequence: list[int] = []
    for text in texts:
        counts.documents += not text.isspace() and text != ""
        for ids in _conversations(text, host, ctx_len - len(bos)):
            if sequence and len(sequence) + len(bos) + len(ids) > ctx_len:
                yield padded(sequence)
                sequence = []
            sequence += bos + ids
    if sequence:
        yield padded(sequence)


def _conversations(text: str, host: Host, room: int) -> Iterator[list[int]]:
    """A document in the chat template, in pieces of at most `room` ids, without BOS."""
    messages = _messages(text)
    if messages is None:
        yield from _turns(text, host, room)
        return
    ids = _in_template(messages, host)
    for start in range(0, len(ids), room):
        yield ids[start : start + room]


def _turns(text: str, host: Host, room: int) -> Iterator[list[int]]:
    """A text as one user's turn, or as several where it is too long."""
    if not text.strip():
        return
    ids = _in_template([{"role": "user", "content": text}], host)
    if len(ids) <= room:
        yield ids
        return
    frame = len(_in_template([{"role": "user", "content": "."}], host))
    if frame >= room or len(text) == 1:
        raise ValueError(
            f"the chat template of {host.name} takes {frame} tokens around its shortest turn, which leaves no room for "
            f"text in the {room} of a sequence: raise ctx_len"
        )
    n_parts = min(len(text), max(2, math.ceil(len(ids) / (FILL * (room - frame)))))
    for part in _parts(text, n_parts):
        yield from _turns(part, host, room)


def _parts(text: str, n: int) -> Iterator[str]:
    """n parts of about the same length that make up the text, cut at spaces where there are any."""
    start = 0
    for i in range(1, n):
        end = i * len(text) // n
        space = text.rfind(" ", start + 1, end)
        end = space if space > start + len(text) // (2 * n) else end
        yield text[start:end]
        start = end
    yield text[start:]


def _messages(text: str) -> list[dict[str, Any]] | None:
    """The conversation that a document is, or None of plain text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        messages = json.loads(text)
    except json.JSONDecodeError:
        return None
    is_conversation = bool(messages) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    )
    return messages if is_conversation else None


def _in_template(messages: list[dict[str, Any]], host: Host) -> list[int]:
    from jinja2 import TemplateError

    try:
        ids = host.tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(f"the chat template of {host.name} refuses the turns {roles}: {error}") from error
    return _without_bos(ids, host)


def _without_bos(ids: list[int], host: Host) -> list[int]:
    return ids[1:] if ids and ids[0] == host.bos_id else ids


def _padding_id(host: Host) -> int:
    tokenizer = host.tokenizer
    for padding in (tokenizer.pad_token_id, tokenizer.eos_token_id, host.bos_id):
        if padding is not None and padding in host.special_ids:
            return padding
    raise ValueError(f"the tokenizer of {host.name} has neither padding, EOS nor BOS to fill a sequence with")

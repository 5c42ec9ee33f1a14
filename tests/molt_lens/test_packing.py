"""Packing: every token once and whole, BOS first, separators, templates, and what counts as text."""

import json

import pytest
import torch

from molt_lens.packing import PackingCounts, keep_mask, pack_documents
from tests.molt_lens.host_models import BOS_ID, EOS_ID, tiny_host, tiny_text

CTX = 16
DOCUMENTS = ["a short one", "", tiny_text(100), "x", tiny_text(37, seed=1), "the last, whose end is dropped"]


def text_of(host, ids: list[int]) -> str:
    return bytes(token for token in ids if token not in host.special_ids).decode()


@pytest.fixture(scope="module")
def host():
    return tiny_host()


@pytest.fixture(scope="module")
def chat_host():
    return tiny_host(chat=True)


def test_base_sequences_are_the_stream_cut_at_ctx_len_behind_a_bos(host):
    counts = PackingCounts()
    sequences = [ids.tolist() for ids in pack_documents(DOCUMENTS, host, CTX, counts=counts)]
    assert all(len(ids) == CTX and ids[0] == BOS_ID for ids in sequences)
    stream = [token for ids in sequences for token in ids[1:]]
    whole = "".join(DOCUMENTS)
    assert whole.startswith(text_of(host, stream))
    assert 0 < len(whole) - len(text_of(host, stream)) <= counts.dropped < CTX
    assert (counts.documents, counts.sequences) == (5, len(sequences))


def test_documents_are_separated_once(host):
    first = next(pack_documents(["ab", "cd", "", "ef"], host, 11))
    assert first.tolist() == [BOS_ID, *b"ab", EOS_ID, BOS_ID, *b"cd", EOS_ID, BOS_ID, *b"ef"]


@pytest.mark.parametrize("length", [CTX - 3, CTX - 2, CTX - 1])
def test_a_sequence_that_ends_with_a_document_is_no_reason_for_a_second_bos(host, length):
    sequences = [ids.tolist() for ids in pack_documents(["a" * length, "b" * 40], host, CTX)]
    assert sequences[1] == [BOS_ID, *b"b" * (CTX - 1)]


def test_a_bos_written_in_the_text_is_not_doubled(host):
    assert next(pack_documents(["<bos>abcdef"], host, 4)).tolist() == [BOS_ID, *b"abc"]


def test_a_document_of_many_sequences_comes_out_whole(host):
    text = tiny_text(10_000)
    sequences = list(pack_documents([text], host, 101))
    assert text_of(host, torch.stack(sequences).flatten().tolist()) == text


def test_without_a_bos_sequences_begin_with_text():
    bare = tiny_host()
    bare.bos_id = None
    assert [ids.tolist() for ids in pack_documents(["abcd", "efgh"], bare, 3)] == [
        [*b"abc"],
        [*b"d", EOS_ID, *b"e"],
        [*b"fgh"],
    ]


def test_one_token_for_bos_and_eos_separates_once():
    host = tiny_host("gpt2")
    host.tokenizer.bos_token = "<eos>"
    host.bos_id = EOS_ID
    assert next(pack_documents(["ab", "cd"], host, 6)).tolist() == [EOS_ID, *b"ab", EOS_ID, *b"cd"]


def test_chat_hosts_read_each_document_as_a_turn_and_each_conversation_as_itself(chat_host):
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    sequences = list(pack_documents(["one", json.dumps(conversation), "[not json"], chat_host, 36))
    turn = [BOS_ID, *b"[user] one", EOS_ID]
    talk = [BOS_ID, *b"[user] hi", EOS_ID, *b"[assistant] yes", EOS_ID]
    other = [BOS_ID, *b"[user] [not json", EOS_ID]
    assert [ids.tolist() for ids in sequences] == [
        turn + [EOS_ID] * (36 - len(turn)),
        talk + [EOS_ID] * (36 - len(talk)),
        other + [EOS_ID] * (36 - len(other)),
    ]
    packed = next(pack_documents(["one", "two"], chat_host, 36)).tolist()
    assert packed == [*turn, BOS_ID, *b"[user] two", EOS_ID, *[EOS_ID] * (36 - 2 * len(turn))]


def test_a_long_text_becomes_several_turns_of_whole_words_and_loses_nothing(chat_host):
    text = "".join(word[: 2 + len(word) % 8] + " " for word in tiny_text(20_000).split())
    counts = PackingCounts()
    sequences = [ids.tolist() for ids in pack_documents([text], chat_host, 64, counts=counts)]
    assert all(len(ids) == 64 and ids[0] == BOS_ID for ids in sequences)
    # Each turn begins and ends in its own sequence.
    assert all(bytes(ids[1:8]) == b"[user] " and ids[-1] == EOS_ID for ids in sequences)
    turns = [text_of(chat_host, ids).removeprefix("[user] ") for ids in sequences]
    assert "".join(turns) == text
    assert all(turn.startswith(" ") for turn in turns[1:])
    assert sum(len(turn) for turn in turns) > 0.75 * len(turns) * (64 - 9)
    assert (counts.documents, counts.sequences, counts.dropped) == (1, len(sequences), 0)


def test_a_conversation_too_long_for_a_sequence_goes_on_in_the_next(chat_host):
    content = tiny_text(100)
    document = json.dumps([{"role": "user", "content": content}])
    sequences = [ids.tolist() for ids in pack_documents([document], chat_host, 40)]
    assert all(len(ids) == 40 and ids[0] == BOS_ID for ids in sequences)
    assert "".join(text_of(chat_host, ids) for ids in sequences) == f"[user] {content}"


def test_chat_can_be_switched_off_and_not_on(host, chat_host):
    assert next(pack_documents(["abcdef"], chat_host, 4, chat=False)).tolist() == [BOS_ID, *b"abc"]
    with pytest.raises(ValueError, match="no chat template"):
        pack_documents(["abcdef"], host, 4, chat=True)


def test_a_template_that_refuses_or_leaves_no_room_is_an_error_that_says_so(chat_host):
    with pytest.raises(ValueError, match="raise ctx_len"):
        list(pack_documents([tiny_text(100)], chat_host, 9))
    strict = tiny_host(chat=True)
    strict.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the turns user: roles must alternate"):
        list(pack_documents(["text"], strict, 40))


@pytest.mark.parametrize("ctx_len", [1, 129])
def test_a_ctx_len_that_cannot_be_is_refused_at_the_call(host, ctx_len):
    with pytest.raises(ValueError, match="from 2 to the n_ctx=128"):
        pack_documents([], host, ctx_len)


def test_keep_mask_leaves_out_special_tokens_and_first_positions(host):
    ids = torch.tensor([[BOS_ID, 97, EOS_ID, 98, BOS_ID, 99], [97, 98, 99, EOS_ID, EOS_ID, EOS_ID]])
    assert keep_mask(host, ids).int().tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]]
    assert keep_mask(host, ids[0]).int().tolist() == [0, 1, 0, 1, 0, 1]


def test_padding_changes_no_activation_before_it(chat_host):
    from molt_lens.hosts import Site

    site = Site(1)
    padded = next(pack_documents(["some text"], chat_host, 64))
    kept = int(keep_mask(chat_host, padded).nonzero()[-1]) + 1
    whole, alone = (chat_host.capture(site, ids[None])[1][0, :kept] for ids in (padded, padded[:kept]))
    torch.testing.assert_close(whole, alone)  # products of other shapes round differently

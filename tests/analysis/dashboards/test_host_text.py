"""Texts of hosts: every window of one speech, documents numbered, what is no text not counted."""

import pytest
import torch

from analysis.dashboards.host_text import prompt_of_host, text_of_host, text_of_sequences
from analysis.speeches import read_speeches
from molt_lens.packing import keep_mask
from tests.molt_lens.host_models import BOS_ID, EOS_ID, tiny_host

N_CTX = 128


@pytest.mark.parametrize("n_windows", [3, 400])
def test_every_window_is_of_one_speech(n_windows):
    host = tiny_host("llama")
    text = text_of_host(host, n_windows * N_CTX + 5)
    assert text.windows.shape == (n_windows, N_CTX)
    assert torch.equal(text.counted, keep_mask(host, text.windows))
    documents = text.documents[:, 0]
    assert (text.documents == documents[:, None]).all()
    assert documents.tolist() == sorted(documents.tolist())
    assert len(documents.unique()) == documents.max() + 1 == min(n_windows, len(read_speeches()))
    whole = "\0".join(speech.text for speech in read_speeches()).encode()
    assert (text.windows[:, 0] == BOS_ID).all()
    assert all(bytes(window[1:]) in whole for window in text.windows.tolist()[:: n_windows // 3])


def test_less_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"--tokens 100 is no window of n_ctx = 128"):
        text_of_host(tiny_host("llama"), 100)
    with pytest.raises(ValueError, match=r"--tokens 100 is less than one sequence of 128"):
        text_of_sequences(tiny_host("llama"), torch.zeros(2, 128, dtype=torch.int64), 100)


def test_documents_of_packed_sequences_end_with_eos():
    ids = torch.tensor([[BOS_ID, 1, 2, EOS_ID, BOS_ID, 3], [BOS_ID, 4, EOS_ID, BOS_ID, 5, 6]])
    text = text_of_sequences(tiny_host("llama"), ids, 100)
    assert text.documents.tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 1, 2, 2, 2]]
    assert text.counted.tolist() == [[False, True, True, False, False, True], [False, True, False, False, True, True]]
    assert len(text_of_sequences(tiny_host("llama"), ids, 11).windows) == 1


def test_a_prompt_is_read_as_the_host_reads_it():
    text = prompt_of_host(tiny_host("llama"), "ab")
    assert text.windows.tolist() == [[BOS_ID, 97, 98]]
    assert text.counted.tolist() == [[False, True, True]]
    chat = prompt_of_host(tiny_host("llama", chat=True), "ab").windows[0].tolist()
    assert chat[0] == BOS_ID
    assert bytes(chat[1:-1]) == b"[user] ab"
    assert prompt_of_host(tiny_host("llama"), "a" * 500).windows.shape == (1, N_CTX)

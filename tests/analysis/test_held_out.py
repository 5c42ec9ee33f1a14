"""The held-out text of a run on disk."""

import pytest
import torch

from analysis.held_out import HELD_OUT, HeldOut, read_held_out, write_held_out

IDS = torch.arange(24).view(4, 6)


def test_there_and_back(tmp_path):
    write_held_out(tmp_path, HeldOut(IDS, "host", "abc"))
    found = read_held_out(tmp_path)
    assert torch.equal(found.input_ids, IDS)
    assert (found.host_name, found.host_fingerprint) == ("host", "abc")
    assert {p.name for p in tmp_path.iterdir()} == {HELD_OUT}


def test_a_text_agrees_with_its_beginning_and_with_no_other():
    whole, beginning = HeldOut(IDS, "host", "abc"), HeldOut(IDS[:2], "host", "abc")
    assert whole.agrees_with(beginning)
    assert beginning.agrees_with(whole)
    assert not whole.agrees_with(HeldOut(IDS.flip(0), "host", "abc"))
    assert not whole.agrees_with(HeldOut(IDS[:, :5], "host", "abc"))
    assert whole.digest() != beginning.digest()


def test_missing_and_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"has no {HELD_OUT}"):
        read_held_out(tmp_path)
    write_held_out(tmp_path, HeldOut(IDS, "host", "abc"))
    whole = (tmp_path / HELD_OUT).read_bytes()
    (tmp_path / HELD_OUT).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        read_held_out(tmp_path)

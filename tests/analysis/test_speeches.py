"""The labelled speeches: what is known of some, and that passages neither overlap nor leak their labels."""

import pytest

from analysis.speeches import LABELS, Speech, cut_passages, read_speeches


def speech(n_words: int) -> Speech:
    return Speech("s", 1950, "truman", "Democratic", "spoken", " ".join(f"w{i}" for i in range(n_words)))


def test_speeches_of_the_package():
    speeches = {s.name: s for s in read_speeches()}
    assert len(speeches) == 249
    kennedy, washington = speeches["1963-Kennedy-1"], speeches["1790-Washington-1"]
    assert (kennedy.president, kennedy.year, kennedy.party, kennedy.delivery) == (
        *("kennedy", 1963, "Democratic"),
        "spoken",
    )
    assert {label: ask(kennedy) for label, ask in LABELS.items()} == dict.fromkeys(LABELS, True)
    assert {label: ask(washington) for label, ask in LABELS.items()} == {
        "party": None,
        "century": False,
        "delivery": None,
    }
    assert "Mr. Speaker" in kennedy.text
    assert "As delivered in person" not in kennedy.text
    assert not any("[" in s.text and "]" in s.text.split("[", 1)[1] for s in speeches.values())


def test_passages_are_spread_and_do_not_overlap():
    passages = cut_passages([speech(105), speech(9)], n_words=10, per_speech=4)
    assert [p.text.split()[0] for p in passages] == ["w0", "w20", "w50", "w70"]
    assert all(len(p.text.split()) == 10 for p in passages)
    assert len(cut_passages([speech(35)], n_words=10, per_speech=8)) == 3


def test_bad_input():
    with pytest.raises(ValueError, match="none of the 1 speeches has 10 words"):
        cut_passages([speech(9)], n_words=10, per_speech=1)
    with pytest.raises(ValueError, match="must be 1 or more"):
        cut_passages([speech(9)], n_words=0, per_speech=1)

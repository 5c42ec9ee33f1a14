"""Geometry of dictionaries: exact by Walsh against every pair by hand, and against what is proved of each map."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.geometry import (
    family_products,
    nearest_atoms,
    spectrum_by_gram,
    spectrum_by_walsh,
    spectrum_figure,
)
from cayley_interp import CayleyDictionary
from molt_lens import Transcoder

SMALL = [(4, 6, "gold"), (4, 6, "bent"), (4, 7, "random"), (5, 8, "gold"), (5, 5, "gold"), (6, 9, "bent")]


@pytest.fixture(params=SMALL, ids=lambda args: "-".join(map(str, args)))
def dictionary(request):
    return CayleyDictionary(*request.param)


def all_atoms(dictionary):
    return dictionary.atoms(torch.arange(dictionary.size), torch.float64)


def test_by_walsh_is_every_pair_by_hand(dictionary):
    atoms, spectrum = all_atoms(dictionary), spectrum_by_walsh(dictionary)
    gram = atoms @ atoms.T
    others = gram[~torch.eye(len(gram), dtype=torch.bool)].abs()
    values, counts = others.mul(dictionary.d).round().unique(return_counts=True)
    assert spectrum.values.equal(values / dictionary.d)
    assert spectrum.counts.equal(counts)
    assert spectrum.coherence == pytest.approx(others.max().item(), abs=1e-12)
    assert spectrum.mean_square == pytest.approx(others.square().mean().item(), abs=1e-12)
    assert spectrum.frame_potential == pytest.approx(gram.square().sum().item())


def test_by_gram_has_the_same_figures(dictionary):
    exact = spectrum_by_walsh(dictionary)
    blocked = spectrum_by_gram(3 * all_atoms(dictionary), resolution=1 / dictionary.d)
    torch.testing.assert_close(blocked.values, exact.values)
    assert blocked.counts.equal(exact.counts)
    for figure in ("n_atoms", "d", "coherence", "mean_square", "frame_potential", "welch_coherence"):
        assert getattr(blocked, figure) == pytest.approx(getattr(exact, figure), abs=1e-12)
    assert blocked.share_above(0.3) == exact.share_above(0.3)


def test_blocks_do_not_matter(dictionary, monkeypatch):
    whole = spectrum_by_gram(all_atoms(dictionary))
    monkeypatch.setattr("analysis.geometry.BLOCK_BYTES", 3 * 8 * dictionary.size)
    parts = spectrum_by_gram(all_atoms(dictionary))
    assert parts.counts.equal(whole.counts)
    assert parts.coherence == pytest.approx(whole.coherence, abs=1e-12)


def test_every_cayley_dictionary_is_a_tight_frame_and_meets_the_welch_bound_in_the_mean(dictionary):
    spectrum = spectrum_by_walsh(dictionary)
    assert spectrum.frame_potential == pytest.approx(dictionary.size**2 / dictionary.d)
    assert spectrum.mean_square == pytest.approx(spectrum.welch_mean_square, abs=1e-12)
    assert spectrum.coherence >= spectrum.welch_coherence


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 30), d=st.integers(1, 12))
def test_no_dictionary_is_below_the_welch_bound(seed, n, d):
    W_dec = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spectrum = spectrum_by_gram(W_dec)
    assert spectrum.mean_square >= spectrum.welch_mean_square - 1e-12
    assert spectrum.coherence >= spectrum.welch_coherence - 1e-12
    assert int(spectrum.counts.sum()) == n * (n - 1)


def test_gold_bent_and_random_are_what_is_proved_of_them():
    """Gold at even t: three values up to 2^(t/2+1) / d; bent: unbiased bases, 0 within and 1/sqrt(d) between."""
    gold, bent, random = (spectrum_by_walsh(CayleyDictionary(6, 9, map)) for map in ("gold", "bent", "random"))
    assert set(gold.values.tolist()) <= {0.0, 1 / 8, 1 / 4}
    assert bent.values.tolist() == [0.0, 1 / 8]
    assert bent.counts.tolist() == [512 * 63, 512 * 448]
    assert bent.coherence < gold.coherence < random.coherence


def test_a_sample_counts_the_pairs_of_its_atoms():
    W_dec = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    whole, sample = spectrum_by_gram(W_dec), spectrum_by_gram(W_dec, sample=60)
    assert int(sample.counts.sum()) == 60 * 199
    assert sample.mean_square == whole.mean_square
    assert 0 < sample.coherence <= whole.coherence
    assert sample.share_above(0.3) == pytest.approx(whole.share_above(0.3), abs=0.02)


def test_an_orthonormal_basis_and_two_equal_atoms():
    basis = spectrum_by_gram(torch.eye(5))
    assert (basis.values.tolist(), basis.counts.tolist()) == ([0.0], [20])
    assert (basis.coherence, basis.mean_square, basis.welch_coherence, basis.frame_potential) == (0, 0, 0, 5)
    assert spectrum_by_gram(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])).coherence == 1


@pytest.mark.parametrize("kind", ["parents", "siblings"])
def test_families_by_hand(dictionary, kind):
    if dictionary.n == dictionary.t:
        with pytest.raises(ValueError, match=r"parents of CayleyDictionary.* have n from \d+ to \d+, got n_parent = 5"):
            family_products(dictionary, dictionary.t)
        return
    n_parent = dictionary.n - 1 if dictionary.n > dictionary.t + 1 else dictionary.t
    atoms, leaves = all_atoms(dictionary), torch.arange(dictionary.size)
    parents = dictionary.parent(leaves, n_parent)
    if kind == "parents":
        pairs = torch.stack([leaves, parents], 1)[leaves != parents]
    else:
        pairs = ((parents[:, None] == parents) & (leaves[:, None] != leaves)).nonzero()
    by_hand = (atoms[pairs[:, 0]] * atoms[pairs[:, 1]]).sum(-1)
    family = family_products(dictionary, n_parent)
    assert family.largest == pytest.approx(by_hand.abs().max().item(), abs=1e-12)
    assert family.mean == pytest.approx(by_hand.mean().item(), abs=1e-12)
    assert family.mean_square == pytest.approx(by_hand.square().mean().item(), abs=1e-12)
    repeated = family.by_difference.repeat_interleave(len(by_hand) // len(family.by_difference))
    torch.testing.assert_close(repeated.sort().values, by_hand.sort().values)


def test_families_of_gold_are_orthogonal_where_cubing_is_a_permutation():
    """x^3 permutes GF(2^t) for odd t, so every sum of signs (-1)^<b, x^3> is 0; at even t it does not."""
    assert family_products(CayleyDictionary(7, 14), 7).largest == 0
    assert family_products(CayleyDictionary(6, 12), 6).largest > 0
    bent = family_products(CayleyDictionary(6, 9, "bent"), 6)
    assert bent.by_difference.unique().tolist() == [1 / 8]


def test_nearest_atoms_by_walsh_and_by_product(dictionary):
    atoms = all_atoms(dictionary)
    for u in (0, 3, dictionary.size - 1):
        exact, product = nearest_atoms(dictionary, u, k=7), nearest_atoms(5 * atoms, u, k=7)
        assert u not in exact.indices
        torch.testing.assert_close(exact.inner_products, atoms[exact.indices] @ atoms[u])
        torch.testing.assert_close(exact.inner_products.abs(), product.inner_products.abs())
    torch.testing.assert_close(exact.inner_products.abs().max().item(), dictionary.coherence())


def test_nearest_of_equally_near_atoms_come_by_index():
    assert nearest_atoms(CayleyDictionary(4, 6, "bent"), 0, k=3).indices.tolist() == [16, 17, 18]


def test_a_transcoder_has_a_geometry():
    transcoder = Transcoder(8, 8, n_features=40, gate="topk:4")
    assert spectrum_by_gram(transcoder.W_dec).n_atoms == 40
    assert not nearest_atoms(transcoder.W_dec, 0).inner_products.requires_grad


def test_bad_dictionaries_are_refused():
    W_dec = torch.eye(4)
    with pytest.raises(ValueError, match="1 of 4 rows of W_dec are 0 or not finite, the first of them row 2"):
        spectrum_by_gram(W_dec * (torch.arange(4) != 2)[:, None])
    with pytest.raises(ValueError, match="no pairs"):
        spectrum_by_gram(W_dec[:1])
    with pytest.raises(ValueError, match="sample = 5: expected 1 to 4"):
        spectrum_by_gram(W_dec, sample=5)
    with pytest.raises(ValueError, match="resolution = 0"):
        spectrum_by_gram(W_dec, resolution=0.0)
    with pytest.raises(IndexError, match="from 0 to 63, got 64"):
        nearest_atoms(CayleyDictionary(4, 6), 64)
    with pytest.raises(ValueError, match="k = 4: expected 1 to 3"):
        nearest_atoms(W_dec, 0, k=4)


def test_the_figure_ends_each_line_at_the_coherence():
    spectra = {map: spectrum_by_walsh(CayleyDictionary(6, 9, map)) for map in ("gold", "bent", "random")}
    drawn = json.loads(spectrum_figure(spectra).to_json())
    assert [trace["name"] for trace in drawn["data"]] == list(spectra)
    for trace, spectrum in zip(spectrum_figure(spectra).data, spectra.values(), strict=True):
        assert (trace.x[-1], trace.y[0]) == (spectrum.coherence, 1)
        assert trace.y[-1] == pytest.approx(int(spectrum.counts[-1]) / (512 * 511))
    assert len(drawn["layout"]["shapes"]) == 1  # one Welch bound, of all three

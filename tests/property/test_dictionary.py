"""CayleyDictionary: its geometry is one Walsh transform, its levels are nested, its parents a homomorphism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cayley_interp import CayleyDictionary
from cayley_interp.dictionary import max_bits

MAPS = ("gold", "bent", "random")
FROZEN_RANDOM = [144, 161, 66, 195, 116, 181, 214, 71, 56, 233, 138, 251, 252, 93, 206, 175]
SMALL = [(4, 6, "gold"), (4, 6, "bent"), (4, 7, "random"), (5, 8, "gold"), (5, 13, "gold"), (6, 9, "bent")]


@pytest.fixture(params=SMALL, ids=lambda args: "-".join(map(str, args)))
def dictionary(request):
    return CayleyDictionary(*request.param)


def all_atoms(dictionary):
    return dictionary.atoms(torch.arange(dictionary.size), torch.float64)


def test_atoms_are_the_definition():
    dictionary = CayleyDictionary(4, 7, "gold")
    for u in (0, 1, 5, 77, 127):
        for x in range(16):
            bits = bin(u & int(dictionary.generators[x])).count("1")
            assert dictionary.atoms(torch.tensor([u]))[0, x] == (-1) ** bits / 4


def test_generators_are_coordinate_then_power(dictionary):
    assert torch.equal(dictionary.generators & (dictionary.d - 1), torch.arange(dictionary.d))
    assert dictionary.generators.max() < dictionary.size


def test_first_level_is_the_orthonormal_walsh_basis(dictionary):
    basis = dictionary.atoms(torch.arange(dictionary.d), torch.float64)
    torch.testing.assert_close(basis @ basis.T, torch.eye(dictionary.d, dtype=torch.float64))


def test_every_coset_is_an_orthonormal_basis_and_the_whole_a_tight_frame(dictionary):
    atoms = all_atoms(dictionary)
    eye = torch.eye(dictionary.d, dtype=torch.float64)
    for basis in atoms.view(-1, dictionary.d, dictionary.d):
        torch.testing.assert_close(basis @ basis.T, eye)
    torch.testing.assert_close(atoms.T @ atoms, eye * dictionary.size / dictionary.d)


def test_the_gram_matrix_is_the_spectrum_at_u_xor_v(dictionary):
    atoms, u = all_atoms(dictionary), torch.arange(dictionary.size)
    torch.testing.assert_close(atoms @ atoms.T, dictionary.spectrum()[u[:, None] ^ u[None, :]])


def test_scores_by_one_transform_equal_the_dense_product(dictionary):
    x = torch.randn(2, 3, dictionary.d, dtype=torch.float64)
    torch.testing.assert_close(dictionary.scores(x), x @ all_atoms(dictionary).T)


def test_moments_of_every_score_equal_those_of_the_scores(dictionary):
    x = torch.randn(500, dictionary.d, dtype=torch.float64) @ torch.randn(dictionary.d, dictionary.d).double() + 1
    mean, variance = dictionary.moments(x.mean(0), torch.cov(x.T, correction=0))
    scores = dictionary.scores(x)
    torch.testing.assert_close(mean, scores.mean(0))
    torch.testing.assert_close(variance, scores.var(0, correction=0))


def test_levels_are_nested(dictionary):
    coarse = CayleyDictionary(dictionary.t, dictionary.n - 1, dictionary.map)
    u = torch.arange(coarse.size)
    assert torch.equal(coarse.atoms(u), dictionary.atoms(u))


@pytest.mark.parametrize(
    ("t", "n", "map", "coherence"),
    [(10, 15, "gold", 1 / 16), (10, 15, "bent", 1 / 32), (11, 15, "gold", 1 / 32), (11, 17, "gold", 1 / 32)],
)
def test_published_shapes_have_the_coherence_of_the_theory(t, n, map, coherence):
    assert CayleyDictionary(t, n, map).coherence() == pytest.approx(coherence, abs=1e-12)


@pytest.mark.parametrize("t", [4, 6, 8, 10, 12])
def test_bent_is_a_set_of_mutually_unbiased_bases(t):
    dictionary = CayleyDictionary(t, 3 * t // 2, "bent")
    across = dictionary.spectrum()[dictionary.d :].abs()
    torch.testing.assert_close(across, torch.full_like(across, 2 ** (-t / 2)))
    assert dictionary.spectrum()[1 : dictionary.d].abs().max() < 1e-12


@pytest.mark.parametrize("t", [5, 7, 9])
def test_gold_at_odd_t_is_almost_bent(t):
    assert CayleyDictionary(t, 2 * t, "gold").coherence() == pytest.approx(2 ** ((1 - t) / 2), abs=1e-12)


def test_random_is_worse_than_gold_and_fixed_by_its_seed():
    a, b, c = (CayleyDictionary(10, 15, "random", seed) for seed in (0, 0, 1))
    assert torch.equal(a.generators, b.generators)
    assert not torch.equal(a.generators, c.generators)
    assert a.coherence() > 1.5 * CayleyDictionary(10, 15, "gold").coherence()


def test_random_signs_are_the_same_for_ever():
    # A checkpoint names its dictionary by the seed alone.
    assert CayleyDictionary(4, 8, "random", 7).generators.tolist() == FROZEN_RANDOM


@given(st.sampled_from(MAPS), st.integers(0, 2**20), st.integers(0, 2**20))
def test_parent_is_a_homomorphism_and_children_its_fibres(map, u, v):
    child, parent = CayleyDictionary(6, 9, map), CayleyDictionary(6, 7, map)
    a, b = torch.tensor([u % 512]), torch.tensor([v % 512])
    assert torch.equal(child.parent(a ^ b, 7), child.parent(a, 7) ^ child.parent(b, 7))
    children = parent.children(child.parent(a, 7), 9)
    assert children.shape == (1, 4)
    assert a in children
    assert set(child.parent(children, 7).flatten().tolist()) == {a.item() & 127}


def test_the_children_of_all_parents_are_all_leaves():
    parent = CayleyDictionary(5, 7)
    children = parent.children(torch.arange(parent.size), 9)
    assert sorted(children.flatten().tolist()) == list(range(512))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((1, 2, "gold"), "must be 2..16, got 1"),
        ((17, 18, "gold"), "must be 2..16, got 17"),
        ((7, 9, "bent"), "even t, got t = 7"),
        ((6, 5, "gold"), "n from 6 to 18, got n = 5"),
        ((6, 19, "gold"), "n from 6 to 18, got n = 19"),
        ((6, 10, "bent"), "n from 6 to 9, got n = 10"),
    ],
)
def test_dictionaries_that_do_not_exist_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        CayleyDictionary(*args)


def test_indices_outside_are_refused(dictionary):
    for bad in (-1, dictionary.size):
        with pytest.raises(IndexError, match="run from 0 to"):
            dictionary.atoms(torch.tensor([0, bad]))
    with pytest.raises(ValueError, match="a parent level"):
        dictionary.parent(torch.tensor([0]), dictionary.t - 1)
    with pytest.raises(ValueError, match="a child level"):
        dictionary.children(torch.tensor([0]), max_bits(dictionary.t, dictionary.map) + 1)

"""Estimates by random probes, against full Jacobians."""

import pytest
import torch

from analysis.jacobian_probes import estimate_jacobian_faithfulness
from molt_lens.hosts import Site
from tests.analysis.autograd_jacobians import figures, function_of, host_of, inputs, jacobian


@pytest.fixture(scope="module")
def case():
    """Two MLPs of one host that share a part, so that the cosine is neither 0 nor 1."""
    host = host_of("qwen3")
    x = inputs(host, Site(1), tokens=40)
    one, two = function_of(host, Site(0)), function_of(host, Site(1))

    def mixed(x):
        return one(x) + 0.7 * two(x)

    return one, mixed, x, figures(jacobian(one, x), jacobian(mixed, x))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_within_the_standard_error_it_claims(case, distribution):
    one, mixed, x, expected = case
    found = estimate_jacobian_faithfulness(one, mixed, x, probes=256, distribution=distribution)
    deviations = (found.cosine - expected["cosine"]) / found.cosine_error
    assert deviations.abs().max() < 4
    assert 0.7 < deviations.square().mean().sqrt() < 1.4
    assert abs(found.mean_cosine - expected["cosine"].mean()) < 3 * found.mean_cosine_error
    torch.testing.assert_close(found.norm_ratio, expected["norm_ratio"], rtol=0.2, atol=0)
    torch.testing.assert_close(found.relative_error, expected["relative_error"], rtol=0.2, atol=0)


def test_the_error_falls_with_the_root_of_the_probes(case):
    one, mixed, x, expected = case

    def errors(probes):
        found = estimate_jacobian_faithfulness(one, mixed, x, probes=probes, seed=3)
        return (found.cosine - expected["cosine"]).square().mean().sqrt(), found.cosine_error.mean()

    (few, claimed_few), (many, claimed_many) = errors(32), errors(512)
    assert few / many == pytest.approx(4, rel=0.4)
    assert claimed_few / claimed_many == pytest.approx(4, rel=0.2)


def test_a_function_and_itself_scaled(case):
    one, _, x, _ = case
    found = estimate_jacobian_faithfulness(one, lambda x: 3 * one(x), x, probes=2)
    torch.testing.assert_close(found.cosine, torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(found.norm_ratio, torch.full((40,), 3.0, dtype=torch.float64))
    assert found.cosine_error.max() < 1e-12


def test_a_seed_gives_its_figures_again(case):
    one, mixed, x, _ = case
    first, again, other = (estimate_jacobian_faithfulness(one, mixed, x, probes=4, seed=s).cosine for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_errors(case):
    one, mixed, x, _ = case
    with pytest.raises(ValueError, match="probes must be 2 or more"):
        estimate_jacobian_faithfulness(one, mixed, x, probes=1)
    with pytest.raises(ValueError, match="finite inputs at one token or more"):
        estimate_jacobian_faithfulness(one, mixed, x[:0])
    with pytest.raises(ValueError, match="finite inputs"):
        estimate_jacobian_faithfulness(one, mixed, x / 0)
    with pytest.raises(ValueError, match=r"the functions disagree: outputs are \(40, 32\) and \(40, 3\)"):
        estimate_jacobian_faithfulness(one, lambda x: x[:, :3], x)

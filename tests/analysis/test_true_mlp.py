"""The weights of every family's MLP, against the host's own modules."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from analysis.true_mlp import read_true_mlp, with_slope
from molt_lens.hosts import Site, load_host
from tests.analysis.autograd_jacobians import IDS, cayley_host, host_of, inputs
from tests.molt_lens.host_models import FAMILIES, tiny_model

SITES = [
    *((family, Site(1)) for family in FAMILIES),
    *((family, Site(0, input="pre_norm_in")) for family in FAMILIES),
    ("gemma3", Site(1, target="post_norm_out")),
    ("cayley", Site(1)),
    ("cayley", Site(1, input="pre_norm_in")),
]


@pytest.mark.parametrize(("family", "site"), SITES, ids=str)
def test_the_output_is_what_the_host_captures(family, site):
    host = cayley_host() if family == "cayley" else host_of(family)
    x, y = host.capture(site, IDS)
    mlp = read_true_mlp(host, site)
    # transformers' RMSNorms compute in float32.
    torch.testing.assert_close(mlp.trace(x.flatten(0, 1)).y, y.flatten(0, 1), rtol=1e-5, atol=1e-5)
    mlp.check(host, site, x.flatten(0, 1))


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu"])
def test_slopes_of_every_activation(name):
    z = torch.randn(50, dtype=torch.float64)
    value, slope = with_slope(ACT2FN[name], z)
    torch.testing.assert_close(value, ACT2FN[name](z))
    leaf = z.clone().requires_grad_()
    expected = torch.autograd.grad(ACT2FN[name](leaf).sum(), leaf)[0]
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_a_copy_in_the_dtype_asked_for(dtype):
    host = load_host(tiny_model("gpt2", 2), dtype=torch.float64)
    x = torch.randn(3, 32, dtype=dtype)
    mlp = read_true_mlp(host, Site(1, input="pre_norm_in"), dtype)
    before = mlp.trace(x).y
    assert before.dtype == dtype
    for parameter in host.model.parameters():
        parameter.zero_()
    torch.testing.assert_close(mlp.trace(x).y, before)


def test_an_mlp_that_does_more_than_its_weights_say_is_refused():
    host, site = host_of("llama"), Site(1)
    x = inputs(host, site)
    block = host.model.get_submodule("model.layers.1")

    class Doubled(type(block.mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = copy.copy(block.mlp)
    doubled.__class__ = Doubled
    block.mlp = doubled
    with pytest.raises(
        ValueError, match=r"the weights read from Site.* its Doubled does something that is not known here"
    ):
        read_true_mlp(host, site).check(host, site, x)


def test_an_mlp_without_known_weights_is_refused():
    host = host_of("llama")
    host.model.get_submodule("model.layers.1").mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"the Identity at Site.* has none of the known sets of weights"):
        read_true_mlp(host, Site(1))

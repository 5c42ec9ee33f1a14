"""Hosts and replacements by name, as a command line gives them."""

import pytest
import torch

from analysis.hosts import open_host, open_replacements
from cayley_interp import CayleyGPT
from molt_lens import LinearMap, Replacement
from molt_lens.folder import save_replacement
from molt_lens.hosts import Site
from tests.molt_lens.host_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a transformers model."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_packaged_cayley_gpt_keeps_its_name():
    host = open_host("vanilla-tiny-sotu", dtype=torch.float64)
    assert isinstance(host.model, CayleyGPT)
    assert (host.name, host.dtype) == ("vanilla-tiny-sotu", torch.float64)


def test_replacements_come_with_their_sites(folder, tmp_path):
    host = open_host(str(folder))
    made = Replacement(LinearMap(32, 32)).eval()
    for layer in (0, 2):
        save_replacement(made, tmp_path / f"{layer}", host=host, site=Site(layer))
    names = (str(tmp_path / "0"), str(tmp_path / "2"))
    opened = open_replacements(names, host)
    assert list(opened) == [Site(0), Site(2)]
    x = torch.randn(3, 32)
    assert all(replacement(x).equal(made(x)) for replacement in opened.values())
    with pytest.raises(ValueError, match="the second replacement of layer 0"):
        open_replacements((*names, names[0]), host)
    with pytest.raises(ValueError, match="has other weights"):
        open_replacements(names, open_host("vanilla-tiny-sotu"))

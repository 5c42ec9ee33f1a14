"""Cases of the bottleneck's kernels, run by test_kernels.py: the layer against its torch path, adjoints."""

import os

import pytest
import torch

from cayley_interp import CayleyDictionary, CayleySAE, CayleySAEConfig
from cayley_interp.kernels import atoms, selection, set_backend
from cayley_interp.sign_tables import child_tables

DEVICE = os.environ["KERNEL_DEVICE"]
LAYERS = [
    ("6,4,0;9,8,2", {}),
    ("6,4,0;9,8,64", {"signed": True}),
    ("6,4,0;9,8,6", {"routing": "parents"}),
    ("6,4,0;8,6,3;10,8,2", {}),
    ("6,4,0;8,6,3;10,8,2", {"routing": "parents", "signed": True}),
    ("6,5,0;9,8,3", {"dictionary": "bent"}),
    ("6,4,0;9,8,2", {"score_standardize": "token"}),
    ("6,4,0;9,8,2", {"score_standardize": "none", "forward_standardized": False}),
    ("10,16,0;15,32,256", {}),
    ("3,2,0;5,3,2", {}),
]


@pytest.fixture(autouse=True)
def backend_of_others():
    yield
    set_backend("auto")


def layer(levels: str, options: dict) -> tuple[CayleySAE, torch.Tensor]:
    torch.manual_seed(0)
    sae = CayleySAE(CayleySAEConfig(d_model=2 ** int(levels.split(",")[0]), levels=levels, **options))
    with torch.no_grad():
        sae.mean.normal_()
        sae.std.uniform_(0.5, 2)
        sae.bias.normal_(std=0.3)
    x = torch.randn(2 if levels.startswith("10") else 5, sae.config.d_model)
    return sae.to(DEVICE), x.to(DEVICE)


@pytest.mark.parametrize(("levels", "options"), LAYERS, ids=lambda case: str(case))
def test_the_layer_is_that_of_torch_values_and_all_gradients(levels, options):
    sae, x = layer(levels, options)
    seen = {}
    for backend in ("torch", "triton"):
        set_backend(backend)
        z = x.clone().requires_grad_()
        sae.zero_grad()
        codes = sae.encode(z)
        y = sae.decode(codes)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)).sum().backward()
        dense = [acts.detach() for acts in sae.to_dense(codes)]
        grads = [g.clone() for g in (z.grad, sae.bias.grad) if g is not None]
        seen[backend] = ([c.indices.sort(-1).values for c in codes], dense, y.detach(), grads)
    (indices, *floats), (found_indices, *found_floats) = seen["torch"], seen["triton"]
    assert all(map(torch.equal, indices, found_indices))
    torch.testing.assert_close(found_floats, floats, rtol=1e-5, atol=1e-5)


def test_analysis_and_synthesis_are_adjoint_and_of_the_atoms():
    dictionary = CayleyDictionary(t=5, n=9)
    s = dictionary.generators.to(DEVICE, torch.int32)
    u = torch.randint(2**9, (7, 6)).to(DEVICE)
    x, f = torch.randn(7, 32).to(DEVICE), torch.randn(7, 6).to(DEVICE)
    rows = dictionary.atoms(u.cpu().flatten()).view(7, 6, 32).to(DEVICE)
    scores, total = atoms.analyse(x, u, s), atoms.synthesise(u, f, s)
    torch.testing.assert_close(scores, (rows @ x[..., None])[..., 0])
    torch.testing.assert_close(total, (f[:, None] @ rows)[:, 0])
    torch.testing.assert_close((scores * f).sum(), (x * total).sum())


def test_no_tokens_are_no_work():
    sae, x = layer("3,2,0;5,3,2", {})
    set_backend("triton")
    assert sae(x[:0]).shape == (0, 8)


def test_candidates_beyond_registers_go_to_torch(monkeypatch):
    sae, x = layer("6,4,0;9,8,2", {})
    monkeypatch.setattr(selection, "MOST_CANDIDATES", 16)
    monkeypatch.setattr(selection, "children", None)
    set_backend("triton")
    assert sae.encode(x)[1].indices.shape == (5, 8)


def test_the_registrations_are_sound():
    sae, x = layer("6,4,0;9,8,2", {})
    tables, by_bucket = sae._tables(1, x), child_tables(sae.dictionary, 6, 9, x.device, x.dtype)
    standardisers = [sae._standardiser(i, x) for i in (0, 1)]
    parents, _, _ = selection.root(x, *standardisers[0], 4, 0, False)
    signs = tables.generators, by_bucket.buckets
    calls = {
        selection.root: (x, *standardisers[0], 4, 6, False),
        selection.children: (x, parents, 6, *signs, *standardisers[1], 8, 2, 3, False),
        atoms.analyse: (x, parents, tables.generators),
        atoms.synthesise: (parents, torch.rand(parents.shape, device=DEVICE), tables.generators),
    }
    for operation, arguments in calls.items():
        found = torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}

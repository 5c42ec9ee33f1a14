"""CayleySAE against its definition with every atom built: values and gradients under every convention."""

from itertools import product

import pytest
import torch

from cayley_interp import CayleySAE, CayleySAEConfig, Level, parse_levels, routing
from cayley_interp.chunks import CHUNK_BYTES
from cayley_interp.reference import reference_codes, reference_forward
from cayley_interp.sign_tables import child_tables

CONVENTIONS = list(
    product(
        ["per_parent", "parents"],
        ["feature", "token", "none"],
        [True, False],
        [True, False],
        ["4,3,0;7,5,6", "4,3,0;6,4,3;7,5,9"],
        ["gold", "random"],
    )
)


def make(levels="4,3,0;7,5,6", d_model=16, seed=0, **options) -> CayleySAE:
    """A bottleneck in float64 with statistics and biases that are not their initial values."""
    g = torch.Generator().manual_seed(seed)
    sae = CayleySAE(CayleySAEConfig(d_model=d_model, levels=levels, **options)).double().eval()
    sae.mean.copy_(0.1 * torch.randn(sae.d_sae, generator=g))
    sae.std.copy_(0.5 + torch.rand(sae.d_sae, generator=g))
    sae.bias.data.copy_(0.1 * torch.randn(sae.d_sae, generator=g))
    return sae


def inputs(n=32, d=16, seed=0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: "-".join(map(str, c)))
def test_values_and_gradients_equal_the_definition(convention):
    routing, standardize, forward_standardized, signed, levels, dictionary = convention
    sae = make(
        levels,
        routing=routing,
        score_standardize=standardize,
        forward_standardized=forward_standardized,
        signed=signed,
        dictionary=dictionary,
    )
    x = inputs().requires_grad_()
    fast, slow = sae(x), reference_forward(sae, x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    wanted = [x, sae.bias] if forward_standardized else [x]
    grad = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, wanted, grad), torch.autograd.grad(slow, wanted, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("standardize", ["feature", "token", "none"])
def test_gradcheck(standardize):
    sae = make(score_standardize=standardize)
    x = inputs(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, _: sae(x), (x, sae.bias))


@pytest.mark.parametrize("routing_name", ["per_parent", "parents"])
def test_codes_are_the_active_features_and_decode_is_their_sum(routing_name):
    sae = make("4,3,0;6,4,3;7,5,9", routing=routing_name)
    x = inputs()
    codes = sae.encode(x)
    for (indices, values), dense, level in zip(codes, reference_codes(sae, x), sae.levels, strict=True):
        assert indices.shape == values.shape == (32, level.k)
        scattered = torch.zeros_like(dense).scatter(-1, indices, values)
        torch.testing.assert_close(scattered, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(sae.decode(codes), sae(x))


def test_per_parent_leaves_are_children_of_active_parents():
    sae = make("5,4,0;8,6,8", d_model=32)
    parents, leaves = (c.indices for c in sae.encode(inputs(d=32)))
    assert (leaves[:, :, None] % 32 == parents[:, None, :]).any(-1).all()


def test_per_parent_budget_caps_the_children_of_each_parent():
    sae = make("5,4,0;8,6,2", d_model=32)
    _, leaves = (c.indices for c in sae.encode(inputs(d=32)))
    for row in (leaves % 32).tolist():
        assert max(row.count(parent) for parent in row) <= 2


@pytest.mark.parametrize("n_open", [1, 4, 16])
@pytest.mark.parametrize("t", [4, 5])  # where sqrt(d) is a whole number, and where it has to be rounded
def test_both_ways_of_scoring_children_agree(t, n_open):
    sae = make(f"{t},3,0;{t + 2},4,3;{t + 4},5,9", d_model=2**t, routing="parents")
    x = inputs(d=2**t)
    for n_parent, size, level in ((t, 2**t, 1), (t + 2, 2 ** (t + 2), 2)):
        tables = sae._tables(level, x)
        parents = torch.stack([torch.randperm(size)[:n_open] for _ in x])
        own = child_tables(sae.dictionary, n_parent, sae.levels[level].n, x.device, x.dtype)
        by_bucket = routing.child_scores_by_bucket(x, parents, own)
        by_transform = routing.child_scores_by_transform(x, parents, n_parent, tables)
        torch.testing.assert_close(by_bucket, by_transform, rtol=0, atol=1e-13)
        children = parents[:, :, None] | torch.arange(1 << (sae.levels[level].n - n_parent)) << n_parent
        dense = (x @ sae.dictionary.atoms(children.flatten(), torch.float64).T).view(32, *children.shape)
        torch.testing.assert_close(by_bucket, dense[torch.arange(32), torch.arange(32)], rtol=0, atol=1e-13)


def test_batches_of_any_shape_and_any_chunk(monkeypatch):
    sae, x = make(), inputs(24)
    whole = sae(x)
    torch.testing.assert_close(sae(x.view(2, 3, 4, 16)).view(24, 16), whole)
    torch.testing.assert_close(torch.cat([sae(part) for part in x.split(5)]), whole)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 1)
    torch.testing.assert_close(sae(x), whole)
    assert sae(x[0]).shape == (16,)


def test_statistics_are_those_of_all_scores():
    sae = make().train()
    sae.mean.zero_(), sae.std.fill_(1)
    x = inputs(200) @ torch.randn(16, 16, dtype=torch.float64) + 0.5
    for batch in x.split(50):
        sae(batch)
    assert sae.mean.abs().max() == 0  # nothing moves within a step
    sae.update_statistics()
    scores = [x @ sae.dictionary.atoms(torch.arange(1 << level.n), torch.float64).T for level in sae.levels]
    torch.testing.assert_close(sae.mean, torch.cat([s.mean(0) for s in scores]))
    torch.testing.assert_close(sae.std, torch.cat([s.std(0, correction=0) for s in scores]))


def test_running_average_is_plain_at_first_then_exponential():
    sae = make(momentum=0.25).train()
    means = []
    for i in range(8):
        x = inputs(50, seed=i) + i
        sae(x)
        sae.update_statistics()
        means.append(
            torch.cat([x.mean(0) @ sae.dictionary.atoms(torch.arange(1 << level.n), x.dtype).T for level in sae.levels])
        )
        if i == 3:
            torch.testing.assert_close(sae.mean, torch.stack(means).mean(0))
            average = sae.mean.clone()
    for mean in means[4:]:
        average = 0.75 * average + 0.25 * mean
    torch.testing.assert_close(sae.mean, average)


def test_standardised_scores_have_unit_variance_after_training():
    sae = make().train()
    x = inputs(2000) * torch.linspace(0.1, 3, 16, dtype=torch.float64) + 1
    sae(x)
    sae.update_statistics()
    z = (x @ sae.dictionary.atoms(torch.arange(128), torch.float64).T - sae.mean[16:]) / sae.std[16:]
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(128, dtype=torch.float64))


def test_evaluation_moves_nothing():
    sae = make()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae(inputs())
    sae.update_statistics()
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_dead_counter_counts_tokens_since_a_feature_was_active():
    sae = make().train()
    sae(inputs(10))
    codes = sae.encode(inputs(10))
    sae.update_statistics()
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for (indices, values), offset in zip(codes, sae.offsets, strict=True):
        fired[offset + indices[values != 0]] = True
    assert torch.equal(sae.tokens_since_active == 0, fired)
    assert (sae.tokens_since_active[~fired] == 10).all()


def test_a_silent_feature_is_raised_until_it_is_active_again():
    sae = make(revive_after=100).train()
    sae.bias.data[20] = -50.0
    before = sae.bias.detach().clone()
    sae(inputs(90))
    sae.update_statistics()
    assert torch.equal(sae.bias, before)  # nothing has been silent for 100 tokens yet
    for seed in range(1, 700):
        sae(inputs(90, seed=seed))
        sae.update_statistics()
        if sae.tokens_since_active[20] == 0:
            break
    assert sae.tokens_since_active[20] == 0
    raised = sae.bias[20].item()
    assert raised > -10
    sae(inputs(90, seed=seed))
    sae.update_statistics()
    assert sae.bias[20].item() == pytest.approx(raised, abs=0.02)
    # Raised against the rest of its level: features in use keep their differences, and the mean stays where it was.
    level = slice(sae.offsets[1], None)
    for part in (slice(0, 16), level):
        assert sae.bias[part].mean().item() == pytest.approx(before[part].mean().item(), abs=1e-4)


def test_revival_changes_no_selection_among_the_features_in_use():
    # Every bias of a level may move by the same: what is added to all of them is drift, and it would go forward.
    sae = make(revive_after=1).train()
    with torch.no_grad():
        sae.bias[sae.offsets[1] :] = torch.linspace(-1, 1, sae.d_sae - sae.offsets[1])
    before = sae.bias.detach().clone()
    sae(inputs(2))
    sae.update_statistics()
    moved = sae.bias.detach() - before
    for part in (slice(0, sae.offsets[1]), slice(sae.offsets[1], None)):
        in_use, silent = moved[part].round(decimals=9).unique().tolist()
        assert silent - in_use == pytest.approx(0.1, abs=1e-8)
        assert abs(moved[part].mean().item()) < 1e-9


def test_raw_forward_leaves_the_bias_out_of_the_gradient():
    # The bias then takes part in selection alone; a parameter without a gradient would stall distributed training.
    assert not make(forward_standardized=False).bias.requires_grad
    assert make().bias.requires_grad


def test_low_precision_inputs_come_back_in_their_type():
    sae = make().float()
    out = sae(inputs().bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, sae(inputs().bfloat16().float()).bfloat16())


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"d_model=16, got an input of shape \(3, 8\)"):
        make()(torch.zeros(3, 8))


def test_levels_as_published():
    assert parse_levels("10,16,0;15,32,256") == (Level(10, 16, 0), Level(15, 32, 256))


@pytest.mark.parametrize("levels", ["", "10", "10,16", "10,16,0;", "a,b,c", "10,16,0,1"])
def test_malformed_levels_show_the_form(levels):
    with pytest.raises(ValueError, match=r'levels are written "n,k,budget'):
        parse_levels(levels)

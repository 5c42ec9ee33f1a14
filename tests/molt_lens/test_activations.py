"""The activation store: each kept token once an epoch, shuffled, resumable, bounded, cached and checked."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from molt_lens import activation_cache
from molt_lens.activations import ActivationStore, buffer_bytes, collect
from molt_lens.hosts import Site
from molt_lens.packing import keep_mask, pack_documents
from molt_lens.standardize import Standardizer
from tests.molt_lens.host_models import tiny_host, tiny_text

SITE = Site(1, target="post_norm_out")
CTX, BATCH, BUFFER = 24, 20, 413
TEXTS = [tiny_text(40 + 20 * i, seed=i) for i in range(10)]
N_TOKENS = 1250
"""Kept tokens in TEXTS, but for a few."""


def sequences(host):
    return lambda: pack_documents(TEXTS, host, CTX)


def make_store(host, **changed) -> ActivationStore:
    """An epoch of four chunks, none of them a whole number of batches."""
    settings: dict[str, Any] = {"tokens": None, "batch_size": BATCH, "seed": 0, "buffer_tokens": BUFFER}
    settings |= {"dtype": torch.float32, "batch_sequences": 4}
    return ActivationStore(host, SITE, sequences(host), **settings | changed)


@pytest.fixture(scope="module")
def host():
    return tiny_host()


@pytest.fixture
def passes(host, monkeypatch):
    """The ids of each forward pass."""
    seen = []
    capture = type(host).capture
    monkeypatch.setattr(
        type(host), "capture", lambda self, site, ids: (seen.append(ids.tolist()), capture(self, site, ids))[1]
    )
    return seen


@pytest.fixture(scope="module")
def reference(host):
    """x and y of every kept token in the text's order, each sequence by itself."""
    pairs = []
    for ids in sequences(host)():
        x, y = host.capture(SITE, ids[None])
        pairs.append((x[0][keep_mask(host, ids)], y[0][keep_mask(host, ids)]))
    return tuple(torch.cat(part) for part in zip(*pairs, strict=True))


def served(store) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*store, strict=True)
    return torch.cat(x), torch.cat(y)


def places(rows: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Which row of `among` each row is, the first of those it equals: after a BOS, the same byte has the same acts."""
    distances = torch.cdist(rows, among, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(1).values.max() < 1e-4
    return (distances < 1e-4).int().argmax(1).tolist()


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) for one, other in zip(a, b, strict=True) for p, q in zip(one, other, strict=True)
    )


def test_every_kept_token_is_served_once_with_its_own_target(host, reference):
    x, y = served(make_store(host))
    order = places(x, reference[0])
    torch.testing.assert_close(y, reference[1][order], rtol=0, atol=1e-5)
    # All but those at the end of the last chunk's order, which fill no batch.
    unserved = Counter(places(reference[0], reference[0])) - Counter(order)
    assert len(order) == len(reference[0]) // BATCH * BATCH > 3 * BUFFER
    assert unserved.total() == len(reference[0]) % BATCH > 0


@pytest.mark.parametrize(("batch_size", "buffer_tokens"), [(7, 103), (111, 300), (96, 192), (1, 97)])
def test_no_token_is_lost_whatever_the_sizes(host, reference, batch_size, buffer_tokens):
    x, _ = served(make_store(host, tokens=700, batch_size=batch_size, buffer_tokens=buffer_tokens))
    reference = reference[0][:700]
    unserved = Counter(places(reference, reference)) - Counter(places(x, reference))
    assert len(x) == 700 // batch_size * batch_size
    assert unserved.total() == 700 % batch_size


def test_a_batch_mixes_tokens_of_the_whole_chunk(host, reference):
    batches = [places(x, reference[0]) for x, _ in make_store(host)]
    assert all(max(batch) - min(batch) > BUFFER / 2 for batch in batches[:17])
    assert batches[0] != sorted(batches[0])
    assert max(max(batch) for batch in batches[:17]) < BUFFER


def test_the_seed_and_the_epoch_decide_the_order(host):
    assert same(list(make_store(host)), list(make_store(host)))
    assert not torch.equal(next(iter(make_store(host)))[0], next(iter(make_store(host, seed=1)))[0])


@pytest.mark.parametrize(("buffer_tokens", "forwards"), [(BUFFER, 2), (10_000, 1)])
def test_epochs_serve_the_same_tokens_in_another_order(host, reference, passes, buffer_tokens, forwards):
    store = make_store(host, tokens=800, epochs=2, buffer_tokens=buffer_tokens)
    first, second = served(store)[0].split(800)
    n_passes = len(passes)
    assert n_passes == forwards * len({json.dumps(ids) for ids in passes})
    expected = sorted(places(reference[0][:800], reference[0]))
    assert sorted(places(first, reference[0])) == sorted(places(second, reference[0])) == expected
    assert places(first, reference[0]) != places(second, reference[0])


def test_bfloat16_holds_activations_and_serves_float32(host):
    exact, rounded = served(make_store(host)), served(make_store(host, dtype=torch.bfloat16))
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(b, a.bfloat16().float())


def test_a_chat_host_trains_on_text_and_not_on_padding():
    host = tiny_host(chat=True)
    store = ActivationStore(
        host, SITE, lambda: pack_documents(TEXTS, host, 60), tokens=None, batch_size=1, seed=0, dtype=torch.float32
    )
    assert len(served(store)[0]) == sum(int(keep_mask(host, ids).sum()) for ids in pack_documents(TEXTS, host, 60))


@pytest.fixture(scope="module")
def uninterrupted(host):
    return list(make_store(host, tokens=N_TOKENS, epochs=2))


@pytest.mark.parametrize("at", [0, 1, 10, 17, 18, 19, 36, 50, 61, 62, 63, 90, 123, 124])
def test_a_resumed_store_goes_on_bit_for_bit(host, uninterrupted, at):
    assert len(uninterrupted) == 124  # chunks of about 18 batches
    store = make_store(host, tokens=N_TOKENS, epochs=2)
    for _ in zip(range(at), store, strict=False):
        pass
    state = json.loads(json.dumps(store.state_dict()))
    resumed = make_store(host, tokens=N_TOKENS, epochs=2)
    resumed.load_state_dict(state)
    assert same(list(resumed), uninterrupted[at:])


def test_a_store_that_served_can_be_set_back(host):
    store = make_store(host)
    start = store.state_dict()
    whole = list(store)
    store.load_state_dict(start)
    assert same(list(store), whole)


@pytest.mark.parametrize("changed", [{"batch_size": 10}, {"seed": 1}, {"tokens": 999}, {"dtype": torch.bfloat16}])
def test_a_state_of_other_arguments_is_refused_by_name(host, changed):
    state = make_store(host).state_dict()
    with pytest.raises(ValueError, match=next(iter(changed))):
        make_store(host, **changed).load_state_dict(state)


def test_a_state_of_another_text_host_or_kind_is_refused(host):
    state = make_store(host).state_dict()
    other = ActivationStore(
        host, SITE, lambda: pack_documents(["another text" * 50], host, CTX), tokens=None, batch_size=BATCH, seed=0
    )
    with pytest.raises(ValueError, match="first_ids"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="host_fingerprint"):
        make_store(tiny_host(seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks chunk"):
        make_store(host).load_state_dict({name: value for name, value in state.items() if name != "chunk"})


def test_a_store_holds_no_more_than_its_buffer(host):
    store = make_store(host, dtype=torch.bfloat16)
    for _ in store:
        assert store._buffer is not None
        tensors = [*store._buffer, store._order()]
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert held <= buffer_bytes(32, 32, BUFFER, torch.bfloat16) == BUFFER * (64 * 2 + 8)


def test_the_buffer_is_made_once_and_no_larger_than_the_text(host):
    store = make_store(host, tokens=500, buffer_tokens=10**9)
    batches = iter(store)
    next(batches)
    buffer = store._buffer
    assert buffer is not None
    assert buffer[0].shape == (500, 32)
    list(batches)
    assert store._buffer is buffer


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("n_tokens", [100, BUFFER, 1000])
def test_moments_are_those_of_numpy_in_float64_over_the_first_tokens(host, reference, n_tokens, begun):
    store = make_store(host)
    if begun:
        for _ in zip(range(25), store, strict=False):
            pass
    moments = store.moments(n_tokens)
    assert moments.tokens == n_tokens
    for acts, mean, std in zip(
        reference, (moments.mean_in, moments.mean_out), (moments.std_in, moments.std_out), strict=True
    ):
        expected = acts[:n_tokens].double().numpy()
        np.testing.assert_allclose(mean.numpy(), expected.mean(0), atol=1e-6)
        np.testing.assert_allclose(std.numpy(), expected.std(0), rtol=1e-5)


def test_moments_of_a_chunk_are_exact_and_cost_no_forward_pass_of_their_own(host, passes):
    store = make_store(host, dtype=torch.bfloat16, buffer_tokens=10_000)
    moments = store.moments(N_TOKENS)
    n_passes = len(passes)
    list(store)
    assert len(passes) == n_passes > 0
    rows = collect(host, SITE, sequences(host), N_TOKENS, torch.bfloat16, batch_sequences=4)
    np.testing.assert_allclose(moments.mean_in.numpy(), rows.x.double().numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.std_out.numpy(), rows.y.double().numpy().std(0), rtol=1e-12)


def test_a_constant_dimension_has_a_deviation_of_exactly_0(host, monkeypatch):
    capture = type(host).capture

    def with_constant(self, site, ids):
        x, y = capture(self, site, ids)
        x[..., 3] = 0.1
        return x, y

    monkeypatch.setattr(type(host), "capture", with_constant)
    moments = make_store(host).moments(1000)
    assert moments.std_in[3] == 0
    assert (moments.std_in > 0).sum() == 31


def test_covariances_are_those_of_standardised_activations(host, reference):
    store = make_store(host)
    moments = store.moments(1200)
    input, output = Standardizer(32), Standardizer(32)
    input.set(moments.mean_in, moments.std_in)
    output.set(moments.mean_out, moments.std_out)
    covariance, cross_covariance = store.covariances(input, output, 1200)
    x, y = (acts[:1200].double().numpy() for acts in reference)
    expected = np.corrcoef(x.T, y.T)
    np.testing.assert_allclose(covariance.numpy(), expected[:32, :32], atol=1e-5)
    np.testing.assert_allclose(cross_covariance.numpy(), expected[:32, 32:], atol=1e-5)
    torch.testing.assert_close(store.first_inputs(1200), reference[0][:1200], rtol=0, atol=1e-5)


def test_statistics_of_more_tokens_than_there_are_are_refused(host):
    with pytest.raises(ValueError, match="an epoch has 500 tokens, and the first 100,000"):
        make_store(host, tokens=500).moments()
    with pytest.raises(ValueError, match="are asked for"):
        make_store(host).moments()


def test_collect_gives_the_first_tokens_in_order_with_ids_and_positions(host, reference):
    sample = collect(host, SITE, sequences(host), 700)
    torch.testing.assert_close(sample.x, reference[0][:700], rtol=0, atol=1e-5)
    torch.testing.assert_close(sample.y, reference[1][:700], rtol=0, atol=1e-5)
    ids = torch.stack(list(sequences(host)()))
    keep = keep_mask(host, ids)
    assert torch.equal(sample.ids, ids[keep][:700])
    assert torch.equal(sample.positions, keep.nonzero()[:700, 1])
    with pytest.raises(ValueError, match="not the 100,000 asked for"):
        collect(host, SITE, sequences(host), 100_000)


def test_float16_is_refused_with_the_reason(host):
    with pytest.raises(ValueError, match=r"65,504.*Gemma.*bfloat16"):
        make_store(host, dtype=torch.float16)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        make_store(host, dtype=torch.int8)


@pytest.mark.parametrize("name", ["tokens", "batch_size", "buffer_tokens", "batch_sequences", "epochs"])
def test_sizes_below_1_are_refused_by_name(host, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        make_store(host, **{name: 0})


def test_activations_that_are_not_finite_are_refused_by_layer_and_place(host, monkeypatch):
    capture = type(host).capture

    def broken(self, site, ids):
        x, y = capture(self, site, ids)
        y[2, 0] = torch.nan  # at the BOS: left out, and so no error
        y[2, 5, 7] = torch.inf
        return x, y

    monkeypatch.setattr(type(host), "capture", broken)
    with pytest.raises(ValueError, match=r"target of the MLP of layer 1 .* position 5 of sequence 2, token \d+"):
        next(iter(make_store(host)))


def test_too_little_text_or_buffer_is_refused(host):
    with pytest.raises(ValueError, match="not the 100,000 asked for"):
        list(make_store(host, tokens=100_000))
    with pytest.raises(ValueError, match="less than a batch of 60"):
        list(make_store(host, tokens=55, batch_size=60))
    with pytest.raises(ValueError, match="cannot hold a batch of 20 and a forward pass of 96"):
        list(make_store(host, buffer_tokens=115))
    with pytest.raises(ValueError, match="not any"):
        list(ActivationStore(host, SITE, lambda: iter([]), tokens=None, batch_size=1, seed=0))
    ragged = [torch.arange(5), torch.arange(6)]
    with pytest.raises(ValueError, match=r"one length are needed, got \[5, 6\]"):
        list(ActivationStore(host, SITE, lambda: iter(ragged), tokens=None, batch_size=1, seed=0))


def test_progress_tells_the_tokens_of_the_epoch(host):
    said = []
    list(make_store(host, tokens=1000, progress=lambda done, total: said.append((done, total))))
    assert said[-1] == (1000, 1000)
    done = [d for d, _ in said]
    assert done == sorted(done)
    assert len(set(done)) == len(done)


def cached_files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_what_is_cached_needs_no_forward_pass_and_is_the_same(host, passes, tmp_path):
    plain = list(make_store(host))
    assert same(list(make_store(host, cache=tmp_path)), plain)
    n_passes = len(passes)
    again = make_store(host, cache=tmp_path, seed=3, batch_size=10, buffer_tokens=300)
    assert len(served(again)[0]) >= N_TOKENS
    assert same(list(make_store(host, cache=tmp_path)), plain)
    assert len(passes) == n_passes
    identity = json.loads(next(tmp_path.rglob("identity.json")).read_text())
    assert (identity["host_fingerprint"], identity["site"]["layer"]) == (host.fingerprint, 1)


def test_a_cache_is_of_one_host_site_dtype_and_text(host, passes, tmp_path):
    list(make_store(host, tokens=100, cache=tmp_path))
    for other_host, site, dtype, ctx in (
        (tiny_host(seed=1), SITE, torch.float32, CTX),
        (host, Site(1), torch.float32, CTX),
        (host, SITE, torch.bfloat16, CTX),
        (host, SITE, torch.float32, CTX + 1),
    ):
        del passes[:]
        collect(other_host, site, lambda ctx=ctx: pack_documents(TEXTS, host, ctx), 50, dtype, cache=tmp_path)
        assert passes


@pytest.mark.parametrize("damage", ["a bit", "cut short", "empty", "other tensors"])
def test_damaged_files_are_said_computed_again_and_replaced(host, passes, tmp_path, capsys, damage):
    plain = list(make_store(host, cache=tmp_path))
    file = cached_files(tmp_path)[3]
    whole = file.read_bytes()
    if damage == "a bit":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "cut short":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.write_bytes(cached_files(tmp_path)[0].read_bytes().replace(b'"x"', b'"z"'))
    del passes[:]
    assert same(list(make_store(host, cache=tmp_path)), plain)
    assert len(passes) == 1
    assert f"{file} are damaged and are computed again" in capsys.readouterr().err
    assert file.read_bytes() == whole


def test_a_killed_writer_leaves_nothing_that_looks_whole(host, tmp_path, monkeypatch):
    def killed(_descriptor):
        raise KeyboardInterrupt

    make_store(host, cache=tmp_path)
    monkeypatch.setattr(activation_cache.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(host, SITE, sequences(host), 50, cache=tmp_path)
    assert not cached_files(tmp_path)


def test_a_disk_too_small_is_an_error_before_anything_is_computed(host, passes, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_cache, "MIN_FREE_BYTES", 10**18)
    with pytest.raises(OSError, match="does not fit the disk"):
        make_store(host, tokens=1000, cache=tmp_path)
    with pytest.raises(OSError, match=r"down to .* GB free"):
        list(make_store(host, cache=tmp_path))
    assert len(passes) == 1
    assert not cached_files(tmp_path)

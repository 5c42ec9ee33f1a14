"""Losses by token, and the paired comparison: its identities, its error bar, and what it refuses to compare."""

import hashlib
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.parity import check_comparable, compare, paired_difference, read_run, read_windows, token_losses
from cayley_interp import CayleyGPT, CayleyGPTConfig
from cayley_interp.pretrained import save_model

CONFIG = CayleyGPTConfig(n_layers=1, n_heads=2, d_model=16, n_ctx=8, d_vocab=32, levels="4,2,0;6,3,2")


@pytest.fixture(scope="module")
def model() -> CayleyGPT:
    torch.manual_seed(0)
    return CayleyGPT(CONFIG)


WINDOWS = torch.randint(32, (11, 9), generator=torch.Generator().manual_seed(1))


@given(batch_size=st.integers(1, 20))
def test_losses_do_not_depend_on_the_batch_size(model: CayleyGPT, batch_size: int):
    losses = token_losses(model, WINDOWS, batch_size)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, token_losses(model, WINDOWS, 11), rtol=1e-5, atol=1e-5)


def test_losses_leave_the_model_as_it_was(model: CayleyGPT):
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    token_losses(model, WINDOWS, 4)
    assert model.training
    assert all(module.training for module in model.modules())
    for sae in model.bottlenecks():
        sae.update_statistics()
    assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())


def test_identical_models_differ_by_exactly_nothing(model: CayleyGPT):
    losses = token_losses(model, WINDOWS, 4)
    difference = paired_difference(losses, losses)
    assert (difference.mean, difference.standard_error) == (0, 0)
    assert (difference.n_sequences, difference.n_tokens) == (11, 88)


def test_difference_by_hand_and_its_sign():
    a, b = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).double(), torch.ones(2, 2).double()
    difference = paired_difference(a, b)  # sequence means 1 and 5
    assert difference.mean == 3
    assert difference.standard_error == pytest.approx(2)
    assert paired_difference(b, a).mean == -3
    assert np.isnan(paired_difference(a[:1], b[:1]).standard_error)


def test_standard_error_is_the_bootstrap_over_sequences():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 1, generator=generator).double() + 0.3 * torch.randn(200, 16, generator=generator).double()
    b = torch.zeros_like(a)
    draws = torch.randint(200, (4000, 200), generator=generator)
    bootstrap = (a - b).mean(1)[draws].mean(1).std().item()
    standard_error = paired_difference(a, b).standard_error
    assert standard_error == pytest.approx(bootstrap, rel=0.05)
    assert standard_error > 2 * a.std().item() / a.numel() ** 0.5  # tokens of a sequence are no independent sample


def test_bad_shapes_are_refused(model: CayleyGPT):
    with pytest.raises(ValueError, match="expected losses of the same windows"):
        # Unwrapped, for the tests' own shape checks would refuse it first.
        inspect.unwrap(paired_difference)(torch.zeros(2, 3).double(), torch.zeros(3, 2).double())
    with pytest.raises(ValueError, match="expected windows of shape"):
        token_losses(model, WINDOWS[:0], 4)


def make_run(folder: Path, config: CayleyGPTConfig = CONFIG, tokenizer: str = "{}", seed: int = 0) -> Path:
    save_model(CayleyGPT(config), folder / "model", tokenizer)
    shards = []
    for i, length in enumerate((30, 20)):
        ids = np.random.default_rng(seed + i).integers(0, 32, length).astype("<u2").tobytes()
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"val-{i:05d}.bin").write_bytes(ids)
        shards.append({"file": f"val-{i:05d}.bin", "tokens": length, "sha256": hashlib.sha256(ids).hexdigest()})
    index = {"dtype": "<u2", "splits": {"train": [], "val": shards}}
    (folder / "data" / "index.json").write_text(json.dumps(index))
    return folder


def test_windows_are_n_ctx_apart_and_within_a_shard(tmp_path: Path):
    run = read_run(make_run(tmp_path / "a"))
    first, second = (np.fromfile(path, "<u2") for path in run.shards)
    windows = read_windows(run, 10_000)
    assert windows.shape == (3 + 2, 9)
    assert windows[1].tolist() == first[8:17].tolist()
    assert windows[3].tolist() == second[:9].tolist()
    assert read_windows(run, 31).shape == (3, 9)
    with pytest.raises(ValueError, match="raise --tokens"):
        read_windows(run, 7)


def test_command_prints_every_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    compare((a, b, a), tokens=40)
    out = capsys.readouterr().out
    assert "40 validation tokens" in out
    assert len(re.findall(r"[+-]\d\.\d{4}", out)) == 3
    assert "+0.0000" in out  # a - a


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tokenizer": '{"a": 1}'}, "different tokenizers"),
        ({"seed": 9}, "different validation shards"),
        ({"config": replace(CONFIG, n_ctx=4)}, "different context lengths"),
    ],
)
def test_runs_on_other_data_are_refused(tmp_path: Path, other: dict, message: str):
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", **other))]
    with pytest.raises(ValueError, match=message):
        check_comparable(runs)


def test_folders_that_are_no_runs_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path)
    run = make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="at least two"):
        compare((run,))
    (run / "data" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of token shards"):
        read_run(run)
    (run / "data" / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*index\.json"):
        read_run(run)


def test_shards_of_another_folder_are_found_through_the_config(tmp_path: Path):
    run = make_run(tmp_path / "a")
    (run / "data").rename(tmp_path / "shards")
    (run / "config.json").write_text(json.dumps({"data": {"data": str(tmp_path / "shards")}}))
    assert len(read_windows(read_run(run), 40)) == 5

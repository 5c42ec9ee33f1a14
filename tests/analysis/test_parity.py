"""Losses by token, and the paired comparison: its identities, its error bar, and what it refuses to compare."""

import hashlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from analysis.parity import common_shards, compare, main, open_subject
from analysis.shards import read_windows, training_counts
from cayley_interp import CayleyGPT, CayleyGPTConfig
from cayley_interp.folder import save_pretrained
from cayley_interp.losses import paired_difference, window_losses
from cayley_interp.pretrained import wrapped

CONFIG = CayleyGPTConfig(n_layers=1, n_heads=2, d_model=16, n_ctx=8, d_vocab=32, levels="4,2,0;6,3,2")


@pytest.fixture(scope="module")
def model() -> CayleyGPT:
    torch.manual_seed(0)
    return CayleyGPT(CONFIG)


WINDOWS = torch.randint(32, (11, 9), generator=torch.Generator().manual_seed(1))


@given(batch_size=st.integers(1, 20))
def test_losses_do_not_depend_on_the_batch_size(model: CayleyGPT, batch_size: int):
    losses = window_losses(model, WINDOWS, batch_size)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, window_losses(model, WINDOWS, 11), rtol=1e-5, atol=1e-5)


def test_losses_leave_the_model_as_it_was(model: CayleyGPT):
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    window_losses(model, WINDOWS, 4)
    assert model.training
    assert all(module.training for module in model.modules())
    for sae in model.bottlenecks():
        sae.update_statistics()
    assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())


def test_identical_models_differ_by_exactly_nothing(model: CayleyGPT):
    losses = window_losses(model, WINDOWS, 4)
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
        window_losses(model, WINDOWS[:0], 4)


def make_shards(folder: Path, seed: int = 0, tokenizer: str = "a") -> Path:
    folder.mkdir(parents=True)
    splits: dict[str, list] = {"train": [], "val": []}
    for i, (split, length) in enumerate((("val", 30), ("val", 20), ("train", 50))):
        ids = np.random.default_rng(seed + i).integers(0, 32, length).astype("<u2").tobytes()
        name = f"{split}-{i:05d}.bin"
        (folder / name).write_bytes(ids)
        splits[split].append({"file": name, "tokens": length, "sha256": hashlib.sha256(ids).hexdigest()})
    (folder / "index.json").write_text(json.dumps({"dtype": "<u2", "splits": splits}))
    (folder / "tokenizer.json").write_text(one_word_tokenizer(tokenizer).to_str(pretty=True))
    return folder


def one_word_tokenizer(word: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({word: 0}, unk_token=word))


def make_model(folder: Path, config: CayleyGPTConfig = CONFIG, tokenizer: str = "a") -> Path:
    model = CayleyGPT(config)
    model.tokenizer = one_word_tokenizer(tokenizer)
    return save_pretrained(model, folder)


def make_run(folder: Path, config: CayleyGPTConfig = CONFIG, tokenizer: str = "a", seed: int = 0) -> Path:
    make_shards(folder / "data", seed, tokenizer)
    make_model(folder / "model", config, tokenizer)
    (folder / "metrics.jsonl").write_text("")
    return folder


def test_windows_are_n_ctx_apart_and_within_a_shard(tmp_path: Path):
    shards = common_shards([open_subject(str(make_run(tmp_path / name))) for name in "ab"])
    first, second = (np.fromfile(path, "<u2") for path in shards.val)
    windows = read_windows(shards, 8, 10_000)
    assert windows.shape == (3 + 2, 9)
    assert windows[1].tolist() == first[8:17].tolist()
    assert windows[3].tolist() == second[:9].tolist()
    assert read_windows(shards, 8, 31).shape == (3, 9)
    with pytest.raises(ValueError, match="raise --tokens"):
        read_windows(shards, 8, 7)
    counts = training_counts(shards, 40)
    assert counts.shape == (40,)
    assert counts.tolist() == np.bincount(np.fromfile(shards.train[0], "<u2"), minlength=40).tolist()


def test_several_models_are_compared_pair_by_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = (str(make_run(tmp_path / name)) for name in "ab")
    main((a, b, a), tokens=40)
    out = capsys.readouterr().out
    assert "Loss over 40 tokens" in out
    assert len(re.findall(r"[+-]\d\.\d{4} ±", out)) == 3
    assert "+0.0000" in out  # a - a
    assert "By position" not in out


def test_two_models_are_broken_down_on_the_screen_and_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = (str(make_run(tmp_path / name)) for name in "ab")
    main((a, b), tokens=40, json_file=tmp_path / "c.json", markdown=tmp_path / "c.md")
    out, page = capsys.readouterr().out, (tmp_path / "c.md").read_text()
    written = json.loads((tmp_path / "c.json").read_text())
    (pair,) = written["pairs"]
    assert (written["n_sequences"], written["n_tokens"]) == (5, 40)
    assert pair["difference"]["mean"] == pytest.approx(written["losses"][0] - written["losses"][1])
    for kind in ("by_position", "by_frequency"):
        weighted = sum(b["difference"]["mean"] * b["difference"]["n_tokens"] for b in pair[kind])
        assert weighted / 40 == pytest.approx(pair["difference"]["mean"])
    for text in (out, page):
        assert "By position" in text
        assert "4-7" in text
    tables = [[line.count("|") for line in block.splitlines()] for block in page.split("\n\n") if "|" in block]
    assert len(tables) == 4
    assert all(len(set(table)) == 1 for table in tables)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c.json", "c.md"]


def test_models_without_a_run_are_compared_on_shards_that_are_given(tmp_path: Path):
    run, model = str(make_run(tmp_path / "run")), str(make_model(tmp_path / "model"))
    other = make_shards(tmp_path / "shards", seed=9)
    subjects = [open_subject(model), open_subject(run)]
    assert common_shards(subjects).folder == tmp_path / "run" / "data"
    assert common_shards(subjects, other).folder == other
    assert compare(subjects, common_shards(subjects, other), 40, 16).n_tokens == 40
    with pytest.raises(ValueError, match="Give --data FOLDER"):
        common_shards([subjects[0]] * 2)
    with pytest.raises(FileNotFoundError, match="not a folder of token shards"):
        common_shards(subjects, tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tokenizer": "b"}, "different tokenizers"),
        ({"seed": 9}, "different validation shards"),
        ({"config": replace(CONFIG, n_ctx=4)}, "different context lengths"),
    ],
)
def test_runs_on_other_data_are_refused(tmp_path: Path, other: dict, message: str):
    subjects = [open_subject(str(make_run(tmp_path / "a"))), open_subject(str(make_run(tmp_path / "b", **other)))]
    with pytest.raises(ValueError, match=message):
        common_shards(subjects)


def test_folders_that_are_no_runs_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        open_subject(str(tmp_path))
    run = make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="at least two"):
        main((str(run),))
    (run / "data" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of token shards"):
        open_subject(str(run))
    (run / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        open_subject(str(run))


def test_shards_of_another_folder_are_found_through_the_config(tmp_path: Path):
    run = make_run(tmp_path / "a")
    (run / "data").rename(tmp_path / "shards")
    (run / "config.json").write_text(json.dumps({"data": {"data": str(tmp_path / "shards")}}))
    shards = open_subject(str(run)).shards
    assert shards is not None
    assert len(read_windows(shards, 8, 40)) == 5


def test_the_command_line_ends_in_one_clear_line():
    command = [sys.executable, "-m", "analysis.parity", "/nonexistent/a", "/nonexistent/b"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "/nonexistent/a" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("wrap", ["bridge", "hooked"])
def test_a_wrapped_model_has_the_losses_of_the_bare_one(model: CayleyGPT, wrap: Literal["bridge", "hooked"]):
    lens = pytest.importorskip("transformer_lens")
    if wrap == "hooked" and not hasattr(lens, "HookedTransformer"):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    bare = window_losses(model, WINDOWS, 4)
    other = window_losses(wrapped(model, wrap, "test"), WINDOWS, 4)
    torch.testing.assert_close(other, bare, rtol=0, atol=1e-5)

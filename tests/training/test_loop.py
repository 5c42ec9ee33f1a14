"""The loop in this process: what it logs, and that a step is the same however its batch is cut."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis.figures import silent_figure
from cayley_interp import CayleyGPTConfig
from tests.helpers import small_corpus
from training import loop
from training.data import open_corpus
from training.loop import Trainer, make_accelerator
from training.recipes import DataConfig, OptimConfig, RunConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    text = small_corpus(tmp_path_factory.mktemp("loop") / "corpus")
    return RunConfig(
        name="test",
        model=CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=16, d_vocab=300, levels="4,3,0;6,4,4"),
        data=DataConfig(data=str(text), val_tokens=512),
        optim=OptimConfig(warmup=2),
        max_steps=6,
        batch_size=8,
        log_every=2,
        eval_every=3,
        checkpoint_every=3,
        device="cpu",
        precision="fp64",
    )


def run(config: RunConfig, folder) -> tuple[Trainer, list[dict]]:
    corpus = open_corpus(config.data, 300, 16, config.seed, folder / "data", progress=False)
    trainer = Trainer(config, corpus, folder, make_accelerator(config))
    trainer.resume()
    records: list[dict] = []
    trainer.run(log=records.append)
    return trainer, records


def test_a_step_does_not_depend_on_how_its_batch_is_cut(config, tmp_path):
    whole, _ = run(config, tmp_path / "whole")
    parts, _ = run(replace(config, batch_size=2, grad_accum=4), tmp_path / "parts")
    for name, value in whole.model.state_dict().items():
        other = parts.model.state_dict()[name]
        assert (value - other).abs().max() < 1e-9, name


def test_validation_does_not_depend_on_the_batch_size(config, tmp_path):
    trainer, _ = run(config, tmp_path / "run")
    loss = trainer.validation_loss()
    trainer.config = replace(config, batch_size=3)
    assert trainer.validation_loss() == pytest.approx(loss, abs=1e-12)


def test_logged_records_are_what_the_report_draws(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SILENT_TOKENS", 300)
    _, records = run(config, tmp_path / "run")
    assert [r["step"] for r in records if "train_loss" in r] == [2, 4, 6]
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6]
    silent = records[-2]["silent"]
    assert set(silent) == {"0.0", "0.1", "1.0", "1.1"}
    assert all(0 <= share <= 1 for share in silent.values())
    assert silent_figure(records) is not None


@pytest.fixture(scope="module")
def cold(config, tmp_path_factory) -> tuple[RunConfig, Path, Trainer, list[dict]]:
    """A run that ends by a cold stop, four steps into a warm-down of eight."""
    losses = iter([5.5, 5.2, 4.8])
    cold = replace(
        config, max_steps=40, target_val_loss=4.8, target_margin=0.4, log_every=50, eval_every=4, checkpoint_every=5
    )
    cold = replace(cold, keep_checkpoints=10)
    folder = tmp_path_factory.mktemp("cold")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "validation_loss", lambda _: next(losses))
        trainer, records = run(cold, folder)
    return cold, folder, trainer, records


def test_a_cold_stop_ends_where_the_target_is_reached(cold):
    _, folder, trainer, records = cold
    assert trainer.step == 12
    assert [(r["step"], r["val_loss"]) for r in records if "val_loss" in r] == [(4, 5.5), (8, 5.2), (12, 4.8)]
    decided = [(r["step"], r["warmdown_start"], r["warmdown_end"]) for r in records if "decision" in r]
    assert decided == [(8, 8, 16), (12, 8, 12)]
    assert records[-2]["step"] == 12  # the last step is logged although log_every is 50
    assert records[-2]["lr_muon"] < 0.7 * trainer.config.optim.muon_lr
    assert [p.name[-2:] for p in sorted((folder / "checkpoints").iterdir())] == ["05", "10", "12"]


@pytest.mark.parametrize("stopped_at", [5, 10, 12])
def test_a_cold_stop_that_is_resumed_ends_bit_identical(cold, tmp_path, monkeypatch, stopped_at):
    config, folder, whole, records = cold
    shutil.copytree(folder, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > stopped_at:
            shutil.rmtree(checkpoint)
    losses = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    monkeypatch.setattr(Trainer, "validation_loss", lambda trainer: losses[trainer.step])
    resumed, _ = run(config, tmp_path / "run")
    assert (resumed.step, resumed.schedule) == (whole.step, whole.schedule)
    other = resumed.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in whole.model.state_dict().items())


def test_seeds_differ_and_repeat(config, tmp_path):
    first, second, other = (
        [r["train_loss"] for r in run(replace(config, seed=seed), tmp_path / name)[1] if "train_loss" in r]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second
    assert first != other

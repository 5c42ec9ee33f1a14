"""Two gloo processes take the same steps as one: same loss curve at the same global batch, same statistics."""

import pytest
import torch

from tests.helpers import SMALL_RUN, run_training, small_corpus, train_losses, weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    corpus = small_corpus(folder / "corpus")
    arguments = [*SMALL_RUN, str(corpus), "--max-steps", "25", "--grad-accum", "2"]
    for processes in (1, 2):
        result = run_training("tiny", *arguments, "--out", str(folder / str(processes)), processes=processes)
        assert result.returncode == 0, result.stderr
    return folder / "1", folder / "2"


def test_loss_curves_agree(runs):
    one, two = (train_losses(run) for run in runs)
    assert len(one) == len(two) == 25
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5


def test_statistics_and_dead_counters_are_those_of_the_whole_batch(runs):
    one, two = (weights(run) for run in runs)
    for name in one:
        if name.endswith(("sparse.mean", "sparse.std")):
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
        if name.endswith(("sparse.n_updates", "sparse.tokens_since_active")):
            assert torch.equal(one[name], two[name]), name


def test_an_accumulation_that_cannot_be_shared_is_refused(runs, tmp_path):
    arguments = [*SMALL_RUN, str(runs[0].parent / "corpus"), "--max-steps", "2", "--grad-accum", "3"]
    result = run_training("tiny", *arguments, "--out", str(tmp_path / "run"), processes=2)
    assert result.returncode != 0
    assert "grad-accum" in result.stderr
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_compiled_processes_take_the_same_steps(runs, tmp_path):
    arguments = [
        *SMALL_RUN,
        str(runs[0].parent / "corpus"),
        "--max-steps",
        "3",
        "--grad-accum",
        "4",
        "--compile",
        "True",
    ]
    result = run_training("tiny", *arguments, "--out", str(tmp_path / "compiled"), processes=2)
    assert result.returncode == 0, result.stderr
    arguments[-1] = "False"
    result = run_training("tiny", *arguments, "--out", str(tmp_path / "eager"))
    assert result.returncode == 0, result.stderr
    compiled, eager = (train_losses(tmp_path / name) for name in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, abs=1e-4)

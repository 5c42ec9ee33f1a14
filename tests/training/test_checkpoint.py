"""Checkpoints are whole or absent."""

import pytest
import torch
from torch import nn

from training import checkpoint
from training.checkpoint import checkpoints, load_checkpoint, save_checkpoint


def model(fill: float = 0.0) -> nn.Module:
    layer = nn.Linear(3, 3)
    nn.init.constant_(layer.weight, fill)
    return layer


def test_everything_comes_back(tmp_path):
    torch.manual_seed(1)
    save_checkpoint(tmp_path, 7, model(0.5), {"data": {"position": 3}}, keep=2)
    drawn = torch.rand(4)
    loaded = model()
    state = load_checkpoint(checkpoints(tmp_path)[-1], loaded)
    assert state["step"] == 7
    assert state["data"] == {"position": 3}
    assert (loaded.weight == 0.5).all()
    assert torch.equal(torch.rand(4), drawn)


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save_checkpoint(tmp_path, step, model(), {}, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-0000015", "step-0000100"]


def test_a_write_that_is_cut_short_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, model(1.0), {}, keep=2)

    def full_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, 2, model(2.0), {}, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-0000001"]
    save_checkpoint(tmp_path, 2, model(2.0), {}, keep=2)  # what was left behind is in nobody's way
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-0000001", "step-0000002"]


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path):
    save_checkpoint(tmp_path, 1, model(), {}, keep=2)
    folder = checkpoints(tmp_path)[0]
    for name in ("trainer.pt", "model.safetensors"):
        file = folder / name
        file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(ValueError, match=r"step-0000001 cannot be read(.|\n)*delete .*step-0000001"):
            load_checkpoint(folder, model())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, nn.Linear(4, 4), {}, keep=2)
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(checkpoints(tmp_path)[0], model())


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    save_checkpoint(tmp_path, 1, model(), {}, keep=2)
    folder = checkpoints(tmp_path)[0]
    torch.save({"step": 1, "rng": {}, "evil": Evil()}, folder / "trainer.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(folder, model())
    assert not Evil.ran


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))

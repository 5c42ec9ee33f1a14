"""Whole checkpoints in `RUN/checkpoints/step-N/`: weights and buffers, both optimisers, RNG, position in the data.

A checkpoint is written under a temporary name, flushed to the disk and renamed: a folder called step-N is complete, at
whatever moment the process was killed.
"""

import os
import pickle
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn


def save_checkpoint(run_dir: Path, step: int, model: nn.Module, state: dict, keep: int) -> Path:
    """Write `step-N` and delete all but the newest `keep` checkpoints."""
    folder = run_dir / "checkpoints" / f"step-{step:07d}"
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(model, str(temporary / "model.safetensors"))
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    torch.save({"step": step, "rng": rng, **state}, temporary / "trainer.pt")
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _fsync_directory(folder.parent)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(folder for folder in found if re.fullmatch(r"step-\d{7,}", folder.name))


def load_checkpoint(folder: Path, model: nn.Module) -> dict:
    """Restore weights, buffers and RNG; returns the rest of the state.

    Raises:
        ValueError: the checkpoint does not fit this model or is damaged; it says which file and what to do.
    """
    way_out = f"delete {folder} to go back to the checkpoint before it"
    try:
        load_model(model, str(folder / "model.safetensors"))
        state = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"the checkpoint {folder} cannot be read: {error}\n{way_out}") from error
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"])
    return state


def _fsync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

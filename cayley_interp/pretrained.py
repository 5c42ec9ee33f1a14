"""A model as a folder: `config.json`, `model.safetensors`, `tokenizer.json`."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights

from cayley_interp.model import CayleyGPT, CayleyGPTConfig


def save_model(model: CayleyGPT, folder: Path, tokenizer_json: str | None = None) -> None:
    """Write the folder under a temporary name and rename it, replacing an older one of that name."""
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    if tokenizer_json is not None:
        (temporary / "tokenizer.json").write_text(tokenizer_json)
    save_weights(model, str(temporary / "model.safetensors"))
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def load_model(folder: Path, device: torch.device | str = "cpu") -> CayleyGPT:
    """The CayleyGPT of a folder that `save_model` wrote, in eval mode.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the config or the weights do not describe one model.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a saved CayleyGPT: it has no {name}")
    try:
        config = CayleyGPTConfig(**json.loads((folder / "config.json").read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not the config of a CayleyGPT: {error}") from error
    model = CayleyGPT(config)
    try:
        load_weights(model, str(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} does not fit its config.json: {error}") from error
    return model.to(device).eval()

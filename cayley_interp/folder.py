"""A model as a folder: config.json, model.safetensors, tokenizer.json, training.json and README.md, its card.

training.json says what is known of the model's making; loading does not read it. A folder is read whole or refused with
the file and the tensor that are wrong, and replaced whole or not at all.
"""

import json
import os
import shutil
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cayley_interp.card import model_card
from cayley_interp.messages import some
from cayley_interp.model import CayleyGPT, CayleyGPTConfig

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "training.json", "README.md")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COUNTER_DTYPES = (torch.int64, torch.int32)


def is_model_folder(path: Path) -> bool:
    """Whether it is a folder of `save_pretrained`, damaged or not: other codes' configs have no n_layers."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:  # a config that cannot be read is ours to complain about, if weights of that name are beside it
        return (path / "model.safetensors").is_file()
    return isinstance(config, dict) and "n_layers" in config


def read_model(folder: Path) -> CayleyGPT:
    """The CayleyGPT of a folder that `save_pretrained` wrote, float32 (float64 if saved so), in eval mode.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing.
        ValueError: naming the file and, for weights, the tensor that is wrong.
    """
    from cayley_interp.tokenizer import read_tokenizer, vocab_size

    config_file, weights_file, tokenizer_file = (folder / name for name in MODEL_FILES[:3])
    for file in (config_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is not a saved CayleyGPT: it has no {file.name}")
    try:
        config = read_config(config_file)
        model = CayleyGPT(config)
    except (ValueError, RuntimeError) as error:  # RuntimeError: sizes that torch cannot make
        raise ValueError(f"{config_file} is not the config of a CayleyGPT: {error}") from error
    if tokenizer_file.is_file():
        model.tokenizer = read_tokenizer(tokenizer_file)
        size = vocab_size(model.tokenizer)
        if size > config.d_vocab:
            raise ValueError(
                f"{tokenizer_file} has {size:,} entries, the model has d_vocab = {config.d_vocab:,}: it is the "
                "tokenizer of another model"
            )
    weights = read_weights(weights_file, weights_of(model))
    if weights["tok.weight"].dtype == torch.float64:
        model.double()
    model.load_state_dict(weights | {"head.weight": weights["tok.weight"]})
    return model.eval()


def read_config(file: Path) -> CayleyGPTConfig:
    """The config in a JSON file.

    Raises:
        ValueError: not JSON, an unknown or missing field, a value of another type, or one that cannot be.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    kinds = get_type_hints(CayleyGPTConfig)
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ValueError(f"it has {some(unknown)}, which no CayleyGPT has")
    if missing := [f.name for f in fields(CayleyGPTConfig) if f.default is MISSING and f.name not in values]:
        raise ValueError(f"it lacks {some(missing)}")
    for name, value in values.items():
        if not _is_of(value, kind := kinds[name]):
            expected = kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    return CayleyGPTConfig(**values)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a field's type; true is not an integer here."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_is_of(value, one) for one in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


def weights_of(model: CayleyGPT) -> dict[str, Tensor]:
    """What is stored of a model: parameters and buffers, the tied head once."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}


def read_weights(file: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, if they are those expected.

    Raises:
        ValueError: the file is damaged, or what `check_tensors` raises.
    """
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short, fetch or save it again: {error}") from error
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{file} lacks {some(missing)}: it is not of the model that its config.json describes")
    if unknown := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{file} holds {some(unknown)}, which the model of its config.json does not have")
    for name, tensor in found.items():
        like = expected[name]
        if tensor.shape != like.shape:
            raise ValueError(f"{file}: {name} has shape {[*tensor.shape]}, its config.json asks for {[*like.shape]}")
        allowed = WEIGHT_DTYPES if like.is_floating_point() else COUNTER_DTYPES
        if tensor.dtype not in allowed:
            raise ValueError(f"{file}: {name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, allowed))}")
        check_values(file, name, tensor)
    return found


def check_values(where: Path, name: str, tensor: Tensor) -> None:
    """Whether a tensor holds what a model's can.

    Raises:
        ValueError: it is not finite, or, being a standard deviation, not positive.
    """
    if tensor.is_floating_point() and not tensor.isfinite().all():
        bad = int(tensor.isfinite().logical_not().sum())
        raise ValueError(f"{where}: {name} holds {bad:,} values that are nan or infinite of {tensor.numel():,}")
    if name.endswith("sparse.std") and not (tensor > 0).all():
        raise ValueError(f"{where}: {name} holds standard deviations that are not positive")


def save_pretrained(model: CayleyGPT, folder: str | Path, *, training: dict[str, Any] | None = None) -> Path:
    """Write a model's folder: under a temporary name, flushed and renamed, replacing an older one of that name.

    Args:
        model: the bare model; its tokenizer is saved with it.
        folder: where to.
        training: what is known of its making, for training.json and the card: recipe, data, tokens, val_loss, levels
            (one summary per layer and level), environment; JSON-serialisable.

    Raises:
        ValueError: the folder exists and is not a model's, or weights are not finite; nothing is written then.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    weights = {name: tensor.detach().contiguous() for name, tensor in weights_of(model).items()}
    for name, tensor in weights.items():
        check_values(folder, name, tensor)
    texts = {"config.json": json.dumps(asdict(model.config), indent=2) + "\n"}
    if training is not None:
        texts["training.json"] = json.dumps(training, indent=2) + "\n"
    if model.tokenizer is not None:
        texts["tokenizer.json"] = model.tokenizer.to_str()
    texts["README.md"] = model_card(model.config, model.num_parameters(), training)
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed while it saved
    new.mkdir(parents=True)
    try:
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        (new / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
        for name, content in texts.items():
            (new / name).write_text(content, encoding="utf-8")
        for file in new.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        _swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder for a model: choose another name, nothing was written")
    others = sorted(file.name for file in folder.iterdir() if file.name not in MODEL_FILES)
    if others or not (is_model_folder(folder) or not any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is not a model's folder{f' alone: it has {some(others)}' if others else ''}; choose "
            "another, nothing was written"
        )


def _swap(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`. The older one is set aside, not deleted, until the new one is there."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)

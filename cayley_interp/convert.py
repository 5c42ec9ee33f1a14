"""Take the weights and the plain values of the config out of a checkpoint that pickles classes, without running it.

    python -m cayley_interp.convert CKPT OUT_FOLDER

Classes that the checkpoint names are never imported: inert records stand in their place and only hold what was pickled.
"""

import argparse
import json
import os
import shutil
import sys
from _compat_pickle import IMPORT_MAPPING
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cayley_interp.foreign import CONFIG_KEYS, read_payload, unsafe_globals
from cayley_interp.tokenizer import read_tokenizer

# What a config may honestly hold of the standard library. Nothing that is named here, or not, is ever called; but a
# checkpoint that asks for other parts of it has been made to attack, and its weights are not to be trusted either.
DATA_TYPES = {"argparse", "collections", "copyreg", "datetime", "enum", "pathlib", "types", "uuid"}


DESCRIPTION = "Take weights and config out of a checkpoint that pickles classes, without running its code."


class Record:
    """Stands for an object of a class that is not imported: the arguments and the state it was pickled with."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any):
        # Not __init__: an unpickler makes objects without it.
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


def convert(checkpoint: Path, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer.json beside the checkpoint, if any, to a new folder.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: the folder is there already.
        ValueError: damaged, or asking for code.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: give the name of a new folder")
    try:
        payload = _read_inert(checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    configs = {key: plain(payload[key]) for key in CONFIG_KEYS if key in payload}
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        # Tied tensors share their memory, which safetensors refuses: each gets its own.
        weights = {name: tensor.detach().clone().contiguous() for name, tensor in payload["model"].items()}
        save_file(weights, temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(configs, indent=2) + "\n")
        tokenizer = checkpoint.with_name("tokenizer.json")
        if tokenizer.is_file():
            read_tokenizer(tokenizer)
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plain(value: Any) -> Any:
    """A pickled value as JSON has it: a record becomes its fields, or its one argument, as of an enum or a path."""
    if isinstance(value, Record):
        if isinstance(value.state, dict):
            return plain(value.state)
        return plain(value.args[0] if len(value.args) == 1 else list(value.args))
    if isinstance(value, dict):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _read_inert(checkpoint: Path) -> dict[str, Any]:
    needed = unsafe_globals(checkpoint)
    code = [name for name in needed if _is_code(name)]
    if code:
        raise ValueError(
            f"would call {', '.join(code)} when unpickled: that is code, not data, and a checkpoint has no need of it. "
            "Nothing was executed and nothing is converted"
        )
    with torch.serialization.safe_globals([(Record, name) for name in needed]):
        return read_payload(checkpoint)


def _is_code(name: str) -> bool:
    package = name.split(".")[0]
    package = IMPORT_MAPPING.get(package, package)  # torch.save writes Python 2's names: commands for subprocess
    return package in sys.stdlib_module_names and package not in DATA_TYPES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cayley_interp.convert", description=DESCRIPTION)
    parser.add_argument("checkpoint", type=Path, help="the checkpoint that needs more than weights_only")
    parser.add_argument("folder", type=Path, help="new folder for model.safetensors and config.json")
    options = parser.parse_args(arguments)
    try:
        convert(options.checkpoint, options.folder)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.folder}: {', '.join(sorted(p.name for p in options.folder.iterdir()))}")


if __name__ == "__main__":
    main()

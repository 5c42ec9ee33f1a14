"""SHA-256 of a model's weights: what says that two hosts are the same one."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn


def fingerprint_of_files(files: list[Path]) -> str:
    """Hex digest of the files' bytes in the given order; of one file, what `sha256sum` gives.

    Remembered for as long as names, sizes and times of change stay the same.
    """
    return _digest(tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    block = bytearray(1 << 22)
    for path, _, _ in files:
        with open(path, "rb", buffering=0) as file:
            while n_read := file.readinto(block):
                digest.update(memoryview(block)[:n_read])
    return digest.hexdigest()


def fingerprint_of_module(module: nn.Module) -> str:
    """Hex digest of a module's state."""
    return digest_of_tensors(module.state_dict())


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a transformers model, in the order of their names.

    Raises:
        FileNotFoundError: the folder has none, or lacks one that its index lists.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has no model.safetensors. Weights in a pickle (pytorch_model.bin) are not read, since opening "
            "one can run any code: convert them with transformers' save_pretrained where you trust them"
        )
    files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists: fetch it again")
    return files

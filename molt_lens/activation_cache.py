"""A cache of activations on disk: what a forward pass gave for some token ids, verified at each read.

    FOLDER/IDENTITY/identity.json           which host's activations, where and in which type, for people
    FOLDER/IDENTITY/SHA256.safetensors      x and y of one forward pass, named by the SHA-256 of its token ids

A file is found by what it was computed from, so it cannot be mistaken for that of another text, packing or batch, and
it carries the SHA-256 of its own content. There is no list of files: it would be written anew with each, and two runs
that fill one cache would overwrite each other's.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from molt_lens.fingerprint import digest_of_tensors
from molt_lens.hosts import Host, Site

MIN_FREE_BYTES = 10**9
"""What the cache leaves free on its disk."""


class ActivationCache:
    """Activations of one site of one host. Hooks that change the host's forward pass are not part of the identity.

    Attributes:
        folder: of this host, site and type.
    """

    def __init__(self, folder: Path, host: Host, site: Site, dtype: torch.dtype):
        identity = {
            "host_fingerprint": host.fingerprint,
            "host_dtype": str(host.dtype),
            "site": asdict(site),
            "dtype": str(dtype),
        }
        text = json.dumps({"host_name": host.name, **identity}, indent=2) + "\n"
        self.folder = folder / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.folder / "identity.json", text.encode())

    def require_space(self, n_bytes: int) -> None:
        """Raises OSError where the disk cannot take a cache of so many bytes, counting those that are there."""
        there = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if n_bytes - there > free - MIN_FREE_BYTES:
            raise OSError(
                f"a cache of {n_bytes / 1e9:.2f} GB does not fit the disk of {self.folder}: {free / 1e9:.2f} GB are "
                f"free, of which {MIN_FREE_BYTES / 1e9:.0f} GB stay so. Free some, name another folder, or go without"
            )

    def path(self, ids: Int64[Tensor, "batch pos"], keep: Bool[Tensor, "batch pos"]) -> Path:
        """Where the activations of these tokens are, or would be."""
        return self.folder / f"{digest_of_tensors({'ids': ids, 'keep': keep})}.safetensors"

    def read(self, path: Path) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]] | None:
        """x and y on the CPU; None where there is no file, or, said on stderr, a damaged one."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("x", "y")}
                promised = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError, ValueError) as error:
            return self._damaged(path, str(error))
        if digest_of_tensors(tensors) != promised:
            return self._damaged(path, "its content has another SHA-256 than it was written with")
        return tensors["x"], tensors["y"]

    def write(self, path: Path, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> None:
        """Store x and y, whole or not at all.

        Raises:
            OSError: the disk is too full.
        """
        tensors = {"x": x.cpu().contiguous(), "y": y.cpu().contiguous()}
        data = save(tensors, metadata={"sha256": digest_of_tensors(tensors)})
        free = shutil.disk_usage(self.folder).free
        if len(data) > free - MIN_FREE_BYTES:
            raise OSError(
                f"the disk of {self.folder} is down to {free / 1e9:.2f} GB free: free some, or go without a cache. "
                "What is cached stays valid"
            )
        _write_atomically(path, data)

    def _damaged(self, path: Path, why: str) -> None:
        print(f"warning: cached activations {path} are damaged and are computed again: {why}", file=sys.stderr)


def _write_atomically(path: Path, data: bytes) -> None:
    # Named by the process: two that fill one cache do not write into one file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

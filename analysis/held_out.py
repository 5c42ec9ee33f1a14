"""The held-out text of a run: the sequences that a replacement was not trained on, kept in the run's folder.

A comparison reads them there, so that it measures every replacement on text that none of them has seen.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cayley_interp.files import write_atomically
from molt_lens.fingerprint import digest_of_tensors

HELD_OUT = "held_out.safetensors"
"""input_ids int32 [sequence, pos]; its metadata say of which host they are ids and how long a sequence is."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Sequences of ids of one host's tokenizer."""

    input_ids: Int64[Tensor, "sequence pos"]
    host_name: str
    host_fingerprint: str

    def digest(self) -> str:
        """SHA-256 (hex) of the ids."""
        return digest_of_tensors({"input_ids": self.input_ids})

    def agrees_with(self, other: "HeldOut") -> bool:
        """Whether one text is the other, or its beginning: a run that measures on more holds out more sequences."""
        n = min(len(self.input_ids), len(other.input_ids))
        return torch.equal(self.input_ids[:n], other.input_ids[:n])


def write_held_out(run_dir: Path, held_out: HeldOut) -> None:
    """Write the file, whole or not at all."""
    ids = held_out.input_ids.to("cpu", torch.int32).contiguous()
    metadata = {
        "host_name": held_out.host_name,
        "host_fingerprint": held_out.host_fingerprint,
        "n_ctx": str(ids.shape[1]),
    }
    write_atomically(run_dir / HELD_OUT, save({"input_ids": ids}, metadata))


def read_held_out(run_dir: Path) -> HeldOut:
    """What `write_held_out` wrote.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the file is damaged or holds something else.
    """
    path = run_dir / HELD_OUT
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} has no {HELD_OUT}, the text that its run held out")
    try:
        with safe_open(path, "pt") as file:
            metadata, ids = file.metadata(), file.get_tensor("input_ids")
        if ids.dtype != torch.int32 or ids.ndim != 2 or ids.numel() == 0 or int(metadata["n_ctx"]) != ids.shape[1]:
            raise ValueError(f"input_ids are {ids.dtype} {tuple(ids.shape)} with metadata {json.dumps(metadata)}")
        return HeldOut(ids.long(), metadata["host_name"], metadata["host_fingerprint"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, delete it and resume the run, which writes it again: {error}") from error

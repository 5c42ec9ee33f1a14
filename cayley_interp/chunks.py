"""Rows of a batch, a cache-sized chunk at a time: how every product here bounds its memory and finds its speed."""

import torch

# A chunk that stays in a core's second-level cache is two to four times as fast on a CPU as one that does not. A GPU
# wants few large launches instead.
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}


def row_chunks(n_rows: int, bytes_per_row: int, device: torch.device) -> list[slice]:
    """Slices that cover n_rows, each of so many rows that the intermediate results of one stay in CHUNK_BYTES."""
    if torch.compiler.is_compiling():  # it unrolls the loop, and takes longer with every chunk
        return [slice(0, n_rows)]
    step = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // bytes_per_row)
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]

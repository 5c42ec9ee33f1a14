"""The activations of a text at one site of a host, forward pass by forward pass, from any token on."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from molt_lens.activation_cache import ActivationCache
from molt_lens.fingerprint import digest_of_tensors
from molt_lens.hosts import Host, Site
from molt_lens.packing import keep_mask

Sequences = Callable[[], Iterator[Int64[Tensor, " pos"]]]
"""Gives the same sequences of ids, all of one length, from the start at each call."""


@dataclass(frozen=True)
class ForwardBatch:
    """The sequences of one forward pass, and which of their kept tokens are wanted."""

    ids: Int64[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    first_sequence: int
    wanted: slice

    @property
    def n_tokens(self) -> int:
        return self.wanted.stop - self.wanted.start

    def kept_ids(self) -> Int64[Tensor, " token"]:
        return self.ids[self.keep][self.wanted]

    def positions(self) -> Int64[Tensor, " token"]:
        return self.keep.nonzero()[self.wanted, 1]


class ActivationStream:
    """The activations of a text, forward pass by forward pass, from any token on."""

    def __init__(
        self,
        host: Host,
        site: Site,
        sequences: Sequences,
        tokens: int | None,
        dtype: torch.dtype,
        batch_sequences: int,
        cache: Path | None,
    ):
        if dtype == torch.float16:
            raise ValueError(
                "activations cannot be held in float16: it ends at 65,504, and the MLP outputs of Gemma exceed that at "
                "some layers. Use bfloat16, of the same size"
            )
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"activations are held in bfloat16 or float32, got {dtype}")
        require_positive({"batch_sequences": batch_sequences} | ({} if tokens is None else {"tokens": tokens}))
        host.modules(site)
        self.host, self.site, self.sequences, self.tokens, self.dtype = host, site, sequences, tokens, dtype
        self.batch_sequences = batch_sequences
        self._first_ids: str | None = None
        self._cache = None if cache is None else ActivationCache(cache, host, site, dtype)
        if self._cache is not None and tokens is not None:
            self._cache.require_space(tokens * 2 * host.d_model * dtype.itemsize)

    def batches(self, start: int) -> Iterator[ForwardBatch]:
        """The forward passes that hold the tokens from `start` to `tokens`, cut alike wherever one starts.

        Raises:
            ValueError: sequences of several lengths, or fewer tokens than asked for.
        """
        seen = first_sequence = 0
        sequences = self.sequences()
        while group := list(islice(sequences, self.batch_sequences)):
            ids = _stacked(group)
            keep = keep_mask(self.host, ids)
            n_kept = int(keep.sum())
            end = n_kept if self.tokens is None else min(n_kept, self.tokens - seen)
            wanted = slice(max(0, start - seen), end)
            seen += end
            if wanted.start < wanted.stop:
                yield ForwardBatch(ids, keep, first_sequence, wanted)
            first_sequence += len(group)
            if seen == self.tokens:
                return
        if self.tokens is not None or seen == 0:
            asked = "any" if self.tokens is None else f"the {self.tokens:,} asked for"
            raise ValueError(f"the text has {seen:,} kept tokens, not {asked}: give more text, or ask for fewer tokens")

    def read(self, batch: ForwardBatch) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]:
        """The wanted activations of a forward pass, or of the cache, in `dtype` on the host's device.

        Raises:
            ValueError: one is nan or inf.
        """
        path = None if self._cache is None else self._cache.path(batch.ids, batch.keep)
        found = None if self._cache is None or path is None else self._cache.read(path)
        if found is None:
            x, y = self.host.capture(self.site, batch.ids)
            keep = batch.keep.to(x.device)
            found = x[keep].to(self.dtype), y[keep].to(self.dtype)
            for name, acts in zip(("input", "target"), found, strict=True):
                self._require_finite(name, acts, batch)
            if self._cache is not None and path is not None:
                self._cache.write(path, *found)
        x, y = (acts[batch.wanted].to(self.host.device) for acts in found)
        return x, y

    def made_of(self) -> dict[str, Any]:
        """What says that two streams are the same, in JSON types; of the text, the first forward pass."""
        if self._first_ids is None:
            self._first_ids = digest_of_tensors({"ids": next(self.batches(0)).ids})
        return {
            "host_fingerprint": self.host.fingerprint,
            "host_dtype": str(self.host.dtype),
            "site": asdict(self.site),
            "first_ids": self._first_ids,
            "tokens": self.tokens,
            "dtype": str(self.dtype),
            "batch_sequences": self.batch_sequences,
        }

    def _require_finite(self, name: str, acts: Tensor, batch: ForwardBatch) -> None:
        if acts.isfinite().all():
            return
        row = int((~acts.isfinite()).any(-1).nonzero()[0])
        sequence, position = batch.keep.nonzero()[row].tolist()
        raise ValueError(
            f"the {name} of the MLP of layer {self.site.layer} of {self.host.name} is nan or inf at position "
            f"{position} of sequence {batch.first_sequence + sequence}, token {int(batch.ids[sequence, position])}: "
            "run the host in float32 or bfloat16, and check its weights"
        )


def _stacked(sequences: list[Tensor]) -> Int64[Tensor, "batch pos"]:
    lengths = {len(sequence) for sequence in sequences}
    if len(lengths) != 1:
        raise ValueError(f"sequences of one length are needed, got {sorted(lengths)} tokens: use pack_documents")
    return torch.stack(sequences)


def require_positive(sizes: dict[str, int]) -> None:
    """Raises ValueError naming the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")

"""Activations of one site of a host, token by token: shuffled batches to train on, and samples to measure on.

    sequences = lambda: pack_documents(texts, host, ctx_len=256)
    store = ActivationStore(host, site, sequences, tokens=300_000, batch_size=1024, seed=0)
    moments = store.moments()
    for x, y in store:                          # float32 [1024, d_in] and [1024, d_out]
        ...

Forward passes fill a buffer, a chunk of the token stream; its tokens are served in a random order, then the next chunk
takes its place. The buffer is all that is held.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from molt_lens.activation_stream import ActivationStream, ForwardBatch, Sequences, require_positive
from molt_lens.hosts import Host, Site
from molt_lens.moments import Moments, RunningMoments
from molt_lens.standardize import Standardizer

BATCH_SEQUENCES = 8
"""Sequences in a forward pass unless another number is asked for."""
ROWS_AT_ONCE = 8192
"""Rows of the buffer that statistics take at once."""


def buffer_bytes(d_in: int, d_out: int, buffer_tokens: int, dtype: torch.dtype) -> int:
    """Bytes a store holds: its buffer, and the order in which it is served. Beside it, one forward pass at a time."""
    return buffer_tokens * ((d_in + d_out) * dtype.itemsize + 8)


class ActivationStore:
    """Shuffled batches of pairs (x, y) of a site: its input and its target at the same token.

    An epoch serves each kept token (`keep_mask`) once, but for the last few that fill no batch. Tokens of a chunk that
    fill no batch are carried over to the next. Two stores with the same arguments serve the same batches, bit for bit
    on one machine and thread count, and one that was resumed goes on likewise: sequences share forward passes in the
    same way wherever it starts. Where the buffer holds a whole epoch, the later ones need no forward pass.

    Args:
        sequences: gives the text from its start, as `lambda: pack_documents(texts(), host, ctx_len)`.
        tokens: kept tokens in an epoch; None for all there are.
        batch_size: tokens in a batch.
        seed: of the order of the tokens within each chunk and epoch.
        buffer_tokens: tokens held at once, the memory bound (`buffer_bytes`); more mixes tokens of more documents.
        dtype: in which activations are held: bfloat16 or float32.
        batch_sequences: sequences in one forward pass.
        epochs: passes over the text.
        cache: folder in which activations are kept and found again (`ActivationCache`).
        progress: called after each forward pass with the tokens of this epoch so far, and with `tokens`.

    Raises:
        ValueError: a size below 1, a dtype that cannot hold activations, a site that the host lacks.
        OSError: a cache that does not fit on its disk.
    """

    def __init__(
        self,
        host: Host,
        site: Site,
        sequences: Sequences,
        *,
        tokens: int | None,
        batch_size: int,
        seed: int,
        buffer_tokens: int = 262_144,
        dtype: torch.dtype = torch.bfloat16,
        batch_sequences: int = BATCH_SEQUENCES,
        epochs: int = 1,
        cache: Path | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ):
        sizes = {"batch_size": batch_size, "buffer_tokens": buffer_tokens, "epochs": epochs}
        require_positive(sizes)
        self.host, self.site = host, site
        self.batch_size, self.buffer_tokens, self.seed, self.epochs = batch_size, buffer_tokens, seed, epochs
        self._stream = ActivationStream(host, site, sequences, tokens, dtype, batch_sequences, cache)
        self._progress = progress
        self._epoch = self._chunk = 0
        self._start = 0
        """Tokens of the epoch before the chunk."""
        self._served = 0
        """Batches of the chunk that were served."""
        self._buffer: tuple[Tensor, Tensor] | None = None
        self._reader: _Reader | None = None
        self._held = 0
        """Tokens in the buffer."""

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]]:
        """The batches from the store's position on, float32 on the host's device; one iterator at a time.

        Raises:
            ValueError: activations that are not finite, fewer tokens than asked for or than a batch, or a buffer
                that is too small for a batch and a forward pass.
        """
        while self._epoch < self.epochs:
            self._fill()
            assert self._buffer is not None
            order = self._order()
            while (self._served + 1) * self.batch_size <= len(order):
                rows = order[self._served * self.batch_size :][: self.batch_size]
                self._served += 1  # before the batch is out: a state saved while it is in use comes after it
                x, y = (part.index_select(0, rows).float() for part in self._buffer)
                yield x, y
            self._go_on()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch served, in JSON types."""
        position = {"epoch": self._epoch, "chunk": self._chunk, "start": self._start, "served": self._served}
        return {**position, "made_of": self._made_of()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position `state` was saved at; the chunk in progress is computed again at the next batch.

        Raises:
            ValueError: the state is not one of a store with these arguments and this text.
        """
        position = ("epoch", "chunk", "start", "served")
        if missing := {*position, "made_of"} - state.keys():
            raise ValueError(f"this is not the state of an activation store: it lacks {', '.join(sorted(missing))}")
        then, now = state["made_of"], self._made_of()
        if differing := [name for name in now if then.get(name) != now[name]]:
            listed = "; ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in differing)
            raise ValueError(f"the state belongs to other activations: {listed}. Resume with what the run began with")
        self._epoch, self._chunk, self._start, self._served = (state[name] for name in position)
        self._reader = None

    def moments(self, min_tokens: int = 100_000) -> Moments:
        """Mean and deviation of each dimension over the first `min_tokens` tokens, whatever the buffer's size.

        Raises:
            ValueError: what `first` raises.
        """
        x_moments, y_moments = RunningMoments(), RunningMoments()
        for x, y in self.first(min_tokens):
            x_moments.add(x)
            y_moments.add(y)
        return Moments(*x_moments.mean_and_std(), *y_moments.mean_and_std(), x_moments.n)

    def covariances(
        self, input: Standardizer, output: Standardizer, n_tokens: int
    ) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, "d_in d_out"]]:
        """Of x, and of x with y, over the first n_tokens, whose means the standardisers have to take away; float64.

        Raises:
            ValueError: what `first` raises.
        """
        covariance = cross_covariance = torch.zeros((), dtype=torch.float64)
        for x, y in self.first(n_tokens):
            z = input(x)
            covariance = covariance + (z.T @ z).double().cpu()
            cross_covariance = cross_covariance + (z.T @ output(y)).double().cpu()
        return covariance / n_tokens, cross_covariance / n_tokens

    def first_inputs(self, n_tokens: int) -> Float[Tensor, "token d_in"]:
        """x of the first n_tokens; raises what `first` raises."""
        return torch.cat([x for x, _ in self.first(n_tokens)])

    def first(self, n_tokens: int) -> Iterator[tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]]:
        """The first tokens of the text in its order, some thousands at a time, float32.

        A store at the start of an epoch reads its first chunk, which it serves later without another forward pass; what
        is not in the buffer is computed.

        Raises:
            ValueError: an epoch has fewer tokens, or what `__iter__` raises.
        """
        require_positive({"n_tokens": n_tokens})
        if self._stream.tokens is not None and n_tokens > self._stream.tokens:
            raise _too_few(self._stream.tokens, n_tokens)
        seen = 0
        if self._start == 0:
            self._fill()
            assert self._buffer is not None
            seen = min(self._held, n_tokens)
            for x, y in zip(*(part[:seen].split(ROWS_AT_ONCE) for part in self._buffer), strict=True):
                yield x.float(), y.float()
        for batch in self._stream.batches(seen) if seen < n_tokens else ():
            x, y = (part[: n_tokens - seen].float() for part in self._stream.read(batch))
            seen += len(x)
            yield x, y
            if seen == n_tokens:
                return
        if seen < n_tokens:
            raise _too_few(seen, n_tokens)

    def _fill(self) -> None:
        """Have the chunk at the store's position in the buffer."""
        if self._reader is not None and self._reader.filled:
            return
        if self._reader is None:
            self._reader, self._held = _Reader(self._stream.batches(self._start)), 0
        rows = min(self.buffer_tokens, self._stream.tokens or self.buffer_tokens)
        while (batch := self._reader.peek()) is not None:
            if self.batch_size + batch.ids.numel() > self.buffer_tokens:
                raise ValueError(
                    f"buffer_tokens={self.buffer_tokens} cannot hold a batch of {self.batch_size} and a forward pass "
                    f"of {batch.ids.numel()} tokens: raise it, or lower batch_size or batch_sequences"
                )
            if self._held + batch.n_tokens > rows:
                break
            self._append(*self._stream.read(batch), rows)
            self._reader.take()
            if self._progress is not None:
                self._progress(self._start + self._held, self._stream.tokens)
        if self._start + self._held < self.batch_size:
            raise ValueError(
                f"the text has {self._held} tokens, less than a batch of {self.batch_size}: give more text"
            )
        self._reader.filled = True

    def _append(self, x: Tensor, y: Tensor, rows: int) -> None:
        if self._buffer is None:
            self._buffer = x.new_empty(rows, x.shape[1]), y.new_empty(rows, y.shape[1])
        for part, new in zip(self._buffer, (x, y), strict=True):
            part[self._held : self._held + len(new)].copy_(new)
        self._held += len(x)

    def _order(self) -> Int64[Tensor, " served"]:
        """Rows of the buffer in the order in which they are served."""
        assert self._buffer is not None
        assert self._reader is not None
        name = f"{self.seed} {self._epoch} {self._chunk}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8]) >> 1)
        # The rows that are carried over are the last ones of the text, whatever the order: a resumed store finds them
        # without the chunk before.
        n = self._held if self._reader.peek() is None else self._held - self._held % self.batch_size
        return torch.randperm(n, generator=generator).to(self._buffer[0].device)

    def _go_on(self) -> None:
        """To the next chunk, or to the next epoch's first."""
        assert self._buffer is not None
        assert self._reader is not None
        self._served = 0
        if self._reader.peek() is not None:
            carried = self._held % self.batch_size
            for part in self._buffer:
                part[:carried].copy_(part[self._held - carried : self._held])
            self._chunk, self._start = self._chunk + 1, self._start + self._held - carried
            self._held, self._reader.filled = carried, False
            return
        if self._chunk > 0:
            self._reader = None
        self._epoch, self._chunk, self._start = self._epoch + 1, 0, 0

    def _made_of(self) -> dict[str, Any]:
        return {
            **self._stream.made_of(),
            "batch_size": self.batch_size,
            "buffer_tokens": self.buffer_tokens,
            "seed": self.seed,
        }


class Sample(NamedTuple):
    """Activations in the order of the text."""

    x: Float[Tensor, "token d_in"]
    y: Float[Tensor, "token d_out"]
    ids: Int64[Tensor, " token"]
    positions: Int64[Tensor, " token"]
    """Place of each token in its sequence; 0 is the BOS, which is left out."""


def collect(
    host: Host,
    site: Site,
    sequences: Sequences,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    batch_sequences: int = BATCH_SEQUENCES,
    cache: Path | None = None,
) -> Sample:
    """The first kept tokens of a text, in its order, on the host's device: what is measured on.

    Args:
        tokens: how many, all held at once.

    Raises:
        ValueError: fewer tokens than that in the text, or what an ActivationStore raises.
    """
    stream = ActivationStream(host, site, sequences, tokens, dtype, batch_sequences, cache)
    parts = [(*stream.read(batch), batch.kept_ids(), batch.positions()) for batch in stream.batches(0)]
    return Sample(*(torch.cat(part).to(host.device) for part in zip(*parts, strict=True)))


class _Reader:
    """Forward passes with a look at the next one, and whether the buffer is filled from them."""

    def __init__(self, batches: Iterator[ForwardBatch]):
        self._batches, self._next = batches, next(batches, None)
        self.filled = False

    def peek(self) -> ForwardBatch | None:
        return self._next

    def take(self) -> None:
        self._next = next(self._batches, None)


def _too_few(n_tokens: int, asked: int) -> ValueError:
    return ValueError(
        f"an epoch has {n_tokens:,} tokens, and the first {asked:,} are asked for: give more text, or ask for fewer "
        "(statistics of fewer tokens are less certain)"
    )

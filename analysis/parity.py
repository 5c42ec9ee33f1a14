"""Paired comparison of models on the same tokens.

python -m analysis.parity runs/tiny-a runs/tiny-b --tokens 65536
"""

import json
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import Float64, Int64
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from cayley_interp import CayleyGPT
from cayley_interp.pretrained import load_model


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over tokens, in nats, with its standard error."""

    mean: float
    standard_error: float
    n_sequences: int
    n_tokens: int


@torch.no_grad()
def token_losses(
    model: CayleyGPT,
    windows: Int64[Tensor, "n pos_plus_1"],
    batch_size: int,
    device: torch.device | str | None = None,
) -> Float64[Tensor, "n pos"]:
    """Loss of every predicted token in nats, float64, on the CPU.

    The model runs in eval mode, on `device` if one is given, and comes back in the mode it was in.

    Raises:
        ValueError: windows that are not [n, pos + 1] with n, pos >= 1.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"expected windows of shape [n, pos + 1] with n, pos >= 1, got {tuple(windows.shape)}")
    device = next(model.parameters()).device if device is None else device
    was_training = model.training
    model.to(device).eval()
    try:
        return torch.cat([model.loss(batch.to(device)).cpu().double() for batch in windows.split(batch_size)])
    finally:
        model.train(was_training)


def paired_difference(a: Float64[Tensor, "n pos"], b: Float64[Tensor, "n pos"]) -> PairedDifference:
    """Mean of a - b and its standard error over sequence means.

    Tokens within a sequence share their context, so the sequences are the independent units: a standard error over
    tokens would be too small. It is nan for a single sequence.

    Raises:
        ValueError: losses of different shapes.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"expected losses of the same windows, both [n, pos]; got {tuple(a.shape)}, {tuple(b.shape)}")
    by_sequence = (a - b).mean(dim=1)
    n = len(by_sequence)
    error = (by_sequence.std() / n**0.5).item() if n > 1 else float("nan")
    return PairedDifference(by_sequence.mean().item(), error, n, a.numel())


@dataclass(frozen=True)
class Run:
    """A finished run: its model, and what its losses must share with another run's to be compared token by token."""

    name: str
    model: CayleyGPT
    tokenizer: str
    shards: list[Path]
    shard_sums: list[str]
    dtype: str


def read_run(run: Path, device: torch.device | str = "cpu") -> Run:
    """Open a run folder: model/, and the validation shards of data/ or of the shard folder it was trained on.

    Raises:
        FileNotFoundError: a part of the folder is missing.
        ValueError: an index.json of another form.
    """
    model = load_model(run / "model", device)
    tokenizer = run / "model" / "tokenizer.json"
    data = run / "data"
    if not (data / "index.json").is_file() and (run / "config.json").is_file():
        data = Path(json.loads((run / "config.json").read_text())["data"]["data"])
    for file in (tokenizer, data / "index.json"):
        if not file.is_file():
            raise FileNotFoundError(
                f"{run} cannot be compared: there is no {file}. Expected a finished run on token shards or local text"
            )
    index = json.loads((data / "index.json").read_text())
    try:
        entries = index["splits"]["val"]
        shards, sums = [data / entry["file"] for entry in entries], [entry["sha256"] for entry in entries]
        return Run(str(run), model, tokenizer.read_text(), shards, sums, index["dtype"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{data / 'index.json'} is not an index of token shards: it lacks {error}") from error


def check_comparable(runs: list[Run]) -> None:
    """Whether the runs' losses are of the same tokens in the same contexts.

    Raises:
        ValueError: fewer than two runs, or two that differ in tokenizer, validation shards or n_ctx.
    """
    if len(runs) < 2:
        raise ValueError(f"expected at least two run folders to compare, got {len(runs)}")
    first = runs[0]
    for other in runs[1:]:
        for what, a, b in (
            ("tokenizers", first.tokenizer, other.tokenizer),
            ("validation shards", first.shard_sums, other.shard_sums),
            ("context lengths n_ctx", first.model.config.n_ctx, other.model.config.n_ctx),
        ):
            if a != b:
                raise ValueError(
                    f"{first.name} and {other.name} have different {what}, so their losses are not of the same tokens "
                    "in the same contexts: train both on one shard folder (--data DIR)"
                )


def read_windows(run: Run, n_tokens: int) -> Int64[Tensor, "n pos_plus_1"]:
    """The first windows of the validation shards with at most n_tokens predicted tokens: n_ctx + 1 ids, n_ctx apart.

    Raises:
        ValueError: not one whole window.
    """
    n_ctx = run.model.config.n_ctx
    parts, missing = [], n_tokens // n_ctx
    for shard in run.shards:
        tokens = np.memmap(shard, run.dtype, "r")
        n = min(missing, (len(tokens) - 1) // n_ctx)
        parts += [tokens[i * n_ctx : (i + 1) * n_ctx + 1].astype(np.int64) for i in range(n)]
        missing -= n
    if not parts:
        raise ValueError(f"no window of n_ctx + 1 = {n_ctx + 1} validation tokens in {run.name}: raise --tokens")
    return torch.from_numpy(np.stack(parts))


def compare(
    runs: tyro.conf.Positional[tuple[Path, ...]], tokens: int = 65_536, batch_size: int = 16, device: str = "cpu"
) -> None:
    """Compare the models of finished runs token by token: each one's loss, and every pair's difference.

    Args:
        runs: Two or more run folders.
        tokens: Validation tokens to compare on.
        batch_size: Sequences at once; the figures do not depend on it.
        device: Device to run the models on.
    """
    opened = [read_run(run, device) for run in runs]
    check_comparable(opened)
    windows = read_windows(opened[0], tokens)
    losses = [token_losses(run.model, windows, batch_size) for run in opened]
    table = Table("", "nats per token", "± standard error", title=f"{losses[0].numel():,} validation tokens")
    for run, loss in zip(opened, losses, strict=True):
        table.add_row(escape(run.name), f"{loss.mean():.4f}", "")
    table.add_section()
    for (i, a), (j, b) in combinations(enumerate(opened), 2):
        difference = paired_difference(losses[i], losses[j])
        row = f"{difference.mean:+.4f}", f"{difference.standard_error:.4f}"
        table.add_row(escape(f"{a.name} − {b.name}"), *row)
    Console().print(table)


if __name__ == "__main__":
    try:
        tyro.cli(compare, prog="python -m analysis.parity")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")

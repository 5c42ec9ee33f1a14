"""Paired comparison of models on the same tokens.

    python -m analysis.parity runs/tiny-a runs/tiny-b --tokens 131072

The models that come with the package have no run folder, and so no text beside them; this makes it again:

    python training/data.py tokenize sotu --tokenizer bpe --d-vocab 4096 --out shards
    python -m analysis.parity cayley-tiny-2L-sotu vanilla-tiny-sotu --data shards --tokens 131072
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import torch
import tyro
from jaxtyping import Int64
from rich.console import Console
from torch import Tensor

from analysis.breakdown import Bin, by_frequency, by_position
from analysis.command_line import run_command
from analysis.progress import make_progress
from analysis.shards import TokenShards, read_shards, read_windows, shard_folder_of, training_counts
from analysis.tables import Sheet, to_markdown, to_rich
from cayley_interp import CayleyGPT
from cayley_interp.files import write_atomically
from cayley_interp.losses import PairedDifference, paired_difference, window_losses
from cayley_interp.pretrained import load_pretrained


@dataclass(frozen=True)
class Subject:
    """A model to compare, and the shards that its run validated on, if it came with any."""

    name: str
    model: CayleyGPT
    shards: TokenShards | None


@dataclass(frozen=True)
class Pair:
    """Difference a - b of two models; the breakdowns are those of `analysis.breakdown`, empty unless asked for."""

    a: str
    b: str
    difference: PairedDifference
    by_position: list[Bin]
    by_frequency: list[Bin]


@dataclass(frozen=True)
class Comparison:
    """Mean losses of models in nats per token, and every pair's difference, on the same tokens."""

    n_sequences: int
    n_tokens: int
    models: list[str]
    losses: list[float]
    pairs: list[Pair]


# ---- What is compared, and on what ----


def open_subject(name: str, device: torch.device | str = "cpu") -> Subject:
    """A bundled model by name, or that of a run's or a model's folder.

    Raises:
        FileNotFoundError: there is no such model, or a file of it is missing.
        ValueError: a file is damaged, or the model has no tokenizer.
    """
    model = load_pretrained(name, wrap=None, device=device)
    if model.tokenizer is None:
        raise ValueError(
            f"{name} has no tokenizer.json, so nothing says which tokens its ids are: add it to its folder"
        )
    folder = shard_folder_of(Path(name))
    return Subject(name, model, None if folder is None else read_shards(folder))


def common_shards(subjects: list[Subject], data: Path | None = None) -> TokenShards:
    """The shards that all the models can be compared on: `data`, or else those of their runs.

    Raises:
        FileNotFoundError: `data` is no folder of shards.
        ValueError: fewer than two models, nowhere any shards, or two that differ in validation shards, tokenizer or
            n_ctx, so that their losses would not be of the same tokens in the same contexts.
    """
    if len(subjects) < 2:
        raise ValueError(f"expected at least two models to compare, got {len(subjects)}")
    own = [(subject.name, subject.shards) for subject in subjects if subject.shards is not None]
    name, shards = (str(data), read_shards(data)) if data is not None else own[0] if own else ("", None)
    if shards is None:
        raise ValueError(
            "no text to compare on: none of these is a run folder with token shards. Give --data FOLDER, made by "
            "python training/data.py tokenize TEXT --tokenizer TOKENIZER.json --out FOLDER"
        )
    remedy = "their losses would not be of the same tokens in the same contexts"
    for other, theirs in own if data is None else ():
        if theirs.val_sums != shards.val_sums:
            raise ValueError(
                f"{name} and {other} have different validation shards, {remedy}: give one as --data FOLDER"
            )
    n_ctx = subjects[0].model.config.n_ctx
    for subject in subjects:
        assert subject.model.tokenizer is not None
        if subject.model.tokenizer.to_str() != shards.tokenizer.to_str():
            raise ValueError(f"{subject.name} and {shards.folder} have different tokenizers, {remedy}")
        if subject.model.config.n_ctx != n_ctx:
            raise ValueError(
                f"{subjects[0].name} and {subject.name} have different context lengths n_ctx, {n_ctx} and "
                f"{subject.model.config.n_ctx}, {remedy}"
            )
    return shards


def compare(
    subjects: list[Subject],
    shards: TokenShards,
    n_tokens: int,
    batch_size: int,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> Comparison:
    """`compare_on` the first validation windows of the shards.

    Raises:
        ValueError: not one whole window of validation tokens, or no training token to count.
    """
    windows = read_windows(shards, subjects[0].model.config.n_ctx, n_tokens)
    d_vocab = max(subject.model.config.d_vocab for subject in subjects)
    counts = training_counts(shards, d_vocab) if len(subjects) == 2 else None
    return compare_on(subjects, windows, batch_size, counts, progress)


def compare_on(
    subjects: list[Subject],
    windows: Int64[Tensor, "n pos_plus_1"],
    batch_size: int,
    counts: Int64[Tensor, " d_vocab"] | None = None,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> Comparison:
    """Losses and differences; two models' difference is broken down too.

    Args:
        counts: of every token in a training text, for the breakdown by frequency; without it there is none.
        progress: what is measured, and the share of all that is done.
    """
    losses = []
    for i, subject in enumerate(subjects):
        parts = []
        for some in windows.split(batch_size):
            parts.append(window_losses(subject.model, some, batch_size))
            progress(subject.name, (i + sum(map(len, parts)) / len(windows)) / len(subjects))
        losses.append(torch.cat(parts))
    pairs = []
    for i, j in combinations(range(len(subjects)), 2):
        a, b, bins = losses[i], losses[j], ([], [])
        if len(subjects) == 2:
            bins = by_position(a, b), [] if counts is None else by_frequency(a, b, windows[:, 1:], counts)
        pairs.append(Pair(subjects[i].name, subjects[j].name, paired_difference(a, b), *bins))
    models, means = [subject.name for subject in subjects], [loss.mean().item() for loss in losses]
    return Comparison(len(windows), losses[0].numel(), models, means, pairs)


# ---- How it is shown ----


def sheets(comparison: Comparison) -> Iterator[Sheet]:
    """The tables of a comparison: losses, differences, and where there are any, the breakdowns."""
    tokens = f"Loss over {comparison.n_tokens:,} tokens in {comparison.n_sequences:,} sequences"
    losses = zip(comparison.models, comparison.losses, strict=True)
    yield Sheet(tokens, ["model", "loss (nats per token)"], [[name, f"{loss:.4f}"] for name, loss in losses])
    differences = [[f"{p.a} − {p.b}", show(p.difference)] for p in comparison.pairs]
    yield Sheet("Paired differences", ["pair", "difference ± standard error"], differences)
    for pair in comparison.pairs:
        for title, bins in (
            ("By position in the context", pair.by_position),
            ("By frequency of the predicted token, tenths of the training text, commonest first", pair.by_frequency),
        ):
            if bins:
                header = ["bin", "tokens", pair.a, pair.b, "difference ± standard error"]
                yield Sheet(title, header, [bin_row(b) for b in bins])


def bin_row(b: Bin) -> list[str]:
    return [b.label, f"{b.difference.n_tokens:,}", f"{b.loss_a:.4f}", f"{b.loss_b:.4f}", show(b.difference)]


def show(difference: PairedDifference) -> str:
    return f"{difference.mean:+.4f} ± {difference.standard_error:.4f}"


def main(
    models: tyro.conf.Positional[tuple[str, ...]],
    data: Path | None = None,
    tokens: int = 65_536,
    batch_size: int = 16,
    device: str = "cpu",
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    markdown: Path | None = None,
) -> None:
    """Compare models token by token: each one's loss, every pair's difference, and where two of them differ.

    Args:
        models: Two or more of: a bundled model's name, a run folder, a model's folder.
        data: Folder of token shards whose validation split to compare on; by default that of the run folders.
        tokens: Validation tokens to compare on.
        batch_size: Sequences at once; the figures do not depend on it.
        device: Device to run the models on.
        json_file: Write every figure to this file.
        markdown: Write the tables to this file.
    """
    subjects = [open_subject(name, device) for name in models]
    shards = common_shards(subjects, data)
    with make_progress() as bar:
        task = bar.add_task("", total=1)
        comparison = compare(
            subjects,
            shards,
            tokens,
            batch_size,
            lambda what, share: bar.update(task, completed=share, description=what),
        )
    tables = list(sheets(comparison))
    console = Console()
    for sheet in tables:
        console.print(to_rich(sheet))
    if json_file is not None:
        write_atomically(json_file, json.dumps(asdict(comparison), indent=2) + "\n")
    if markdown is not None:
        write_atomically(markdown, "\n".join(map(to_markdown, tables)))


if __name__ == "__main__":
    run_command(main, "analysis.parity")

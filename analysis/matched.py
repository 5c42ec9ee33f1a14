"""Checkpoints at equal loss, and the token tax: how many times the tokens one run took to reach the loss of another.

    python -m analysis.matched runs/cayley-tiny-2L-sotu runs/vanilla-tiny-sotu --out vanilla-matched

Losses are the validation losses that the runs logged, so both runs must have validated on the same text. A checkpoint
from the flat part of its schedule is a "hot stop": annealed to the same loss it would have needed fewer tokens. Compare
with a run that ended by a cold stop (the trainer's `target_val_loss`), whose matched checkpoint is its last.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_model

from analysis.command_line import run_command
from cayley_interp import CayleyGPT, CayleyGPTConfig
from cayley_interp.folder import save_pretrained
from cayley_interp.tokenizer import read_tokenizer

TOLERANCE = 0.02
"""Nats that two losses called equal may differ by; the published comparisons at equal loss allowed 0.03."""


@dataclass(frozen=True)
class Validation:
    """A validation loss that a run logged, in nats per token, after so many training tokens."""

    step: int
    tokens: int
    val_loss: float


@dataclass(frozen=True)
class Checkpoint(Validation):
    """A validation loss whose weights were kept in `folder`."""

    folder: Path


@dataclass(frozen=True)
class TokenTax:
    """Training tokens of a run over those of another at the same validation loss."""

    run: Validation
    """The end of the run."""
    matched: Validation
    """The other run's validation nearest to it in loss."""
    ratio: float
    """run.tokens / matched.tokens."""
    crossing_tokens: float | None
    """Tokens at which the other run's curve first falls to the loss, linear between two validations; None: nowhere."""
    crossing_ratio: float | None
    """run.tokens / crossing_tokens."""


Point = TypeVar("Point", bound=Validation)


def find_matched(run: Path, loss: float, tolerance: float = TOLERANCE) -> Checkpoint:
    """The kept checkpoint of a run whose logged validation loss is nearest to `loss`, in nats per token.

    Raises:
        FileNotFoundError: the folder is no run's.
        ValueError: no kept checkpoint has a validation loss, or none is within `tolerance` of `loss`.
    """
    folders = {
        int(folder.name.removeprefix("step-")): folder
        for folder in (run / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d{7,}", folder.name)
    }
    kept = [Checkpoint(v.step, v.tokens, v.val_loss, folders[v.step]) for v in validations(run) if v.step in folders]
    if not kept:
        raise ValueError(
            f"none of the {len(folders)} checkpoints kept by {run} has a validation loss in its metrics.jsonl: train "
            "with --eval-every equal to --checkpoint-every, and a --keep-checkpoints that keeps them all"
        )
    return nearest(kept, loss, tolerance, f"the {len(kept)} validated checkpoints of {run}")


def token_tax(run: Path, other: Path, tolerance: float = TOLERANCE) -> TokenTax:
    """Tokens that `run` took in all, over those `other` needed for the same loss; only the runs' records are read.

    Raises:
        FileNotFoundError: a folder is no run's.
        ValueError: runs that validated on different text, or did not, or `other` is never within `tolerance` of the
            last loss of `run`.
    """
    check_same_validation(run, other)
    ends, curve = validations(run), validations(other)
    for name, points in ((run, ends), (other, curve)):
        if not points:
            raise ValueError(f"{name}/metrics.jsonl has no validation loss: the run was stopped before the first")
    end = ends[-1]
    matched = nearest(curve, end.val_loss, tolerance, f"the {len(curve)} validations of {other}")
    tokens = crossing(curve, end.val_loss)
    return TokenTax(end, matched, end.tokens / matched.tokens, tokens, None if tokens is None else end.tokens / tokens)


def check_same_validation(a: Path, b: Path) -> None:
    """Whether two runs' configs cut the same validation tokens, as far as configs say.

    Raises:
        ValueError: naming what differs.
    """
    configs = read_config(a), read_config(b)
    for part, name in (("model", "n_ctx"), ("model", "d_vocab"), ("data", "val_fraction"), ("data", "val_tokens")):
        x, y = (config.get(part, {}).get(name) for config in configs)
        if x != y:
            raise ValueError(
                f"{a} has {name} {x} and {b} has {y}, so they logged losses of different tokens: train both with one "
                "value, or compare models of theirs with python -m analysis.parity"
            )


def validations(run: Path) -> list[Validation]:
    """The validation losses in a run's metrics.jsonl, first to last.

    Raises:
        FileNotFoundError: config.json or metrics.jsonl is missing.
        ValueError: one of them is not that of a run.
    """
    config, file = read_config(run), run / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no metrics.jsonl")
    found = []
    try:
        tokens_per_step = config["batch_size"] * config["grad_accum"] * config["model"]["n_ctx"]
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if record.get("val_loss") is not None:  # null where the loss was not finite
                found.append(Validation(record["step"], record["step"] * tokens_per_step, record["val_loss"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run} is not the folder of a run, its config.json and metrics.jsonl: {error!r}") from error
    return found


def nearest(points: Sequence[Point], loss: float, tolerance: float, what: str) -> Point:
    """The point nearest to a loss.

    Raises:
        ValueError: it is farther than `tolerance`.
    """
    best = min(points, key=lambda point: abs(point.val_loss - loss))
    if abs(best.val_loss - loss) <= tolerance:
        return best
    losses = [point.val_loss for point in points]
    if min(losses) > loss:
        where, way_out = f"all above: the lowest is {min(losses):.4f}", "train longer"
    elif max(losses) < loss:
        where, way_out = f"all below: the highest is {max(losses):.4f}", "validate and keep checkpoints from earlier on"
    else:
        where, way_out = f"on both sides, but none near: {best.val_loss:.4f} is nearest", "validate more often"
    raise ValueError(
        f"no match for a loss of {loss:.4f} within {tolerance}: {what} are {where}. In the run to match, {way_out}, or "
        "allow more with a larger tolerance"
    )


def crossing(curve: Sequence[Validation], loss: float) -> float | None:
    """Tokens at which a validation curve first falls to `loss`, linear in between; None if it never does."""
    for before, after in pairwise(curve):
        if before.val_loss > loss >= after.val_loss:
            share = (before.val_loss - loss) / (before.val_loss - after.val_loss)
            return before.tokens + share * (after.tokens - before.tokens)
    return None


def load_checkpoint(run: Path, checkpoint: Checkpoint) -> CayleyGPT:
    """The model of a run's checkpoint, in eval mode, with the tokenizer of the run's data.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the config or the weights do not describe one model.
    """
    config, weights = read_config(run), checkpoint.folder / "model.safetensors"
    folders = (run / "data", Path(config.get("data", {}).get("data", "")))
    tokenizers = [folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file()]
    if not tokenizers:
        raise FileNotFoundError(f"no tokenizer.json in {' or '.join(map(str, folders))}: where is the data of {run}?")
    try:
        model = CayleyGPT(CayleyGPTConfig(**config["model"]))
        load_model(model, str(weights))
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights} does not fit the config.json of {run}: {error}") from error
    model.tokenizer = read_tokenizer(tokenizers[0])
    return model.eval()


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object.
    """
    file = run / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no config.json")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a run's config: expected a JSON object")
    return config


def match(
    run: tyro.conf.Positional[Path],
    other: tyro.conf.Positional[Path],
    tolerance: float = TOLERANCE,
    out: Path | None = None,
) -> None:
    """Compare the tokens two runs took to the same validation loss, and keep the model that the second had there.

    Args:
        run: Run folder; the loss to match is its last.
        other: Run folder of the model to match it, usually the vanilla one.
        tolerance: Nats that losses called equal may differ by.
        out: Write the nearest kept checkpoint of `other` as a model's folder.
    """
    tax = token_tax(run, other, tolerance)
    console = Console(highlight=False, soft_wrap=True)
    for name, point in ((run, tax.run), (other, tax.matched)):
        console.print(
            f"{name}: step {point.step:,}, {point.tokens:,} tokens, validation loss {point.val_loss:.4f}", markup=False
        )
    console.print(f"token tax {tax.ratio:.2f}x")
    if tax.crossing_tokens is not None:
        console.print(f"by the crossing of the curve, at {tax.crossing_tokens:,.0f} tokens: {tax.crossing_ratio:.2f}x")
    if out is not None:
        checkpoint = find_matched(other, tax.run.val_loss, tolerance)
        known = {"recipe": read_config(other).get("name"), "tokens": checkpoint.tokens, "val_loss": checkpoint.val_loss}
        save_pretrained(load_checkpoint(other, checkpoint), out, training=known)
        console.print(f"{checkpoint.folder} -> {out}", markup=False)


if __name__ == "__main__":
    run_command(match, "analysis.matched")

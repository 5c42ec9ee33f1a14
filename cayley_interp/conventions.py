"""Which of the undocumented readings of a foreign checkpoint is right, decided by measured loss.

A checkpoint without its code leaves open how the bottleneck is meant: dictionary map, order of the bits of a feature's
index, routing, standardisation, sign, and which tensor is which. Every reading that its flags allow is tried on the
same text, and the one with the lowest next-token loss is kept if its margin over the next is clear. Readings that make
the same function of this checkpoint count as one. The choice is saved beside the checkpoint as `conventions.json`.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from cayley_interp.bottleneck import CayleySAE, Level, parse_levels
from cayley_interp.files import write_atomically
from cayley_interp.foreign_tensors import Family, Role, role_assignments
from cayley_interp.losses import paired_difference, window_losses
from cayley_interp.model import CayleyGPT, CayleyGPTConfig

if TYPE_CHECKING:
    from rich.console import Console

BitOrder = Literal["parent_low", "parent_high", "reversed"]

# In order of preference: among readings that make the same function, the first is kept.
CHOICES: dict[str, tuple[Any, ...]] = {
    "dictionary": ("gold", "bent"),
    "bit_order": ("parent_low", "parent_high", "reversed"),
    "routing": ("per_parent", "parents"),
    "score_standardize": ("feature", "token", "none"),
    "forward_standardized": (True, False),
    "signed": (False, True),
}
N_TOKENS = 8_192
"""Tokens that decide."""
SCREEN_TOKENS = 1_024
"""Tokens that pick the finalists."""
FINALISTS = 12
WINDOW = 256
"""Longest window, in predicted tokens: more windows make a better standard error than longer ones."""
MARGIN = 0.005
"""Least clear margin, in nats per token."""
SIGMAS = 4
"""Least clear margin, in standard errors of the paired difference."""
SAME = 1e-5
"""Mean absolute difference of two readings' losses, in nats per token, that rounding explains."""
LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to understand the bottleneck of a foreign checkpoint."""

    dictionary: Literal["gold", "bent"]
    """Map of the dictionary."""
    bit_order: BitOrder
    """Order of a level's features in the file. `parent_low`: ours, the parent is the low bits of its child;
    `parent_high`: the children of a parent stand together; `reversed`: all bits of ours reversed."""
    routing: Literal["per_parent", "parents"]
    score_standardize: Literal["feature", "token", "none"]
    forward_standardized: bool
    signed: bool
    roles: tuple[Role, ...]
    """Role of each family of the bottleneck's tensors."""

    def config(self, backbone: CayleyGPTConfig, levels: str) -> CayleyGPTConfig:
        """Config of the model under this reading.

        Raises:
            ValueError: these levels cannot be built under it.
        """
        options = {name: getattr(self, name) for name in CHOICES if name != "bit_order"}
        return replace(backbone, levels=levels, **options)


class Bottlenecks(NamedTuple):
    """What a checkpoint says about its bottlenecks."""

    levels: str
    choices: dict[str, tuple[Any, ...]]
    """CHOICES, narrowed by the flags that the checkpoint documents."""
    families: list[Family]


class Measured(NamedTuple):
    """Readings that make the same function on the tokens they were measured on, the preferred one first."""

    readings: tuple[Reading, ...]
    losses: Float64[Tensor, "n pos"]

    @property
    def loss(self) -> float:
        return self.losses.mean().item()


def possible_readings(backbone: CayleyGPTConfig, bottlenecks: Bottlenecks) -> list[Reading]:
    """Every reading that flags, levels and tensors allow, the preferred first.

    Raises:
        ValueError: none.
    """
    assignments = role_assignments(bottlenecks.families)
    readings: list[Reading] = []
    error: ValueError | None = None
    for values in product(*bottlenecks.choices.values()):
        options = dict(zip(bottlenecks.choices, values, strict=True))
        seen = set()
        for roles in assignments:
            by_feature = options["score_standardize"] == "feature"
            if by_feature and set(roles) <= {"bias"}:
                continue  # there are no running statistics to standardise by
            # Where they are not used it does not matter which tensor would be which of them.
            used = roles if by_feature else tuple(role == "bias" for role in roles)
            if used in seen:
                continue
            seen.add(used)
            reading = Reading(roles=roles, **options)
            try:
                reading.config(backbone, bottlenecks.levels)
            except ValueError as found:
                error = error or found
            else:
                readings.append(reading)
    if not readings:
        raise ValueError(f"no reading can build levels {bottlenecks.levels!r} on this backbone: {error}")
    return readings


def install(model: CayleyGPT, bottlenecks: Bottlenecks, reading: Reading) -> None:
    """Give every block of the model its bottleneck under a reading, in our order of features."""
    config = reading.config(replace(model.config, levels=None), bottlenecks.levels)
    sae_config = config.bottleneck()
    assert sae_config is not None
    order = file_order(parse_levels(bottlenecks.levels), reading.bit_order)
    for i, block in enumerate(model.blocks()):
        sae = CayleySAE(sae_config)
        targets = {"bias": sae.bias.data, "mean": sae.mean, "std": sae.std, "var": sae.std}
        for family, role in zip(bottlenecks.families, reading.roles, strict=True):
            values = family.values[i][order]
            targets[role].copy_(values.sqrt() if role == "var" else values)
        block.sparse = sae.train(model.training)
    model.config = config


def file_order(levels: tuple[Level, ...], bit_order: BitOrder) -> Int64[Tensor, " d_sae"]:
    """Where the file has each of our features: ours = file[order], all levels one after the other."""
    parts = []
    bits = [level.n for level in levels]
    for i, n in enumerate(bits):
        u = torch.arange(1 << n)
        if bit_order == "parent_low":
            index = u
        else:
            # Digits of u from the lowest, each moved in below the ones before it: single bits, or one digit per level.
            ends = list(range(1, n + 1)) if bit_order == "reversed" else bits[: i + 1]
            index, start = torch.zeros_like(u), 0
            for end in ends:
                index = index << (end - start) | (u >> start & ((1 << (end - start)) - 1))
                start = end
        parts.append(index + sum(1 << m for m in bits[:i]))
    return torch.cat(parts)


def identify(
    model: CayleyGPT,
    bottlenecks: Bottlenecks,
    windows: Int64[Tensor, "n window"],
    console: "Console",
    published_loss: float | None = None,
) -> list[Measured]:
    """Measure every possible reading; the best one first, then its rivals. The model is left with the best.

    Raises:
        ValueError: no clear margin.
    """
    readings = possible_readings(model.config, bottlenecks)
    results = _measure_all(model, bottlenecks, readings, windows, console)
    console.print(_table(results, windows, published_loss))
    best, rivals = results[0], [r for r in results[1:] if r.losses.shape == results[0].losses.shape]
    for rival in rivals:
        difference = paired_difference(rival.losses, best.losses)
        needed = max(MARGIN, SIGMAS * difference.standard_error)
        if not difference.mean > needed:
            raise ValueError(
                f"the checkpoint's conventions are ambiguous on this text: {_short(best)} has a loss of "
                f"{best.loss:.4f}, and {_short(rival)} is only {difference.mean:.4f} ± "
                f"{difference.standard_error:.4f} above it, where {needed:.4f} is needed. Give other or more typical "
                "text, or document the flag in the config"
            )
    install(model, bottlenecks, best.readings[0])
    return results


def _measure_all(
    model: CayleyGPT, bottlenecks: Bottlenecks, readings: list[Reading], windows: Tensor, console: "Console"
) -> list[Measured]:
    """Screened on the first windows, finalists measured on all of them; sorted, finalists first."""
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:

        def measure(readings: list[Reading], windows: Tensor, what: str) -> list[Measured]:
            task = progress.add_task(what, total=len(readings))
            measured = []
            for reading in readings:
                install(model, bottlenecks, reading)
                measured.append(Measured((reading,), losses_of(model, windows)))
                progress.advance(task)
            return _merge_same(measured)

        screen = windows[: -(-SCREEN_TOKENS // (windows.shape[1] - 1))]
        screened = measure(readings, screen, f"{len(readings)} readings")
        finalists = measure([m.readings[0] for m in screened[:FINALISTS]], windows, "finalists")
        # What was the same function as the winner on the first windows must be so on all of them.
        twins = next(m.readings for m in screened if m.readings[0] == finalists[0].readings[0])[1:]
        finalists = _merge_same([*finalists, *measure(list(twins), windows, "equals")])
    return finalists + screened[FINALISTS:]


def _merge_same(measured: list[Measured]) -> list[Measured]:
    """Sorted by loss, readings that make the same function merged in order of preference."""
    merged: list[Measured] = []
    for new in measured:
        for i, old in enumerate(merged):
            if (old.losses - new.losses).abs().mean() <= SAME:
                merged[i] = Measured(old.readings + new.readings, old.losses)
                break
        else:
            merged.append(new)
    return sorted(merged, key=lambda m: m.loss)


def losses_of(model: CayleyGPT, windows: Int64[Tensor, "n window"]) -> Float64[Tensor, "n pos"]:
    """Losses of the model on windows, in batches whose logits fit in little memory."""
    return window_losses(model, windows, max(1, LOGITS_AT_ONCE // (windows.shape[1] * model.config.d_vocab)))


def check_understood(model: CayleyGPT, losses: Float64[Tensor, "n pos"], windows: Int64[Tensor, "n window"]) -> float:
    """The loss of guessing each token by its frequency in these windows, which an understood model is below.

    Raises:
        ValueError: it is not, or the model does better with LayerNorm in the place of RMSNorm.
    """
    # LayerNorm without bias is RMSNorm of the centred input, and has the same tensors.
    hooks = [
        module.register_forward_pre_hook(lambda _, args: (args[0] - args[0].mean(-1, keepdim=True),))
        for module in model.modules()
        if isinstance(module, nn.RMSNorm)
    ]
    try:
        difference = paired_difference(losses, losses_of(model, windows))
    finally:
        for hook in hooks:
            hook.remove()
    if difference.mean > max(MARGIN, SIGMAS * difference.standard_error):
        raise ValueError(
            f"the checkpoint's norms are LayerNorms: with them its loss is lower by {difference.mean:.4f} ± "
            f"{difference.standard_error:.4f} nats. A CayleyGPT has RMSNorms, so this model is not supported"
        )
    counts = torch.bincount(windows[:, 1:].flatten()).double()
    unigram = torch.special.entr(counts / counts.sum()).sum().item()
    if not losses.mean() < unigram:
        raise ValueError(
            f"the checkpoint is not understood: its loss of {losses.mean():.4f} nats is no better than the "
            f"{unigram:.4f} of guessing tokens by their frequency. Its architecture or its tokenizer is another, or it "
            "is untrained"
        )
    return unigram


# ---- What is shown and saved ----


def _table(results: list[Measured], windows: Tensor, published_loss: float | None):
    from rich.table import Table

    total = windows[:, 1:].numel()
    published = "" if published_loss is None else f"; published validation loss {published_loss:.4f}, on other text"
    table = Table(title=f"Readings by loss in nats per token, of {total:,} tokens (others: screened){published}")
    for name in (*CHOICES, "roles"):
        table.add_column(name)
    for name in ("tokens", "loss", "above the best"):
        table.add_column(name, justify="right")
    best = results[0]
    for measured in results[:24]:
        cells = [_alternatives(measured, name) for name in (*CHOICES, "roles")]
        difference = paired_difference(measured.losses, best.losses[: len(measured.losses)])
        above = "" if measured is best else f"{difference.mean:.4f} ± {difference.standard_error:.4f}"
        table.add_row(*cells, f"{measured.losses.numel():,}", f"{measured.loss:.4f}", above)
    if len(results) > 24:
        table.caption = f"and {len(results) - 24} more, all above"
    return table


def _alternatives(measured: Measured, name: str) -> str:
    """The values a choice takes among readings that make the same function."""
    values = dict.fromkeys(getattr(reading, name) for reading in measured.readings)
    return " = ".join("/".join(value) if isinstance(value, tuple) else str(value) for value in values)


def _short(measured: Measured) -> str:
    return "(" + ", ".join(f"{name} {_alternatives(measured, name)}" for name in (*CHOICES, "roles")) + ")"


def saved_conventions(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What `conventions.json` holds, if it is there and of this very checkpoint."""
    try:
        saved = json.loads(path.read_text())
        return saved if saved["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def saved_reading(saved: dict[str, Any], possible: list[Reading]) -> Reading | None:
    """The reading in saved conventions, if it is one of the possible ones."""
    return next((r for r in possible if asdict(r) | {"roles": list(r.roles)} == saved.get("reading")), None)


def save_conventions(path: Path, fingerprint: str, results: list[Measured], summary: dict[str, Any]) -> None:
    """Write `conventions.json`: the reading, what it was held against, and the checkpoint it is of.

    A checkpoint without a bottleneck has no results: what is saved is that it was understood.
    """
    record = {
        "fingerprint": fingerprint,
        "reading": asdict(results[0].readings[0]) if results else None,
        **summary,
        "measured": [
            {"loss": m.loss, "tokens": m.losses.numel(), "readings": [asdict(reading) for reading in m.readings]}
            for m in results
        ],
    }
    write_atomically(path, json.dumps(record, indent=2) + "\n")

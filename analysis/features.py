"""What a model's features fire on: counts over validation windows, and the top contexts of a few features."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from analysis.dead_features import DENSE_FREQUENCY, zombie
from analysis.units import UnitCounter
from cayley_interp import CayleyGPT, LevelCodes

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""


@dataclass(frozen=True)
class Context:
    """Neighbouring tokens (ids) with the feature's value at each, 0 where not active; it is strongest at `peak`."""

    tokens: list[int]
    values: list[float]
    peak: int


@dataclass(frozen=True)
class FeatureContexts:
    """One feature and the places where it fires most strongly, at most one per window."""

    layer: int
    level: int
    index: int
    frequency: float
    max_value: float
    contexts: list[Context]


@dataclass(frozen=True)
class FeatureReport:
    counters: list[list[UnitCounter]]
    """[layer][level]."""
    features: list[FeatureContexts]


def collect_features(
    model: CayleyGPT,
    windows: Int64[Tensor, "n pos"],
    *,
    batch_size: int,
    n_features: int = 12,
    n_contexts: int = 8,
    context: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> FeatureReport:
    """Count every feature, then collect the top contexts of `n_features` of them, spread over layers and levels.

    Two passes: the second needs the choice the first makes. Memory holds one batch of codes, the counters, and
    n_features numbers a token. The features are drawn at random among those of moderate frequency, not for looks.

    Args:
        windows: the model's inputs, at most n_ctx tokens each.
        n_contexts: contexts per feature.
        context: tokens shown on either side of the strongest one.

    Raises:
        ValueError: a vanilla model, or no windows.
    """
    if not model.bottlenecks():
        raise ValueError("this CayleyGPT has levels=None, so it has no features to collect")
    if len(windows) == 0:
        raise ValueError("no windows to count features on: give at least one")
    counters = [[UnitCounter([1] * 2**level.n) for level in sae.levels] for sae in model.bottlenecks()]
    for _, codes in _codes(model, windows, batch_size, "counting features", progress):
        for counters_of_layer, codes_of_layer in zip(counters, codes, strict=True):
            for counter, level in zip(counters_of_layer, codes_of_layer, strict=True):
                counter.add_codes(*level)
    chosen = choose_features(counters, n_features, n_contexts, seed)
    values = torch.zeros(len(chosen), *windows.shape)
    for rows, codes in _codes(model, windows, batch_size, "collecting contexts", progress):
        for i, (layer, level, index) in enumerate(chosen):
            code = codes[layer][level]
            values[i, rows] = torch.where(code.indices == index, code.values, 0).sum(-1).float().cpu()
    features = [
        FeatureContexts(
            layer,
            level,
            index,
            frequency=counters[layer][level].frequency()[index].item(),
            max_value=counters[layer][level].max_act[index].item(),
            contexts=top_contexts(windows, values[i], n_contexts, context),
        )
        for i, (layer, level, index) in enumerate(chosen)
    ]
    return FeatureReport(counters, features)


def choose_features(
    counters: list[list[UnitCounter]], n_features: int, min_active: int, seed: int
) -> list[tuple[int, int, int]]:
    """(layer, level, index) of up to `n_features` features, spread over layers, alternating between levels.

    Each is drawn at random from the features of its layer and level that are active at least `min_active` times and
    are neither dense nor zombie; where there is none, from all that are active.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: set[tuple[int, int, int]] = set()
    for i in range(n_features):
        layer = i * len(counters) // n_features
        level = i % len(counters[layer])
        counter = counters[layer][level]
        free = counter.opened > 0
        free[[index for *cell, index in chosen if cell == [layer, level]]] = False
        moderate = (counter.opened >= min_active) & (counter.frequency() <= DENSE_FREQUENCY)
        eligible = free & moderate & ~zombie(counter)
        indices = (eligible if eligible.any() else free).nonzero().flatten()
        if len(indices):
            pick = torch.randint(len(indices), (1,), generator=generator)
            chosen.add((layer, level, int(indices[pick])))
    return sorted(chosen)


def top_contexts(
    windows: Int64[Tensor, "n pos"], values: Float[Tensor, "n pos"], n_contexts: int, context: int
) -> list[Context]:
    """Windows in which one feature's |value| peaks highest, strongest first, cut to `context` tokens on either side."""
    peaks, positions = values.abs().max(dim=1)
    contexts = []
    for row in peaks.argsort(descending=True, stable=True)[:n_contexts].tolist():
        if peaks[row] == 0:
            break
        peak = int(positions[row])
        start = max(peak - context, 0)
        near = slice(start, peak + context + 1)
        contexts.append(Context(windows[row, near].tolist(), values[row, near].tolist(), peak - start))
    return contexts


def _codes(
    model: CayleyGPT, windows: Tensor, batch_size: int, what: str, progress: Progress | None
) -> Iterator[tuple[slice, list[tuple[LevelCodes, ...]]]]:
    """Rows of each batch and their codes."""
    device = next(model.parameters()).device
    for start in range(0, len(windows), batch_size):
        rows = slice(start, min(start + batch_size, len(windows)))
        yield rows, model.codes(windows[rows].to(device))
        if progress is not None:
            progress(what, rows.stop / len(windows))

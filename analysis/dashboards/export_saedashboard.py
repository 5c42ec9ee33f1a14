"""Units as SAEDashboard's batches: `batch-N.json`, the JSON that SAEDashboard 0.8 makes and Neuronpedia reads.

    OUT/saedashboard/L3.1/batch-0.json      as schemas/saedashboard.json says

Lists are empty where a field makes no sense for a unit, as the format allows: `neuron_alignment_*` and
`decoder_weights_dist` are of one decoder row over a basis of neurons or heads, and correlations are not measured here.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.dashboards.details import BINS, Context, Details
from analysis.dashboards.opening import Opened
from analysis.dashboards.pages import MOVED, logits_of
from analysis.dashboards.survey import Survey
from cayley_interp.files import write_atomically

INTERVALS = 5
"""Of contexts that are not the strongest, by their act; each has as many bins of the histogram."""
DECIMALS = 3
LOGITS_AT_A_TIME = 16


def export_saedashboard(
    out: Path, opened: Opened, group: int, survey: Survey, details: Sequence[Details], batch: int
) -> Path:
    """Write one batch of a group's units; returns its path.

    Args:
        group: its number in the source.
        details: of the units of this batch, each of which opens.
        batch: its number.
    """
    place = opened.source.groups[group]
    folder = out / "saedashboard" / place.name
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model_id": model_id(opened),
        "layer": place.layer,
        "sae_set": sae_set(opened, group),
        "sae_id_suffix": None,
        "features": list(features_of(opened, survey, details)),
    }
    path = folder / f"batch-{batch}.json"
    write_atomically(path, json.dumps(content, ensure_ascii=True, allow_nan=False) + "\n")
    return path


def model_id(opened: Opened) -> str:
    """The host's name where there is one; letters, digits, - and _ only."""
    facts = dict(opened.about)
    return slug(facts.get("host") or facts.get("model") or opened.source.name)


def sae_set(opened: Opened, group: int) -> str:
    """What the groups of one kind and level are together; `LAYER-SET` is one of them."""
    level = opened.source.groups[group].level
    return slug(f"{opened.kind}-{opened.source.name}" + ("" if level is None else f"-level{level}"))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "unnamed"


def features_of(opened: Opened, survey: Survey, details: Sequence[Details]) -> Iterator[dict[str, Any]]:
    """Each unit in SAEDashboard's fields."""
    for start in range(0, len(details), LOGITS_AT_A_TIME):
        some = details[start : start + LOGITS_AT_A_TIME]
        for own, moved in zip(some, logits_of(opened, some), strict=True):
            yield _feature(opened, survey, own, moved)


def _feature(opened: Opened, survey: Survey, own: Details, logits: Tensor | None) -> dict[str, Any]:
    counter, text = survey.counter, opened.text
    largest = float(counter.max_act[own.unit])
    lowest = -largest if own.has_negative else 0.0
    empty = {
        f"{name}_{field}": []
        for name, fields in {
            "neuron_alignment": ("indices", "values", "l1"),
            "correlated_neurons": ("indices", "l1", "pearson"),
            "correlated_features": ("indices", "l1", "pearson"),
        }.items()
        for field in fields
    }
    return {
        "feature_index": own.unit,
        **empty,
        **moved_tokens(logits, opened.strings),
        "frac_nonzero": int(counter.opened[own.unit]) / counter.tokens,
        "freq_hist_data_bar_values": centres(lowest, largest),
        "freq_hist_data_bar_heights": own.histogram,
        **logits_histogram(logits),
        "n_prompts_total": len(text.windows),
        "n_tokens_in_prompt": text.n_ctx,
        "dataset": dict(opened.about).get("text", ""),
        "decoder_weights_dist": [],
        "vector": [],
        "activations": [_activation(context, own, lowest, largest, opened.strings) for context in own.contexts],
    }


def moved_tokens(logits: Float[Tensor, " d_vocab"] | None, strings: Sequence[str]) -> dict[str, Any]:
    """The tokens whose logits a unit lowers and raises most, furthest first; none without a direct path."""
    found: dict[str, Any] = {}
    for name, largest in (("neg", False), ("pos", True)):
        values, tokens = ([], []) if logits is None else logits.topk(min(MOVED, len(logits)), largest=largest)
        found[f"{name}_str"] = [strings[int(t)] for t in tokens]
        found[f"{name}_values"] = [round(float(v), DECIMALS) for v in values]
    return found


def logits_histogram(logits: Float[Tensor, " d_vocab"] | None) -> dict[str, Any]:
    """Of all logits that a unit moves, about their mean; empty where it moves none."""
    if logits is None or logits.max() == logits.min():
        return {"logits_hist_data_bar_values": [], "logits_hist_data_bar_heights": []}
    low, high = logits.min().item(), logits.max().item()
    heights = [int(n) for n in torch.histc(logits, BINS, low, high)]
    return {"logits_hist_data_bar_values": centres(low, high), "logits_hist_data_bar_heights": heights}


def centres(low: float, high: float) -> list[float]:
    """Of equal bins, in the five digits that SAEDashboard keeps."""
    return [round(low + (i + 0.5) * (high - low) / BINS, 5) for i in range(BINS)]


def _activation(
    context: Context, own: Details, lowest: float, largest: float, strings: Sequence[str]
) -> dict[str, Any]:
    """The strongest are SAEDashboard's top group, the others are of the interval that their act is in."""
    bin_min, bin_max, bin_contains = -1.0, largest, -1.0
    if context.which != "strongest":
        width = (largest - lowest) / INTERVALS
        i = min(INTERVALS - 1, int((context.acts[context.peak] - lowest) / width))
        bin_min, bin_max = lowest + i * width, lowest + (i + 1) * width
        held = own.histogram[i * BINS // INTERVALS : (i + 1) * BINS // INTERVALS]
        bin_contains = sum(held) / sum(own.histogram)
    return {
        "bin_min": round(bin_min, DECIMALS),
        "bin_max": round(bin_max, DECIMALS),
        "bin_contains": bin_contains,
        "tokens": [strings[token] for token in context.tokens],
        "values": [round(act, DECIMALS) for act in context.acts],
        "qualifying_token_index": context.peak,
    }

"""Units as the files that a Neuronpedia of one's own imports.

    OUT/neuronpedia/v1/MODEL/SOURCE/{model,release,source,sourceset}.jsonl
    OUT/neuronpedia/v1/MODEL/SOURCE/{features,activations}/batch-N.jsonl.gz     as schemas/neuronpedia_*.json say

Columns are those of Neuronpedia's own export (utils/neuronpedia_utils/export-data.py) and of its tables
(apps/webapp/prisma/schema.prisma). What has a default there is left out, and lists are empty where a column makes no
sense for a unit. Explanations are not written: names of units have no place without their scores.
"""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.dashboards.details import Details
from analysis.dashboards.export_saedashboard import features_of, model_id, sae_set, slug
from analysis.dashboards.opening import Opened
from analysis.dashboards.survey import Survey
from cayley_interp.files import write_atomically

CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""One of the users whose activations Neuronpedia's export takes for public."""
SHARED = (
    *("frac_nonzero", "freq_hist_data_bar_heights", "freq_hist_data_bar_values", "logits_hist_data_bar_heights"),
    *("logits_hist_data_bar_values", "neuron_alignment_indices", "neuron_alignment_l1", "neuron_alignment_values"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "decoder_weights_dist"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "vector"),
)
"""Columns of a feature that are SAEDashboard's fields."""


def export_neuronpedia(
    out: Path, opened: Opened, group: int, survey: Survey, details: Sequence[Details], batch: int
) -> Path:
    """Write one batch of a group's units and what their source is; returns the source's folder.

    Args:
        group: its number in the source.
        details: of the units of this batch, each of which opens.
        batch: its number.
    """
    place = opened.source.groups[group]
    model, set_name = model_id(opened), sae_set(opened, group)
    source = f"{place.layer}-{set_name}"
    folder = out / "neuronpedia" / "v1" / model / source
    keys = {"modelId": model, "layer": source}
    features, activations = [], []
    for unit in features_of(opened, survey, details):
        index = {"index": str(unit["feature_index"]), "creatorId": CREATOR_ID}
        largest = float(survey.counter.max_act[unit["feature_index"]])
        features.append({**keys, **index, "maxActApprox": largest, "sourceSetName": set_name, **_feature(unit)})
        activations += [
            {"id": _id(model, source, index["index"], i), **keys, **index, **_activation(unit["dataset"], activation)}
            for i, activation in enumerate(unit["activations"])
        ]
    for name, rows in (("features", features), ("activations", activations)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name / f"batch-{batch}.jsonl.gz", gzip.compress(_lines(rows), mtime=0))
    for name, row in _tables(opened, group).items():
        write_atomically(folder / f"{name}.jsonl", _lines([row]))
    return folder


def _feature(unit: dict[str, Any]) -> dict[str, Any]:
    return {name: unit[name] for name in SHARED} | {
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        "vectorLabel": None,
        "hookName": None,
        "vectorDefaultSteerStrength": None,
        "hasVector": False,
    }


def _activation(dataset: str, activation: dict[str, Any]) -> dict[str, Any]:
    values = activation["values"]
    return {
        "dataSource": dataset,
        "tokens": activation["tokens"],
        "maxValue": max(values),
        "minValue": min(values),
        "values": values,
        "maxValueTokenIndex": values.index(max(values)),
        "dfaValues": [],
        "dfaMaxValue": None,
        "dfaTargetIndex": None,
        "binContains": activation["bin_contains"],
        "binMin": activation["bin_min"],
        "binMax": activation["bin_max"],
    }


def _tables(opened: Opened, group: int) -> dict[str, dict[str, Any]]:
    """The one row of each table that a source needs."""
    source, place, text = opened.source, opened.source.groups[group], opened.text
    facts, model, set_name = dict(opened.about), model_id(opened), sae_set(opened, group)
    release = slug(source.name)
    shown = {"visibility": "PRIVATE", "creatorId": CREATOR_ID}
    kind = {"cayley": "bottleneck features", "transform": "transforms of a MOLT", "feature": "features"}[place.kind]
    described = {"description": f"{kind} of {source.name}", "urls": [], "creatorName": "", **shown}
    return {
        "model": {
            "id": model,
            "displayName": facts.get("host") or facts.get("model") or source.name,
            "displayNameShort": model,
            "layers": place.layer + 1,
            "neuronsPerLayer": 0,
            "owner": "",
            **shown,
        },
        "release": {"name": release, **described},
        "sourceset": {
            "modelId": model,
            "name": set_name,
            "type": opened.kind,
            "releaseName": release,
            "allowInferenceSearch": False,
            **described,
        },
        "source": {
            "id": f"{place.layer}-{set_name}",
            "modelId": model,
            "setName": set_name,
            "num_prompts": len(text.windows),
            "num_tokens_in_prompt": text.n_ctx,
            "dataset": facts.get("text", ""),
            **shown,
        },
    }


def _id(*parts: str | int) -> str:
    """The same of the same activation, so that what is exported again takes its own place."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:25]


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n" for row in rows).encode()

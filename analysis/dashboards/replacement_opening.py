"""A replacement opened for its dashboards: its host, the text, and what its pages say besides."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.behaviour import measure_behaviour
from analysis.dashboards.feature_page import FeatureExtras
from analysis.dashboards.host_text import prompt_of_host, text_of_host, text_of_sequences
from analysis.dashboards.opening import Curve, Extras, Figure, Opened, SiteKind, points_of
from analysis.dashboards.replacement import ReplacementSource
from analysis.dashboards.sources import Text
from analysis.dashboards.survey import Progress
from analysis.dashboards.text import SPEECHES
from analysis.dashboards.transform_page import TransformExtras
from analysis.held_out import HELD_OUT, read_held_out
from analysis.hosts import open_host
from analysis.page import flatten, read_metrics
from analysis.subjects import digest_of, host_of, is_run, kind_of
from analysis.tables import Sheet
from analysis.tokens import token_strings
from molt_lens import Molt, Transcoder
from molt_lens.gemma_scope import SHORTHANDS, gemma_name, load_gemma_scope
from molt_lens.hosts import Host
from molt_lens.opening import open_replacement, place_of

SPLICED_TOKENS = 2_048
CURVES = {"mse": ("Error", "step", "mean squared error, standardised"), "l0": ("Open units", "step", "L0")}


def open_source(
    name: str, *, layers: Sequence[int] | None = None, tokens: int, device: str = "cpu", host: str | None = None
) -> Opened:
    """A replacement of the package, a run's or replacement's folder, or Gemma Scope; else a SAELens SAE.

    The text is what a run held out, and speeches of any other, which it may have been trained on.

    Args:
        layers: where given, the replacement's own must be among them.
        host: by default the one that the replacement was made for, by the name that it had there.

    Raises:
        FileNotFoundError: nothing of that name, or its host is not here.
        ValueError: damaged, of another host, a map without units, or less than one window of tokens.
        ImportError: a library that it needs is missing.
    """
    if is_saelens(name):
        from analysis.dashboards.saelens_opening import open_sae

        return open_sae(name, layers=layers, tokens=tokens, device=device, model=host)
    opened = open_host(host or host_name_of(name), device)
    replacement, record = open_replacement(name, opened)
    check_layer(name, record.site.layer, layers)
    source = ReplacementSource(opened, record.site, replacement, str(name))
    return opened_of(source, record.training, *_text(name, opened, tokens), metrics=place_of(name) / "metrics.jsonl")


def is_saelens(name: str) -> bool:
    """Whether it is a folder that SAELens wrote, or RELEASE:ID."""
    path = Path(name)
    release, colon, _ = name.partition(":")
    return (path / "cfg.json").is_file() or (bool(colon) and release not in SHORTHANDS and not path.exists())


def opened_of(
    source: ReplacementSource, training: dict[str, Any] | None, text: Text, where: str, metrics: Path | None = None
) -> Opened:
    """A source with its pages; `where` says what the text is."""
    host, map = source.host, source.replacement.map
    kind: SiteKind = "molt" if isinstance(map, Molt) else "transcoder"
    return Opened(
        kind=kind,
        source=source,
        text=text,
        strings=token_strings(host.tokenizer, host.d_vocab),
        sheets=lambda progress: [behaviour_sheet(source, text, progress)],
        fingerprint=f"{host.fingerprint} {source.site} {digest_of(source.replacement)}",
        extras=_extras(source, text),
        text_of=lambda prompt: prompt_of_host(host, prompt),
        about=[*about(source, training or {}), ("text", where)],
        settings=flatten(map.config()),
        figures=[] if metrics is None else figures_of(metrics),
    )


def host_name_of(name: str) -> str:
    """The host that a replacement was made for.

    Raises:
        FileNotFoundError: there is no such replacement.
        ValueError: nothing says which host it is of.
    """
    path = place_of(name)
    if (path / "config.json").is_file() and not _is_gemma_scope(path):
        return host_of([str(path)])
    found = load_gemma_scope(name).model_name
    if found is None:
        raise ValueError(f"nothing says which Gemma {name} was trained on")
    return "gemma-3-270m" if gemma_name(found) == "gemma-3-270m" else found


def check_layer(name: str, layer: int, layers: Sequence[int] | None) -> None:
    """
    Raises:
        ValueError: layers are asked for that do not hold this one.
    """
    if layers is not None and layer not in layers:
        raise ValueError(f"{name} is of layer {layer}, not of {', '.join(map(str, layers))}: leave out --layers")


def about(source: ReplacementSource, training: dict[str, Any]) -> list[tuple[str, str]]:
    """Facts for the head of the model page."""
    map, site = source.replacement.map, source.site
    rows = [
        ("host", source.host.name),
        ("kind", kind_of(map)),
        ("layer", str(site.layer)),
        ("from, to", f"{site.input} → {site.target}"),
        ("gate", map.gate.spec),
        ("units", f"{map.n_units:,}"),
    ]
    if source.post_norm is not None:
        rows.append(("logits", "through the norm behind the MLP too, at the scale that it has at each token"))
    if "training_tokens" in training:
        rows.append(("trained on", f"{training['training_tokens']:,} tokens"))
    if "fit" in training:
        rows.append(("NMSE, held out", f"{training['fit']['nmse']:.3f}"))
    if "active_rank" in training:
        rows.append(("L0 and active rank, held out", f"{training['l0']:.2f}, {training['active_rank']:.0f}"))
    return rows


def behaviour_sheet(source: ReplacementSource, text: Text, progress: Progress) -> Sheet:
    """What the host says with the replacement spliced in, on windows spread over the text."""
    found = measure_behaviour(
        source.host,
        {source.site: source.replacement},
        text.windows[text.spread(SPLICED_TOKENS)],
        means=None,
        progress=lambda share: progress("splicing it into its host", share),
    )
    return Sheet(
        f"Spliced into {source.host.name}, over {found.tokens:,} predicted tokens",
        ["measure", "value"],
        [
            ["loss of the host, nats", f"{found.ce_host:.4f}"],
            ["loss with it in the MLP's place", f"{found.ce_spliced:.4f}"],
            ["loss with the MLP's output at zero", f"{found.ce_zero:.4f}"],
            ["share of that loss won back", f"{found.recovered_zero:.3f}"],
            ["KL from the host, nats", f"{found.kl:.4f}"],
            ["same likeliest token", f"{found.top1:.3f}"],
        ],
    )


def figures_of(metrics: Path) -> list[Figure]:
    """Curves of a run; none where there is no log.

    Raises:
        ValueError: a line of the log that is not a JSON object.
    """
    records = read_metrics(metrics)
    curves = {key: points_of(records, key) for key in CURVES}
    return [Figure(*CURVES[key], [Curve("training", points)]) for key, points in curves.items() if points]


def _extras(source: ReplacementSource, text: Text) -> Extras:
    map = source.replacement.map
    if isinstance(map, Molt):
        return TransformExtras(source, text)
    return FeatureExtras(map.W_dec if isinstance(map, Transcoder) else None, map.W_enc, map.norms())


def _text(name: str, host: Host, tokens: int) -> tuple[Text, str]:
    run = Path(name)
    if is_run(name) and (run / HELD_OUT).is_file():
        return text_of_sequences(host, read_held_out(run).input_ids, tokens), "what its run held out"
    return text_of_host(host, tokens), SPEECHES


def _is_gemma_scope(path: Path) -> bool:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return "hf_hook_point_in" in config

"""Everything a comparison says of one map, each part kept on disk and found again.

A figure `nmse` comes with `nmse_se`, its standard error over sequences (jackknife.py). What is kept depends on the
weights of map and host, on the text and on the settings of its part, and on nothing else.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.controls import deviations, ridge_among
from analysis.jackknife import jackknife_error, leave_one_out, ratio_error, sums_by_sequence
from analysis.jacobian import jacobian_faithfulness
from analysis.reconstruction import ReconstructionMeter
from analysis.sparsity import active_parameters, bits_per_token
from analysis.splicing import SplicedSums, spliced_sums
from analysis.subjects import SiteText, Subject
from analysis.units import UnitCounter
from cayley_interp.files import write_atomically
from molt_lens import MixtureOfDecoders
from molt_lens.fingerprint import digest_of_tensors

DEFINITIONS = 1
"""Raised when a figure changes its meaning, so that older ones are not found again."""
MIXTURE_SHARE = 16
"""A mixture of decoders has no static matrices for its Jacobian: it is compared at one token in so many."""
SPLICED_AT_ONCE = 8
"""Maps that share one pass of the host; what is lost when a comparison is stopped."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured on how much text."""

    tokens: int = 16_384
    """Held-out tokens for reconstruction and gates."""
    behaviour_tokens: int = 4_096
    """Held-out tokens for the loss with a map spliced in, in whole sequences."""
    jacobian_tokens: int = 1_024
    """Tokens at which Jacobians are compared, spread over all sequences; a mixture of decoders takes a sixteenth."""
    coordinates: Literal["standardized", "raw"] = "standardized"
    """Of the Jacobians: standardised by the deviations that the first run was trained in, or raw."""


class Kept:
    """Figures on disk, one file each, named by the digest of what they depend on."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: dict[str, Any]) -> Figures | None:
        """The figures of this key, or None where there are none, or none that can be read."""
        path = self._path(key)
        try:
            content = json.loads(path.read_text())
            return content["figures"] if content["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: dict[str, Any], figures: Figures) -> None:
        write_atomically(self._path(key), json.dumps({"key": key, "figures": figures}, indent=1) + "\n")

    def _path(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


class Measured(NamedTuple):
    """A subject with its figures."""

    subject: Subject
    figures: Figures


PARTS = 3
"""Of what is said of a map: fit, Jacobian, behaviour."""


def measure_site(
    subjects: list[Subject],
    controls: list[Subject],
    text: SiteText,
    settings: Settings,
    kept: Kept,
    advance: Callable[[str, int], None] = lambda *_: None,
) -> list[Measured]:
    """All figures of the subjects of one site, and of their controls behind them.

    Args:
        advance: is told what comes next, and how many parts, of PARTS a map, have been done since it was last told.

    Raises:
        ValueError: figures that are not finite, or a map that does not fit the site; the message names the map.
    """
    every = subjects + controls
    ridge = ridge_among(controls)
    base = {
        "definitions": DEFINITIONS,
        "host": text.host.fingerprint,
        "site": str(text.site),
        "text": digest_of_tensors({"input_ids": text.input_ids}),
        "tokens": settings.tokens,
    }
    frame = {
        "jacobian_tokens": settings.jacobian_tokens,
        "coordinates": settings.coordinates,
        "deviations": "text" if ridge is None else ridge.key,
    }

    def jacobian(subject: Subject) -> Figures:
        std = deviations(controls, text) if settings.coordinates == "standardized" else None
        return measure_jacobian(subject, text, settings, std)

    figures: list[Figures] = []
    for subject in every:
        advance(f"reconstruction by {subject.name}", 0)
        fit = _kept_or_measured(
            kept, base | {"part": "fit", "map": subject.key}, subject, lambda s: measure_fit(s, text)
        )
        advance(f"Jacobian of {subject.name}", 1)
        key = base | frame | {"part": "jacobian", "map": subject.key}
        figures.append(fit | _kept_or_measured(kept, key, subject, jacobian))
        advance("", 1)
    sums = behaviour_sums(every, base, text, settings, kept, advance)
    zero, mean = (sums[name] for name in ("zero", "mean"))
    return [Measured(s, f | behaviour_figures(sums[s.key], zero, mean)) for s, f in zip(every, figures, strict=True)]


def _kept_or_measured(
    kept: Kept, key: dict[str, Any], subject: Subject, measure: Callable[[Subject], Figures]
) -> Figures:
    if (found := kept.find(key)) is not None:
        return found
    with _naming(subject.name):
        figures = measure(subject)
    kept.keep(key, figures)
    return figures


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# ---- Reconstruction and gates ----


@torch.no_grad()
def measure_fit(subject: Subject, text: SiteText) -> Figures:
    """Reconstruction errors and gates, as `evaluate_replacement` has them, sequence by sequence for their errors."""
    replacement = subject.make(text)
    sample, lengths = text.sample, torch.bincount(text.sequence).tolist()
    counter = UnitCounter(replacement.map.ranks, replacement.map.norms())
    total, parts, opened = ReconstructionMeter(replacement.d_out), [], []
    total.shift = text.mean_y.double().cpu()
    for x, y in zip(sample.x.split(lengths), sample.y.split(lengths), strict=True):
        acts = replacement.encode(x.float())
        recons = replacement.decode(acts, x.float())
        part = ReconstructionMeter(replacement.d_out)
        part.shift = total.shift
        for meter in (total, part):
            meter.add(y.float(), recons)
        counter.add(acts)
        is_open = (acts != 0).sum(0).cpu()
        opened.append([int(is_open.sum()), int((is_open * counter.ranks).sum())])
        parts.append(part)
    without = [_without(total, part) for part in parts]
    tokens = torch.tensor(lengths, dtype=torch.float64)
    l0, active_rank = torch.tensor(opened, dtype=torch.float64).T
    active = active_parameters(replacement.map, counter)
    if subject.control:  # a constant is written as a linear map whose matrix is 0
        active = min(active, subject.parameters)
    return {
        "tokens": total.tokens,
        "sequences": len(parts),
        "nmse": total.nmse(),
        "nmse_se": jackknife_error(torch.tensor([meter.nmse() for meter in without])),
        "fvu": total.fvu(),
        "fvu_se": jackknife_error(torch.tensor([meter.fvu() for meter in without])),
        "cosine": total.cosine(),
        "cosine_se": jackknife_error(torch.tensor([meter.cosine() for meter in without])),
        "l0": counter.l0(),
        "l0_se": ratio_error(l0, tokens),
        "active_rank": counter.active_rank(),
        "active_rank_se": ratio_error(active_rank, tokens),
        "active_parameters": active,
        "bits_per_token": bits_per_token(counter),
        "alive": counter.alive() if counter.ranks.numel() else None,
        "max_frequency": counter.max_frequency() if counter.ranks.numel() else None,
        "by_rank": {str(rank): group for rank, group in counter.by_rank().items()},
    }


def _without(total: ReconstructionMeter, part: ReconstructionMeter) -> ReconstructionMeter:
    """The meter of all tokens but those of a part; both centre y about the same point."""
    rest = ReconstructionMeter(len(total.sum))
    rest.shift, rest.tokens, rest.cosines = total.shift, total.tokens - part.tokens, total.cosines - part.cosines
    rest.sum, rest.squares, rest.errors = (
        total.sum - part.sum,
        total.squares - part.squares,
        total.errors - part.errors,
    )
    return rest


# ---- Jacobian ----


def measure_jacobian(
    subject: Subject,
    text: SiteText,
    settings: Settings,
    std: tuple[Float[Tensor, " d_in"], Float[Tensor, " d_out"]] | None,
) -> Figures:
    """Means over tokens of cosine, relative error and norm ratio, in raw coordinates where no deviations are given."""
    replacement = subject.make(text)
    n = settings.jacobian_tokens
    if isinstance(replacement.map, MixtureOfDecoders):
        n = max(1, n // MIXTURE_SHARE)
    frame: dict[str, Any] = {} if std is None else {"std_in": std[0], "std_out": std[1]}
    faithfulness = jacobian_faithfulness(
        text.host, text.site, replacement, text.spread(n), coordinates=settings.coordinates, **frame
    )
    sequence, n_sequences = text.sequence[text.spread_tokens(n)], int(text.sequence.max()) + 1
    counts = torch.bincount(sequence, minlength=n_sequences).double()
    figures: Figures = {"jacobian_tokens": n}
    for name in ("cosine", "relative_error", "norm_ratio"):
        values = getattr(faithfulness, name)
        sums = sums_by_sequence(values, sequence, n_sequences)
        figures[f"jacobian_{name}"] = values.mean().item()
        figures[f"jacobian_{name}_se"] = ratio_error(sums[counts > 0], counts[counts > 0])
    return figures


# ---- Behaviour ----


def behaviour_sums(
    every: list[Subject],
    base: dict[str, Any],
    text: SiteText,
    settings: Settings,
    kept: Kept,
    advance: Callable[[str, int], None],
) -> dict[str, SplicedSums]:
    """By the subjects' keys; what is not found is measured some at a time and kept."""
    n = max(2, -(-settings.behaviour_tokens // text.input_ids.shape[1]))
    sequences = text.input_ids[:n]
    keys = {s.key: base | {"part": "behaviour", "map": s.key, "behaviour_sequences": len(sequences)} for s in every}
    found = {key: sums for key in keys if (sums := kept.find(keys[key])) is not None}
    advance("", len(every) - len([s for s in every if s.key not in found]))
    missing = list({s.key: s for s in every if s.key not in found}.values())
    for some in (missing[i : i + SPLICED_AT_ONCE] for i in range(0, len(missing), SPLICED_AT_ONCE)):
        names = f"{some[0].name} and {len(some) - 1} more" if len(some) > 1 else some[0].name
        advance(f"spliced in: {names}", 0)
        maps = {s.key: {text.site: s.make(text)} for s in some}
        with _naming(names):
            measured = spliced_sums(text.host, maps, sequences)
        for key, sums in measured.items():
            found[key] = {name: values.tolist() for name, values in vars(sums).items()}
            kept.keep(keys[key], found[key])
        advance("", len(some))
    return {
        key: SplicedSums(**{name: torch.tensor(values, dtype=torch.float64) for name, values in sums.items()})
        for key, sums in found.items()
    }


def behaviour_figures(own: SplicedSums, zero: SplicedSums, mean: SplicedSums) -> Figures:
    """Losses in nats a token with errors paired by sequence, and the shares recovered of what ablation costs."""
    tokens = own.tokens
    above = own.ce - own.ce_host
    figures: Figures = {"behaviour_tokens": int(tokens.sum()), "behaviour_sequences": len(tokens)}
    for name, sums in (("ce_host", own.ce_host), ("ce", own.ce), ("ce_above_host", above), ("kl", own.kl)):
        figures[name] = (sums.sum() / tokens.sum()).item()
        figures[f"{name}_se"] = ratio_error(sums, tokens)
    figures["top1"] = (own.top1.sum() / tokens.sum()).item()
    for name, ablated in (("recovered_zero", zero.ce), ("recovered_mean", mean.ce)):
        won, cost = ablated - own.ce, ablated - own.ce_host
        figures[name] = (won.sum() / cost.sum()).item()
        figures[f"{name}_se"] = jackknife_error(leave_one_out(won) / leave_one_out(cost))
    return figures

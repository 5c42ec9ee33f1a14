"""What a comparison measures, replacements by name, and on what: a text that none of them was trained on."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from analysis.held_out import HELD_OUT, HeldOut, read_held_out
from molt_lens import Molt, Replacement, SparseMap, Transcoder
from molt_lens.activations import Sample, collect
from molt_lens.fingerprint import digest_of_tensors
from molt_lens.folder import CONFIG
from molt_lens.hosts import Host, Site
from molt_lens.opening import open_replacement
from molt_lens.packing import keep_mask

TextOf = Literal["same", "other", "unknown"]
"""Whether the text measured on is what the replacement's run held out: in another text may be what it trained on."""


class SiteText:
    """The activations of one site on the text, computed when first asked for: a comparison found again needs none."""

    def __init__(self, host: Host, site: Site, input_ids: Int64[Tensor, "sequence pos"], tokens: int):
        self.host, self.site, self.input_ids, self.tokens = host, site, input_ids, tokens

    @cached_property
    def sample(self) -> Sample:
        return collect(self.host, self.site, lambda: iter(self.input_ids), self.tokens)

    @cached_property
    def sequence(self) -> Int64[Tensor, " token"]:
        """Of each token of the sample."""
        return keep_mask(self.host, self.input_ids).nonzero()[: self.tokens, 0]

    def spread_tokens(self, n: int) -> Int64[Tensor, " token"]:
        """Rows of n tokens, as many of each sequence as of any other, at random within it; fewer are the first of more.

        Raises:
            ValueError: there are fewer tokens.
        """
        if not 1 <= n <= self.tokens:
            raise ValueError(
                f"{n} tokens at which to compare Jacobians, of {self.tokens} measured on: ask for 1 to all"
            )
        shuffled = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(0))
        by_sequence = shuffled[self.sequence[shuffled].argsort(stable=True)]
        counts = torch.bincount(self.sequence)
        place = torch.arange(self.tokens) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return by_sequence[place.argsort(stable=True)][:n]

    def spread(self, n: int) -> Float[Tensor, "token d_in"]:
        """x at those tokens."""
        return self.sample.x[self.spread_tokens(n).to(self.sample.x.device)]

    def beside(self, n: int) -> Float[Tensor, "token d_in"]:
        """x at n tokens, spread likewise, none of which is one of those.

        Raises:
            ValueError: there are fewer.
        """
        return self.sample.x[self.spread_tokens(2 * n)[n:].to(self.sample.x.device)]

    @cached_property
    def mean_y(self) -> Float[Tensor, " d_out"]:
        return self.sample.y.double().mean(0).float()


@dataclass(frozen=True, eq=False)
class Subject:
    """One map to be measured, with what is known of it.

    Attributes:
        name: as it was given; of a control, what it is.
        key: digest of all that its figures depend on, but for host, text and settings.
        make: the map in eval mode; a control may be made from the text's activations.
        control: whether it is a floor to hold the others against.
        parameters: of the map; of a control, those that it needs, though it may be written as a map with more.
        seed: of a run; with it, `config` is the run's.
        config: of its run, or what its folder says of it.
    """

    name: str
    kind: str
    site: Site
    key: str
    make: Callable[[SiteText], Replacement]
    control: bool = False
    gate: str | None = None
    parameters: int = 0
    training_tokens: int | None = None
    seed: int | None = None
    text: TextOf | None = None
    config: dict[str, Any] | None = None


# ---- By name ----


def is_run(name: str) -> bool:
    """Whether it is the folder of a run that has ended."""
    return (Path(name) / "model" / CONFIG).is_file() and (Path(name) / CONFIG).is_file()


def host_of(names: list[str]) -> str:
    """The host that the first of them with a folder was trained on, by its name.

    Raises:
        ValueError: none of them says.
    """
    for name in names:
        file = Path(name) / CONFIG
        if file.is_file():
            config = json.loads(file.read_text())
            if found := config.get("host" if is_run(name) else "host_name"):
                return found
    raise ValueError(f"nothing says which host {', '.join(names)} belong to: give --host NAME")


def choose_text(names: list[str], text: Path | None) -> tuple[HeldOut, dict[str, TextOf]]:
    """The held-out text of the first run, or of the run `text`; and for each name, whether it is its own too.

    Raises:
        FileNotFoundError: the run has no such file.
        ValueError: no run among them, or runs that held out other texts, where `text` names none.
    """
    runs = [name for name in names if is_run(name)]
    if text is None and not runs:
        raise ValueError(
            f"none of {', '.join(names)} is the folder of a run that has ended, which brings its held-out text: give "
            "--text RUN"
        )
    source = Path(runs[0]) if text is None else text
    held_out = read_held_out(source)
    own: dict[str, TextOf] = dict.fromkeys(names, "unknown")
    for name in runs:
        if (Path(name) / HELD_OUT).is_file():
            own[name] = "same" if held_out.agrees_with(read_held_out(Path(name))) else "other"
        if own[name] != "same" and text is None:
            why = "held out other text than" if own[name] == "other" else f"has no {HELD_OUT} to hold against that of"
            raise ValueError(
                f"{name} {why} {source}, so that it may have been trained on what it would be measured on: leave it "
                "out, or say with --text RUN whose text to take all the same"
            )
    return held_out, own


def open_subject(name: str, host: Host, text: TextOf) -> Subject:
    """A run, a replacement or a Gemma Scope transcoder for this host.

    Raises:
        FileNotFoundError, ValueError: what `open_replacement` raises, with the name in front.
    """
    try:
        replacement, record = open_replacement(name, host)
        training = record.training or {}
        if is_run(name):
            config = json.loads((Path(name) / CONFIG).read_text())
        else:
            config = {"map": replacement.map.config(), **training}
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Subject(
        name,
        ("gemma-scope " if "gemma_scope" in training else "") + kind_of(replacement.map),
        record.site,
        digest_of(replacement),
        lambda _: replacement,
        gate=replacement.map.gate.spec if replacement.map.n_units else None,
        parameters=count(replacement),
        training_tokens=training.get("training_tokens"),
        seed=config.get("seed") if is_run(name) else None,
        text=text,
        config=config,
    )


def kind_of(map: SparseMap) -> str:
    """What it is called in recipes."""
    if map.W_skip is not None and isinstance(map, Molt):
        return "molt-skip"
    return "skip-transcoder" if map.W_skip is not None and isinstance(map, Transcoder) else map.kind


def digest_of(replacement: Replacement) -> str:
    """Of all its tensors, and of what they are the tensors of."""
    config = json.dumps(replacement.map.config(), sort_keys=True)
    return f"{digest_of_tensors(replacement.state_dict())} {config}"


def count(replacement: Replacement) -> int:
    return sum(parameter.numel() for parameter in replacement.map.parameters())

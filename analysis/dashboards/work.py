"""What a build that was cut short leaves beside its pages, so that the next goes on: whose it is, and the survey."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from analysis.dashboards.events import BestEvents
from analysis.dashboards.opening import Opened
from analysis.dashboards.sources import Group
from analysis.dashboards.survey import Survey
from analysis.units import UnitCounter
from cayley_interp.files import write_atomically
from molt_lens.fingerprint import digest_of_tensors

FORMAT = 2
MANIFEST, SURVEY = "manifest.json", "survey.safetensors"
COUNTS = ("selected", "opened", "magnitude", "max_act")
EVENTS = ("score", "token", "act")


class Work:
    """OUT/work: a manifest and labels, which stay, and the survey for as long as it is needed.

    Raises:
        ValueError: the folder holds the site of something else, or files that are no site's.
    """

    def __init__(self, out: Path, digest: str, name: str):
        self.out, self.folder = out, out / "work"
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            if out.is_dir() and any(out.iterdir()):
                raise ValueError(f"{out} is not empty and holds no site of ours: choose another --out")
            self.state: dict[str, Any] = {"name": name, "digest": digest, "finished": False}
            (out / "data").mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._write()
            return
        try:
            self.state = json.loads(manifest.read_text(encoding="utf-8"))
            there, whose = self.state["digest"], self.state["name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is no manifest of a site ({error!r}): choose another --out") from error
        if there != digest:
            raise ValueError(
                f"{out} holds a site of {whose} from other weights, text or settings: give another --out, or the "
                "same model, --layers, --features, --tokens, --seed, --export and --labels to go on with it"
            )

    @property
    def finished(self) -> bool:
        return self.state["finished"]

    def finish(self) -> None:
        """Everything is written: the manifest stays, and what a provider said."""
        self.state["finished"] = True
        self._write()
        (self.folder / SURVEY).unlink(missing_ok=True)

    def _write(self) -> None:
        write_atomically(self.folder / MANIFEST, json.dumps(self.state, indent=1) + "\n")

    # ---- The survey ----

    def save_survey(self, surveys: Sequence[Survey]) -> None:
        tensors = {f"{i}.{name}": t.contiguous() for i, own in enumerate(surveys) for name, t in _tensors(own).items()}
        counted = {name: json.dumps(values) for name, values in _figures(surveys).items()}
        write_atomically(self.folder / SURVEY, save(tensors, counted))

    def load_survey(self, opened: Opened) -> list[Survey] | None:
        """None where there is none yet.

        Raises:
            ValueError: a damaged file.
        """
        path = self.folder / SURVEY
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tokens, nmse = (json.loads(file.metadata()[name]) for name in ("tokens", "nmse"))
                return [
                    _survey({name: file.get_tensor(f"{i}.{name}") for name in NAMES}, group, tokens[i], nmse[i])
                    for i, group in enumerate(opened.source.groups)
                ]
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete {self.out} and build again") from error


NAMES = (*COUNTS, *(f"{which}.{name}" for which in ("strongest", "sample") for name in EVENTS))


def _tensors(survey: Survey) -> dict[str, Tensor]:
    counts = {name: getattr(survey.counter, name) for name in COUNTS}
    both = {"strongest": survey.strongest, "sample": survey.sample}
    return counts | {f"{which}.{name}": getattr(events, name) for which, events in both.items() for name in EVENTS}


def _figures(surveys: Sequence[Survey]) -> dict[str, list[int] | list[float]]:
    return {"tokens": [own.counter.tokens for own in surveys], "nmse": [own.nmse for own in surveys]}


def _survey(tensors: dict[str, Tensor], group: Group, tokens: int, nmse: float) -> Survey:
    counter = UnitCounter(group.ranks, group.norms)
    counter.tokens = tokens
    for name in COUNTS:
        setattr(counter, name, tensors[name])
    return Survey(counter, _events(tensors, "strongest"), _events(tensors, "sample"), nmse)


def _events(tensors: dict[str, Tensor], which: str) -> BestEvents:
    events = BestEvents(*tensors[f"{which}.token"].shape)
    for name in EVENTS:
        setattr(events, name, tensors[f"{which}.{name}"])
    return events


def digest_of(opened: Opened, features: Sequence[str], seed: int, exports: Sequence[str], named_by: str) -> str:
    """Of everything that the pages depend on."""
    text = {name: getattr(opened.text, name) for name in ("windows", "documents", "counted")}
    parts = [
        FORMAT,
        opened.source.name,
        opened.fingerprint,
        [(group.name, group.n_units) for group in opened.source.groups],
        digest_of_tensors(text),
        list(features),
        seed,
        sorted(exports),
        named_by,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

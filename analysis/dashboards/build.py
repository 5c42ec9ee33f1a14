"""A site built in bounded memory: survey, choice, second pass block by block; cut short, it goes on where it was."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from analysis.dashboards.choice import choose, read_features
from analysis.dashboards.chunks import data_file, write_data
from analysis.dashboards.details import look_at
from analysis.dashboards.export_neuronpedia import export_neuronpedia
from analysis.dashboards.export_saedashboard import export_saedashboard
from analysis.dashboards.labelling import Labelling
from analysis.dashboards.labels import Provider
from analysis.dashboards.opening import Opened
from analysis.dashboards.pages import UNITS_PER_CHUNK, chunk_of, index_of
from analysis.dashboards.prompts import PROMPTS, prompt_of
from analysis.dashboards.site import copy_assets, site_of
from analysis.dashboards.survey import Progress, Survey, survey
from analysis.dashboards.work import Work, digest_of

Export = Literal["saedashboard", "neuronpedia"]
EXPORTS = {"saedashboard": export_saedashboard, "neuronpedia": export_neuronpedia}

UNITS_PER_BLOCK = 4_096
"""Units looked at in one pass over the text: some 50 kB each while it lasts."""


def build(
    opened: Opened,
    out: Path,
    *,
    features: Sequence[str] = ("top:200",),
    seed: int = 0,
    exports: Sequence[Export] = (),
    provider: Provider | None = None,
    settings: Sequence[tuple[str, str]] = (),
    progress: Progress = lambda *_: None,
) -> Path:
    """Write the site to `out`, or go on with one that was cut short there; returns its index.html.

    Args:
        features: which units get a page, as `read_features` has it.
        seed: of random:N.
        exports: other formats that the units with a page are written in too, under OUT.
        provider: names the units with a page.
        settings: shown on the model page.

    Raises:
        ValueError: `features` of another form, a unit that never opens, a folder with something else in it, or a
            provider that cannot be reached.
    """
    asked = read_features(opened.source.groups, features)
    named_by = "" if provider is None else provider.name
    work = Work(out, digest_of(opened, features, seed, exports, named_by), opened.source.name)
    copy_assets(out)
    if work.finished:
        return out / "index.html"
    surveys = work.load_survey(opened)
    if surveys is None:
        surveys = survey(opened.source, opened.text, progress)
        work.save_survey(surveys)
    labelling = None if provider is None else Labelling(work.folder, provider, opened.strings, seed)
    chosen = choose(opened.source.groups, surveys, asked, seed)
    missing = [
        {
            number: chunk
            for number, chunk in chunks_of(units).items()
            if not _chunk_file(out, group.name, number).is_file()
        }
        for group, units in zip(opened.source.groups, chosen, strict=True)
    ]
    for block in blocks_of(missing):
        _write_units(opened, out, surveys, block, exports, labelling, progress)
    common = []
    for group, own, units in zip(opened.source.groups, surveys, chosen, strict=True):
        labels = None if labelling is None else labelling.names(group.name, group.n_units)
        columns = index_of(opened, own, units, labels)
        common.append(columns["token"])
        write_data(out, f"index-{group.name}", columns)
    prompts = [prompt_of(opened, title, prompt, common) for title, prompt in PROMPTS]
    for i, prompt in enumerate(prompts):
        write_data(out, f"prompts-{i}", prompt)
    sheets = opened.sheets(progress)
    write_data(out, "site", site_of(opened, surveys, chosen, prompts, settings, sheets))
    work.finish()
    return out / "index.html"


def chunks_of(units: Sequence[int]) -> dict[int, Sequence[int]]:
    """The units of each chunk by its number."""
    return {
        start // UNITS_PER_CHUNK: units[start : start + UNITS_PER_CHUNK]
        for start in range(0, len(units), UNITS_PER_CHUNK)
    }


def blocks_of(
    chunks: Sequence[dict[int, Sequence[int]]], size: int = UNITS_PER_BLOCK
) -> Iterator[list[dict[int, Sequence[int]]]]:
    """The chunks of each group, in blocks of at most `size` units that one pass over the text looks at."""
    block: list[dict[int, Sequence[int]]] = [{} for _ in chunks]
    held = 0
    for group, own in enumerate(chunks):
        for number, chunk in own.items():
            if held and held + len(chunk) > size:
                yield block
                block, held = [{} for _ in chunks], 0
            block[group][number] = chunk
            held += len(chunk)
    if held:
        yield block


def _write_units(
    opened: Opened,
    out: Path,
    surveys: Sequence[Survey],
    block: Sequence[dict[int, Sequence[int]]],
    exports: Sequence[Export],
    labelling: Labelling | None,
    progress: Progress,
) -> None:
    units = [[unit for chunk in chunks.values() for unit in chunk] for chunks in block]
    found = look_at(opened.source, opened.text, surveys, units, progress, closed=labelling is not None)
    done, total = 0, sum(map(len, block))
    for group, (own, chunks, details) in enumerate(zip(opened.source.groups, block, found, strict=True)):
        of_unit = {d.unit: d for d in details}
        for number, chunk in chunks.items():
            looked_at = [of_unit[unit] for unit in chunk]
            for export in exports:  # before the pages: a chunk that is there has been exported
                EXPORTS[export](out, opened, group, surveys[group], looked_at, number)
            pages = chunk_of(opened, group, surveys[group], looked_at, progress)
            if labelling is not None:
                labelling.add(own.name, surveys[group], looked_at, pages, progress)
            write_data(out, _chunk_key(own.name, number), pages)
            done += 1
            progress("writing pages", done / total)


def _chunk_key(group: str, number: int) -> str:
    return f"units-{group}-{number:04d}"


def _chunk_file(out: Path, group: str, number: int) -> Path:
    return data_file(out, _chunk_key(group, number))

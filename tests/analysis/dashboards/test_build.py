"""A site against the survey and details it is made of; one that was cut short is gone on with."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from analysis.dashboards import build as build_module
from analysis.dashboards.__main__ import main
from analysis.dashboards.build import blocks_of, build, chunks_of
from analysis.dashboards.cayley_opening import loss_figures, parity_sheets
from analysis.dashboards.choice import flags_of
from analysis.dashboards.details import look_at
from analysis.dashboards.pages import UNITS_PER_CHUNK
from analysis.dashboards.prompts import PROMPTS
from analysis.dashboards.survey import survey
from analysis.geometry import nearest_atoms
from analysis.parity import Subject
from cayley_interp import CayleyDictionary
from cayley_interp.losses import window_losses
from cayley_interp.pretrained import BUNDLED
from tests.analysis.dashboards.tiny_site import NAME, SURROGATE, ByRule, files_of, read_data, tiny_opened

ALL = ("random:64",)


@pytest.fixture(scope="module")
def opened():
    return tiny_opened()


@pytest.fixture(scope="module")
def site(opened, tmp_path_factory):
    out = tmp_path_factory.mktemp("sites") / "site"
    build(opened, out, features=ALL)
    return out


@pytest.fixture(scope="module")
def surveys(opened):
    return survey(opened.source, opened.text)


def test_the_index_has_every_unit_and_pages_those_that_open(site, surveys):
    groups = read_data(site, "site")["groups"]
    assert [g["name"] for g in groups] == ["L0.0", "L0.1", "L1.0", "L1.1"]
    assert [(g["parent_group"], g["child_group"]) for g in groups[:2]] == [(None, "L0.1"), ("L0.0", None)]
    n_dead = 0
    for group, own in zip(groups, surveys, strict=True):
        index = read_data(site, f"index-{group['name']}")
        assert {len(column) for column in index.values()} == {group["n_units"]}
        assert index["frequency"] == pytest.approx(own.counter.frequency().tolist(), rel=1e-3)
        assert index["flags"] == flags_of(own)
        dead = [unit for unit, flags in enumerate(index["flags"]) if flags & 1]
        n_dead += len(dead)
        assert group["dead"] == len(dead)
        assert [unit for unit, page in enumerate(index["page"]) if page < 0] == dead
        assert [unit for unit, token in enumerate(index["token"]) if token == ""] == dead
        assert [unit for unit, entropy in enumerate(index["entropy"]) if entropy is None] == dead
    assert n_dead  # or nothing was tested


def test_a_page_says_what_the_details_say(opened, site, surveys):
    chosen = [own.counter.opened.nonzero().flatten().tolist() for own in surveys]
    found = look_at(opened.source, opened.text, surveys, chosen)[3]
    index, chunk = read_data(site, "index-L1.1"), read_data(site, "units-L1.1-0000")
    strings = chunk["strings"]
    logits = opened.source.logits(torch.stack([d.written for d in found]))
    assert {int(unit) for unit in chunk["units"]} == {d.unit for d in found if index["page"][d.unit] == 0}
    for details, moved in zip(found, logits, strict=True):
        page = chunk["units"][str(details.unit)]
        assert page["frequency"] == index["frequency"][details.unit]
        assert sum(page["histogram"]["counts"]) == surveys[3].counter.opened[details.unit]
        assert page["documents"] == details.documents
        assert [c["peak"] for c in page["contexts"]] == [c.peak for c in details.contexts]
        first = page["contexts"][0]
        assert [strings[s] for s in first["tokens"]] == [opened.strings[t] for t in details.contexts[0].tokens]
        assert first["acts"] == pytest.approx(details.contexts[0].acts, abs=1e-3, rel=1e-3)
        assert strings[page["promoted"][0][0]] == opened.strings[int(moved.argmax())]
        assert page["suppressed"][0][1] == pytest.approx(moved.min().item(), rel=1e-2)
        assert page["extra"]["parent"] == details.unit % 16
        nearest = nearest_atoms(CayleyDictionary(4, 6), details.unit, 12)
        assert page["extra"]["nearest"] == [list(pair) for pair in zip(*map(torch.Tensor.tolist, nearest), strict=True)]


def test_family_of_a_parent(site):
    page = next(iter(read_data(site, "units-L1.0-0000")["units"].values()))
    unit = page["unit"]
    assert page["extra"] | {"nearest": []} == {
        "parent": None,
        "children": [unit, unit + 16, unit + 32, unit + 48],
        "nearest": [],
        "as_near": 15,  # a basis: all are orthogonal
        "siblings": 0,
    }


def test_hostile_names_and_tokens_are_data_like_any_other(site):
    assert read_data(site, "site")["name"] == NAME
    strings = [s for file in site.glob("data/units-*") for s in read_data(site, file.stem)["strings"]]
    assert any(SURROGATE in s for s in strings)
    assert any("onerror" in s for s in strings)


def test_prompts(opened, site):
    summary = read_data(site, "site")["prompts"]
    assert len(summary) == len(PROMPTS)
    for i, (title, prompt) in enumerate(PROMPTS):
        text, data = opened.text_of(prompt), read_data(site, f"prompts-{i}")
        assert summary[i] == {"title": title, "n_tokens": len(data["tokens"])}
        run = opened.source.run(text.windows, text.counted)
        for group, (indices, values) in zip(opened.source.groups, run.codes, strict=True):
            for pos, row in enumerate(data["acts"][group.name]):
                assert [a for _, a in row] == sorted((a for _, a in row), reverse=True)
                is_open = values[0, pos] != 0
                assert {u for u, _ in row} == set(indices[0, pos][is_open].tolist())
                assert all(str(u) in data["common"][group.name] for u, _ in row)


@pytest.mark.parametrize("size", [1, UNITS_PER_CHUNK, 100, 10**6])
def test_blocks_hold_every_unit_once_and_are_bounded(size):
    chosen = [list(range(200)), [], list(range(0, 140, 2))]
    blocks = list(blocks_of(list(map(chunks_of, chosen)), size))
    for group, units in enumerate(chosen):
        assert [unit for block in blocks for chunk in block[group].values() for unit in chunk] == units
    for block in blocks:
        assert sum(len(chunk) for chunks in block for chunk in chunks.values()) <= max(size, UNITS_PER_CHUNK)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["counting units", "looking at units", "writing pages"])
def test_cut_short_at_any_time_it_goes_on_to_the_same_files(opened, site, tmp_path, monkeypatch, at):
    monkeypatch.setattr(build_module, "blocks_of", partial(blocks_of, size=64))
    said: list[str] = []

    def progress(what: str, _: float) -> None:
        said.append(what)
        if what == at and said.count(what) == 3:
            raise Killed

    out = tmp_path / "site"
    with pytest.raises(Killed):
        build(opened, out, features=ALL, progress=progress)
    assert not (out / "data" / "site.js").exists()
    written = len(list(out.glob("data/units-*")))
    said.clear()
    build(opened, out, features=ALL, progress=lambda what, _: said.append(what))
    assert ("counting units" in said) == (at == "counting units")
    finished, expected = files_of(out), files_of(site)
    manifests = [files.pop("work/manifest.json") for files in (finished, expected)]
    assert finished == expected
    assert said.count("writing pages") + written == len(list(site.glob("data/units-*")))
    assert all(b'"finished": true' in manifest for manifest in manifests)


def test_exports_are_beside_the_pages(opened, tmp_path):
    build(
        opened, tmp_path / "site", features=("L1.1:" + str(some_unit(opened)),), exports=("saedashboard", "neuronpedia")
    )
    assert (tmp_path / "site" / "saedashboard" / "L1.1" / "batch-0.json").is_file()
    assert list((tmp_path / "site" / "neuronpedia").rglob("features/batch-0.jsonl.gz"))


def some_unit(opened) -> int:
    return int(survey(opened.source, opened.text)[3].counter.opened.argmax())


def test_labels_are_on_the_pages_and_in_the_index(opened, tmp_path):
    out = tmp_path / "site"
    build(opened, out, features=("random:12",), provider=ByRule())
    n_named = 0
    for group in read_data(out, "site")["groups"]:
        index = read_data(out, f"index-{group['name']}")
        for chunk in {page for page in index["page"] if page >= 0}:
            for unit, page in read_data(out, f"units-{group['name']}-{chunk:04d}")["units"].items():
                assert index["label"][int(unit)] == (page["label"] or {"name": ""})["name"]
                if page["label"] is not None:
                    n_named += 1
                    assert page["label"]["name"].startswith("<i>")
                    assert 0 <= page["label"]["score"] <= 1
                    assert page["label"]["provider"] == "rules <b>"
    assert n_named > 5


def test_a_provider_is_asked_nothing_twice(opened, tmp_path):
    out, whole = tmp_path / "site", ByRule()
    build(opened, tmp_path / "whole", features=("random:12",), provider=whole)
    first, second = ByRule(fails_at=5), ByRule()
    with pytest.raises(ValueError, match="gives no completion"):
        build(opened, out, features=("random:12",), provider=first)
    with (out / "work" / "labels.jsonl").open("a") as file:
        file.write('{"group": "L0.0", "un')  # as a kill leaves it
    build(opened, out, features=("random:12",), provider=second)
    assert first.asked - 1 + second.asked - whole.asked in (0, 1)  # of the unit that failed the name may be known
    assert files_of(out / "data") == files_of(tmp_path / "whole" / "data")


def test_without_a_provider_there_are_no_labels(site):
    assert "label" not in read_data(site, "index-L0.0")


def test_contexts_in_which_a_unit_is_closed_are_closed_all_through(opened, surveys):
    chosen = [own.counter.opened.nonzero().flatten()[:6].tolist() for own in surveys]
    (found, *_), (plain, *_) = (look_at(opened.source, opened.text, surveys, chosen, closed=c) for c in (True, False))
    assert sum(len(details.closed) for details in found) > 10
    codes = opened.source.run(opened.text.windows, opened.text.counted).codes[0]
    for details, without in zip(found, plain, strict=True):
        assert without.closed == []
        assert details.contexts == without.contexts
        for context in details.closed:
            window = opened.text.windows[context.window].tolist()
            here = [s for s in range(len(window)) if window[s : s + len(context.tokens)] == context.tokens]
            is_open = (codes[0][context.window] == details.unit) & (codes[1][context.window] != 0)
            assert not any(is_open[s : s + len(context.tokens)].any() for s in here[:1])


def test_tables_are_measured_for_the_model_page(opened, tmp_path):
    beside = Subject("plain", tiny_opened(seed=1).source.model, None)
    subject = Subject(NAME, opened.source.model, None)
    measured = replace(opened, sheets=lambda progress: parity_sheets([subject, beside], opened.text, progress))
    build(measured, tmp_path / "site", features=("random:1",))
    losses, differences, positions = read_data(tmp_path / "site", "site")["sheets"]
    a, b = (window_losses(s.model, opened.text.windows, 8) for s in (subject, beside))
    assert [float(row[1]) for row in losses["rows"]] == pytest.approx([a.mean().item(), b.mean().item()], abs=1e-4)
    assert float(differences["rows"][0][1].split(" ± ")[0]) == pytest.approx((a - b).mean().item(), abs=1e-4)
    assert len(positions["rows"]) == 5  # 0, 1, 2-3, 4-7, 8-14


def test_a_finished_site_is_not_built_again(opened, site):
    before = files_of(site)
    build(opened, site, features=ALL, progress=lambda *_: pytest.fail("something was computed"))
    assert files_of(site) == before


def test_another_model_or_other_settings_are_refused(opened, site, tmp_path):
    for other, features in ((tiny_opened(seed=1), ALL), (opened, ("top:3",))):
        with pytest.raises(ValueError, match=r"holds a site of .* from other weights, text or settings"):
            build(other, site, features=features)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no site"):
        build(opened, tmp_path, features=ALL)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_wrong_features_are_refused_before_anything_is_written(opened, tmp_path):
    with pytest.raises(ValueError, match="--features best"):
        build(opened, tmp_path / "site", features=("best",))
    assert not (tmp_path / "site").exists()


def test_the_command_refuses_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such-model: expected a bundled name \(cayley-tiny-2L-sotu, "):
        main("no-such-model", tmp_path / "site")
    with pytest.raises(ValueError, match="--tokens 0"):
        main("cayley-tiny-2L-sotu", tmp_path / "site", tokens=0)
    with pytest.raises(ValueError, match=r"layers \[9\] of cayley-tiny-2L-sotu: expected some of 0 to 5"):
        main("cayley-tiny-2L-sotu", tmp_path / "site", layers=(9,))
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("name", ["cayley-tiny-2L-sotu", "folder"])
def test_the_bundled_model_has_its_loss_curves(name, tmp_path):
    if name == "folder":
        name = str(shutil.copytree(BUNDLED / "cayley-tiny-2L-sotu", tmp_path / "model"))
    (figure,) = loss_figures(name)
    steps = {curve.name: [step for step, _ in curve.points] for curve in figure.curves}
    assert steps["validation"] == [*range(250, 2_501, 250)]
    assert steps["training"] == [*range(10, 2_501, 10)]

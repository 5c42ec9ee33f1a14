"""A comparison of real tiny runs: its figures are those of the definitions, it is found again, bad input is refused."""

import csv
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.behaviour import measure_behaviour
from analysis.compare import compare, write_comparison
from analysis.comparison import Settings
from analysis.comparison_tables import points_of
from analysis.held_out import HeldOut, read_held_out, write_held_out
from analysis.jacobian import jacobian_faithfulness
from analysis.replacements import measure_fit
from analysis.subjects import SiteText
from molt_lens import Replacement, matched_map
from molt_lens.activations import collect
from molt_lens.folder import load_replacement, save_replacement
from molt_lens.hosts import Site, load_host
from molt_lens.packing import keep_mask
from tests.analysis.tiny_runs import host_folder, tiny_flags, train

SITE = Site(1, target="post_norm_out")
SETTINGS = Settings(tokens=500, behaviour_tokens=256, jacobian_tokens=64)
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def runs(folder):
    """Two seeds of a MOLT with a skip, one in a folder with a hostile name, and a mixture of decoders."""
    flags = tiny_flags(folder)
    molt = ["--kind", "molt-skip", "--gate", "topk:4", "--seed"]
    return [
        train(flags, folder / "molt-0", *molt, "0"),
        train(flags, folder / HOSTILE, *molt, "1"),
        train(flags, folder / "mxd", "--kind", "mxd", "--gate", "topk:8"),
    ]


@pytest.fixture(scope="module")
def comparison(runs, folder):
    comparison = compare(runs, SETTINGS, folder / "out", command="the command")
    write_comparison(comparison, folder / "out", "config")
    return comparison


def figures(comparison, name):
    return next(m.figures for m in comparison.measured if m.subject.name == name)


def test_figures_are_those_of_the_definitions(comparison, runs, folder):
    host = load_host(folder / "tiny-gemma")
    ids = read_held_out(Path(runs[0])).input_ids
    sample = collect(host, SITE, lambda: iter(ids), SETTINGS.tokens)
    ridge = load_replacement(Path(runs[0]) / "ridge")[0]
    rows = SiteText(host, SITE, ids, SETTINGS.tokens).spread_tokens(64)
    for name, n in ((runs[0], 64), (runs[2], 4)):
        replacement, own = load_replacement(Path(name) / "model")[0], figures(comparison, name)
        fit = measure_fit(replacement, sample.x, sample.y)
        assert [own["nmse"], own["fvu"], own["cosine"]] == pytest.approx([fit.nmse, fit.fvu, fit.cosine], rel=1e-5)
        b = measure_behaviour(host, {SITE: replacement}, ids[:4], {SITE: sample.y.mean(0)})
        expected = [b.ce_spliced - b.ce_host, b.kl, b.top1, b.recovered_zero, b.recovered_mean]
        found = [own[key] for key in ("ce_above_host", "kl", "top1", "recovered_zero", "recovered_mean")]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
        std = {"std_in": ridge.input.std, "std_out": ridge.output.std}
        jacobian = jacobian_faithfulness(
            host, SITE, replacement, sample.x[rows[:n]], coordinates="standardized", **std
        ).mean()
        assert own["jacobian_tokens"] == n
        assert {k: own[f"jacobian_{k}"] for k in jacobian} == pytest.approx(jacobian, rel=1e-6)
    assert figures(comparison, runs[0])["l0"] == 4
    assert all(0 < figures(comparison, runs[0])[f"{name}_se"] < 1 for name in ("nmse", "fvu", "cosine", "kl"))


def test_controls_are_what_they_are_called(comparison, runs):
    mean, zero, ridge, constant = (
        figures(comparison, name) for name in ("mean of the target", "zero", "ridge", "mean Jacobian")
    )
    assert [mean["nmse"], mean["fvu"], mean["jacobian_cosine"]] == pytest.approx([1, 1, 0], abs=1e-4)
    assert mean["recovered_mean"] == zero["recovered_zero"] == 0
    assert zero["nmse"] > 1
    assert ridge["nmse"] < 1
    assert ridge["l0"] == constant["l0"] == 0
    # The constant map nearest to all Jacobians, as far as other tokens of the text tell.
    assert constant["jacobian_cosine"] > ridge["jacobian_cosine"]
    skip = figures(comparison, f"{runs[0]}, its skip alone")
    assert figures(comparison, runs[0])["nmse"] < skip["nmse"] < 1
    assert sum(m.subject.control for m in comparison.measured) == 6


def test_tokens_of_the_jacobian_are_spread_over_sequences(runs, folder):
    host, ids = load_host(folder / "tiny-gemma"), read_held_out(Path(runs[0])).input_ids
    n = int(keep_mask(host, ids[:4]).sum())
    text = SiteText(host, SITE, ids[:4], n)
    rows = text.spread_tokens(42)
    assert torch.bincount(text.sequence[rows]).tolist() == [11, 11, 10, 10]
    assert torch.equal(text.spread_tokens(10), rows[:10])
    assert sorted(text.spread_tokens(n).tolist()) == list(range(n))
    beside = text.beside(10)
    assert not any(torch.equal(x, other) for x in text.spread(10) for other in beside)
    assert torch.equal(torch.cat([text.spread(10), beside]), text.spread(20))
    with pytest.raises(ValueError, match=f"{n + 1} tokens at which to compare Jacobians, of {n}"):
        text.spread_tokens(n + 1)


def test_seeds_make_one_point_with_their_mean_and_spread(comparison, runs):
    points = points_of(comparison, SITE, "config")
    assert [p.label for p in points[:2]] == ["molt-skip topk:4 N=1 2 seeds", "mxd topk:8 N=1"]
    values = [figures(comparison, name)["nmse"] for name in runs[:2]]
    assert points[0].value("nmse") == statistics.fmean(values)
    assert points[0].error("nmse") == statistics.stdev(values)
    assert points[1].error("nmse") == figures(comparison, runs[2])["nmse_se"]
    assert [p.label for p in points_of(comparison, SITE, "run")[:2]] == [
        "molt-skip topk:4 N=1 seed 0",
        "molt-skip topk:4 N=1 seed 1",
    ]


def test_files_are_complete_and_the_page_is_inert(comparison, runs, folder):
    out = folder / "out"
    with (out / "compare.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines[:3]] == runs
    assert float(lines[2]["nmse"]) == figures(comparison, runs[2])["nmse"]
    assert {"seed", "training_tokens", "bits_per_token", "jacobian_cosine_se", "jacobian_tokens"} <= lines[0].keys()
    about = json.loads((out / "compare.json").read_text())
    assert about["maps"][0]["config"]["gate"] == "topk:4"
    assert about["host_fingerprint"] == load_host(folder / "tiny-gemma").fingerprint
    assert about["command"] == "the command"
    assert about["settings"]["tokens"] == 500
    page = (out / "index.html").read_text()
    assert page.count('data-plot="') == 4
    assert HOSTILE not in page
    assert "molt-skip topk:4 N=1 2 seeds" in page
    assert "±" in (out / "compare.md").read_text()


@pytest.mark.usefixtures("comparison")
def test_what_was_measured_is_found_again(runs, folder):
    measured = folder / "out" / "measured"
    before = {path.name for path in measured.iterdir()}
    file = next(f for f in measured.iterdir() if '"l0": 8.0' in f.read_text())
    content = json.loads(file.read_text())
    content["figures"]["l0"] = 8.25
    file.write_text(json.dumps(content))
    again = compare(runs, SETTINGS, folder / "out")
    assert figures(again, runs[2])["l0"] == 8.25
    assert {path.name for path in measured.iterdir()} == before
    file.write_text("{")  # cut short: measured again
    assert figures(compare(runs, SETTINGS, folder / "out"), runs[2])["l0"] == 8


def test_raw_coordinates(runs, folder):
    raw = replace(SETTINGS, coordinates="raw")
    own = figures(compare(runs[:1], raw, folder / "out"), runs[0])
    host, ids = load_host(folder / "tiny-gemma"), read_held_out(Path(runs[0])).input_ids
    text = SiteText(host, SITE, ids, SETTINGS.tokens)
    jacobian = jacobian_faithfulness(host, SITE, load_replacement(Path(runs[0]) / "model")[0], text.spread(64)).mean()
    assert {k: own[f"jacobian_{k}"] for k in jacobian} == pytest.approx(jacobian, rel=1e-6)


def test_sites_are_kept_apart_and_folders_compared_too(runs, folder, tmp_path):
    host, other = load_host(folder / "tiny-gemma"), Site(2)
    map = Replacement(matched_map("transcoder", 32, 32, n=1, gate="topk:5")).eval()
    save_replacement(map, tmp_path / "alone", host=host, site=other)
    comparison = compare([runs[0], str(tmp_path / "alone")], SETTINGS, tmp_path / "out")
    assert comparison.sites() == [SITE, other]
    points = points_of(comparison, other, "config")
    assert [p.label for p in points] == [str(tmp_path / "alone"), "zero", "mean of the target", "mean Jacobian"]
    assert points[0].subject.text == "unknown"
    assert points[0].value("l0") == 5


def test_runs_with_other_held_out_text_need_a_word(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    held_out = read_held_out(other)
    write_held_out(other, HeldOut(held_out.input_ids.flip(0), held_out.host_name, held_out.host_fingerprint))
    with pytest.raises(ValueError, match=r"other held out other text than .*molt-0"):
        compare([runs[0], str(other)], SETTINGS, tmp_path / "out")
    comparison = compare([runs[0], str(other)], SETTINGS, tmp_path / "out", text=Path(runs[0]))
    assert [m.subject.text for m in comparison.measured[:2]] == ["same", "other"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "--tokens 0: expected 1 or more"),
        ({"tokens": 10**6}, "--tokens 1000000: the held-out text has"),
        ({"tokens": 60, "jacobian_tokens": 4}, "two of 64 tokens are needed"),
        ({"jacobian_tokens": 251}, "--jacobian-tokens 251, and as many .* are among the --tokens 500"),
    ],
)
def test_bad_settings(change, message, runs, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(runs[:1], replace(SETTINGS, **change), tmp_path)


def test_bad_names(runs, tmp_path):
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([], SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="are the same"):
        compare([runs[0], runs[0] + "/"], SETTINGS, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        compare([runs[0], str(tmp_path / "absent")], SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="is the folder of a run that has ended"):
        compare([str(Path(runs[0]) / "model")], SETTINGS, tmp_path)
    other = host_folder(tmp_path / "another", seed=1)
    map = Replacement(matched_map("transcoder", 32, 32, n=1, gate="topk:5")).eval()
    save_replacement(map, tmp_path / "foreign", host=load_host(other), site=SITE)
    with pytest.raises(ValueError, match=r"foreign: .*another.*tiny-gemma"):
        compare([runs[0], str(tmp_path / "foreign")], SETTINGS, tmp_path)
    with pytest.raises(ValueError, match=r"the held-out text is of .*tiny-gemma .* host is .*another"):
        compare(runs[:1], SETTINGS, tmp_path, host=str(other))


def test_a_map_that_is_not_finite_is_named(runs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    weights = load_file(broken / "model" / "model.safetensors")
    weights["map.b_dec"] = weights["map.b_dec"] + 3e38
    weights["output.std"] = weights["output.std"] + 1e4
    save_file(weights, broken / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"broken: .*not finite"):
        compare([str(broken)], SETTINGS, tmp_path)

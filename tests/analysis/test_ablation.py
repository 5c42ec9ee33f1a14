"""The ablation: what is declared is what is trained, its statistics by hand, and a real one, twice."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from analysis.ablation import Ablation, main, write_results
from analysis.ablation_results import OverSeeds, Place, Results, Run
from analysis.ablation_tables import loss_sheet, sheets
from analysis.matched import Validation
from analysis.page import flatten
from analysis.probing import KS, ProbeRow, ProbeScore
from analysis.variants import VARIANTS, Variant, choose
from tests.helpers import metrics, small_corpus
from training.run_folder import start_folder
from training.train_cayley import COMMAND

DIFFERENT = {
    "lockstep": {"optim.muon_lr", "optim.muon_min_lr", "optim.weight_decay"},
    "random": {"model.dictionary", "model.dictionary_seed"},
    "parents": {"model.routing"},
    "no-zombie-fix": {"model.forward_standardized"},
    "signed": {"model.signed"},
    "vanilla": {"name", "model.levels"},
    "bent-64": {"model.dictionary"},
    "random-64": {"model.dictionary", "model.dictionary_seed"},
}


# ---- What is declared ----


def parsed(ablation: Ablation) -> dict[tuple[str, int], dict[str, str]]:
    """By variant and seed the settings that the training command makes of a run's flags."""
    configs = {}
    for job in ablation.jobs(cold_stops=False):
        config, run_dir, resume = COMMAND.parse(job.command()[3:])
        assert (run_dir, resume) == (job.run_dir, False)
        variant, seed = job.name.rsplit("-s", 1)
        configs[variant, int(seed)] = dict(flatten(json.loads(json.dumps(asdict(config) | {"out": None}))))
    return configs


def test_variants_differ_from_their_base_in_what_they_declare_and_in_nothing_else():
    configs = parsed(Ablation(Path("x"), VARIANTS, seeds=(1,)))
    assert {v.name for v in VARIANTS if v.base and not v.cold_stop} == set(DIFFERENT)
    for variant in VARIANTS:
        if variant.base and not variant.cold_stop:
            own, base = configs[variant.name, 1], configs[variant.base, 1]
            assert {key for key in own if own[key] != base[key]} == DIFFERENT[variant.name], variant.name


def test_runs_of_a_seed_see_the_same_batches_whatever_the_variant():
    configs = parsed(Ablation(Path("x"), VARIANTS, seeds=(0, 1), arguments=("--data", "some.txt")))
    what = ("seed", "batch_size", "grad_accum", "max_steps", "model.n_ctx", "model.d_vocab")
    for seed in (0, 1):
        streams = {
            tuple((key, c[key]) for key in c if key in what or key.startswith("data."))
            for (_, own), c in configs.items()
            if own == seed
        }
        assert len(streams) == 1
        assert dict(streams.pop())["data.data"] == "some.txt"
    assert [configs["random", seed]["model.dictionary_seed"] for seed in (0, 1)] == ["0", "1"]


def test_a_variant_brings_what_it_is_compared_with():
    assert [v.name for v in choose(("bent-64",))] == ["gold-64", "bent-64"]
    assert [v.name for v in choose(("vanilla-equal-loss",))] == ["tiny", "vanilla", "vanilla-equal-loss"]
    assert choose(()) == VARIANTS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--variants", "no-such"], "no variant is called 'no-such': the variants are tiny, lockstep"),
        (["--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["--seeds", "1", "1"], "expected distinct seeds"),
        (["--variants", "tiny", "--seeds", "1"], "tiny of one seed is nothing to compare"),
        (["--", "--muon-lr", "1"], "--muon-lr behind -- is set by the ablation"),
        (["--", "--max_steps=3"], "--max-steps behind -- is set by the ablation"),
        (["--variants", "vanilla", "--", "--levels", "7,8,0"], "--levels behind -- is set by"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(argv, message, capsys, tmp_path):
    assert main(["--out", str(tmp_path / "out"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--out", str(out), "--variants", "vanilla-equal-loss", "--seeds", "3", "--dry-run", "--", "--data", "a b"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("--data 'a b'" in line and "--seed 3" in line for line in lines[:2])
    assert lines[2] == "# vanilla-equal-loss-s3 ends at the loss of tiny-s3, which is not known yet"
    assert not out.exists()


# ---- Statistics ----


def fabricated(folder: Path, variant: Variant, seed: int, losses: list[float], curve: list[float]) -> Run:
    """A run that was never trained, as its folder says it; 100 tokens a step."""
    run_dir = folder / "runs" / f"{variant.name.strip('<>/')}-s{seed}"
    run_dir.mkdir(parents=True)
    config = {"batch_size": 2, "grad_accum": 1, "model": {"n_ctx": 50}}
    (run_dir / "config.json").write_text(json.dumps(config))
    points = [Validation(step, 100 * step, loss) for step, loss in enumerate(curve, start=1)]
    records = [{"step": point.step, "val_loss": point.val_loss} for point in points]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    level = {"n_features": 8, "l0": 2.5, "dead": 1, "zombie": 0, "dense": 3, "median_frequency": 0.1}
    levels = [] if "vanilla" in variant.name else [{"layer": layer, "level": 0, **level} for layer in (0, 1)]
    worth = [{"layer": 0, "nats": 0.5}, {"layer": 1, "nats": 0.25}]
    final = {"levels": levels, "mlp_worth": worth, "n_parameters": 10}
    probes = [
        ProbeRow("x", 1, "codes", "mean", "party", ProbeScore(k, 0.5 + seed / 100, 0.01, 16, 90))
        for k in KS
        if variant.probed
    ]
    place = Place(variant, seed, run_dir)
    return Run(place, torch.tensor(losses, dtype=torch.float64)[:, None], points, final, probes)


HOSTILE = "<script>alert(1)</script>"
BASE = Variant("base", "tiny", (), "the base", probed=True)
WORSE = Variant(HOSTILE, "tiny", ("--signed", "True"), "<img src=x onerror=alert(2)>", "base")
STOPPED = Variant("vanilla-stopped", "tiny-vanilla", (), "stopped", "base", cold_stop="vanilla")


@pytest.fixture
def results(tmp_path) -> Results:
    runs = []
    for seed, above in enumerate((0.1, 0.2, 0.6)):
        curve = [5.0, 4.0, 3.0]
        runs.append(fabricated(tmp_path, BASE, seed, [3.0, 4.0, 2.0], curve))
        runs.append(fabricated(tmp_path, WORSE, seed, [3.0 + above, 4.0, 2.0 + 2 * above], curve))
        # Twice at the base's last loss after two steps, once never near it.
        runs.append(fabricated(tmp_path, STOPPED, seed, [3.0, 4.0, 2.0], [4.0, 3.0] if seed < 2 else [4.0, 3.5]))
    return Results((BASE, WORSE, STOPPED), runs, n_tokens=150, n_sequences=3)


def test_differences_are_paired_by_seed_and_sequence(results):
    worse, stopped = results.differences()
    assert {seed: pair.mean for seed, pair in worse.by_seed.items()} == pytest.approx({0: 0.1, 1: 0.2, 2: 0.6})
    # Of a, 0 and 2a: deviation a, over the root of three sequences.
    assert [p.standard_error for p in worse.by_seed.values()] == pytest.approx([a / 3**0.5 for a in (0.1, 0.2, 0.6)])
    over = worse.over_seeds
    assert over.mean == pytest.approx(0.3)
    assert over.standard_error == pytest.approx((0.07 / 3) ** 0.5)
    assert over.half_interval == pytest.approx(4.302653 * over.standard_error, rel=1e-6)
    assert stopped.over_seeds == OverSeeds((0.0, 0.0, 0.0))


def test_one_seed_has_no_error_over_seeds(results):
    alone = replace(results, runs=[run for run in results.runs if run.place.seed == 1])
    row = loss_sheet(alone).rows[1]
    assert row[3:6] == ["+0.2000", "—", "+0.2000 ± 0.1155"]


def test_units_are_summed_over_layers(results):
    assert results.runs[0].levels() == [{"features": 16, "dead": 2, "zombie": 0, "dense": 6, "l0": 2.5}]
    assert results.runs[2].levels() == []
    assert results.runs[0].least_mlp() == 0.25


def test_token_tax_of_what_was_stopped_and_why_there_is_none(results):
    taxes = results.taxes()
    assert [tax.tax and tax.tax.ratio for tax in taxes] == [1.5, 1.5, None]
    assert "no match for a loss of 3.0000" in taxes[2].why_not


def test_the_page_opens_and_takes_names_for_text(results, tmp_path):
    ablation = Ablation(tmp_path, (BASE, WORSE, STOPPED), seeds=(0, 1, 2, 3))
    page = write_results(results, ablation).read_text()
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page
    for plot in ("forest", "curves-0", "probe-scores"):
        assert page.count(f'id="{plot}"') == 1
        assert f'data-plot="{plot}"' in page
    assert "base-s3" in page  # named as missing
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert written["missing"] == ["base-s3", f"{HOSTILE}-s3", "vanilla-stopped-s3"]
    assert written["differences"][0]["mean"] == pytest.approx(0.3)
    assert len((tmp_path / "ablation.csv").read_text().splitlines()) == 10
    starts = ("Validation loss in nats per token on 150 tokens in 3 sequences", "Features", "Token tax", "Party")
    assert all(sheet.title.startswith(start) for sheet, start in zip(sheets(results), starts, strict=True))


# ---- A real one ----

LEVELS = ("--levels", "4,3,0;6,4,4")
SMALL = (
    Variant("small", "tiny", LEVELS, "the base"),
    Variant("vanilla", "tiny-vanilla", ("--levels", "None"), "no bottleneck", "small"),
    Variant(
        "vanilla-equal-loss", "tiny-vanilla", ("--levels", "None"), "no bottleneck", "small", "vanilla", probed=True
    ),
)
FLAGS = [
    *("--n-layers", "2", "--n-heads", "2", "--d-model", "16", "--n-ctx", "16", "--d-vocab", "300"),
    *("--batch-size", "4", "--warmup", "2", "--val-tokens", "2048", "--log-every", "10", "--device", "cpu"),
]


@pytest.mark.slow
def test_two_variants_and_two_seeds_end_to_end_and_nothing_trained_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("analysis.variants.VARIANTS", SMALL)
    monkeypatch.setattr("analysis.ablation_results.WORDS", 30)
    monkeypatch.setattr("analysis.ablation_results.PER_SPEECH", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, corpus = tmp_path / "out", small_corpus(tmp_path / "corpus")
    flags = (*FLAGS, "--data", str(corpus))
    options = ["--out", str(out), "--seeds", "0", "1", "--max-steps", "40", "--jobs", "2"]
    argv = [*options, "--", *flags]

    # As a run leaves its folder that is stopped before its first step.
    ablation = Ablation(out, SMALL, (0, 1), 40, flags)
    ablation.start()
    config, run_dir, _ = COMMAND.parse(next(ablation.jobs(cold_stops=False)).command()[3:])
    start_folder(config, run_dir, torch.device("cpu"), processes=1)

    assert main(argv) == 0
    written = json.loads((out / "ablation.json").read_text())
    assert written["missing"] == []
    assert [run["variant"] for run in written["runs"]] == [v.name for v in SMALL] * 2
    for run in written["runs"]:
        final = metrics(out / "runs" / f"{run['variant']}-s{run['seed']}")[-1]["final"]
        assert run["val_loss"] == pytest.approx(final["val_loss"], abs=1e-6)
    assert {row["model"] for row in written["probes"]} == {"vanilla-equal-loss-s0"}
    assert len(written["token_tax"]) == 2
    assert "small-s0" in (out / "index.html").read_text()

    logs = {log.name: log.read_bytes() for log in (out / "logs").iterdir()}
    kept = {file: file.stat().st_mtime_ns for file in (out / "measured").iterdir()}
    assert main(argv) == 0
    assert {log.name: log.read_bytes() for log in (out / "logs").iterdir()} == logs
    assert {file: file.stat().st_mtime_ns for file in (out / "measured").iterdir()} == kept
    capsys.readouterr()
    assert main([*options, "--dry-run", "--", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "# small-s0 is done"

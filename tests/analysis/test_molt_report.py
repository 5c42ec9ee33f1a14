"""The page of a replacement's run, of every kind of map: complete, self-contained, without a clash of names."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from analysis.molt_report import write_molt_report
from analysis.replacements import ReplacementEvaluation, evaluate_replacement
from molt_lens import LinearMap, Replacement, matched_map
from molt_lens.hosts import Site
from molt_lens.packing import keep_mask, pack_documents
from tests.molt_lens.host_models import tiny_host, tiny_text
from training.molt_recipes import MOLT_RECIPES

SITE = Site(1, target="post_norm_out")


def evaluated(kind: str) -> ReplacementEvaluation:
    torch.manual_seed(0)
    host = tiny_host("gemma3")
    sequences = torch.stack(list(pack_documents([tiny_text(400)], host, 40)))
    keep = keep_mask(host, sequences)
    x, y = (acts[keep] for acts in host.capture(SITE, sequences))
    made = Replacement(matched_map(kind, 32, 32, n=1, gate="topk:4"))
    made.input.set(x.mean(0), x.std(0))
    made.output.set(y.mean(0), y.std(0))
    made.map.calibrate(made.input(x), 0.25, 0.01)
    mean = Replacement(LinearMap(32, 32))
    mean.output.load_state_dict(made.output.state_dict())
    return evaluate_replacement(made, host, SITE, x, y, sequences, {"mean": mean, "<b>other</b>": mean})


def make_run(folder: Path, evaluation: ReplacementEvaluation) -> Path:
    folder.mkdir()
    config = asdict(MOLT_RECIPES["gemma-3-270m-L9-N1"][1]) | {"name": "<script>alert(1)</script>"}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    records = [
        {"step": step, "tokens": 1024 * step, "mse": 1 / step, "l0": 4.0, "l0_by_rank": {"64": 1.0, "32": 3.0}}
        for step in (1, 2, 3)
    ]
    lines = [*records, {"step": 3, "final": evaluation.scalars()}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["molt", "transcoder", "mxd", "linear"])
def test_the_page_of_every_kind(kind, tmp_path):
    evaluation = evaluated(kind)
    page = write_molt_report(make_run(tmp_path / "run", evaluation), evaluation).read_text()
    for figure in (evaluation.fit.nmse, evaluation.behaviour.ce_spliced, evaluation.floors["mean"].fvu):
        assert f"{figure:.4f}" in page
    assert f"{evaluation.active_parameters:,.0f}" in page
    assert f"{evaluation.bits_per_token:.1f}" in page
    assert "<dt>Zombie units</dt>" in page
    assert "<dt>Dense units</dt>" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    plots = re.findall(r'data-plot="([^"]+)"', page)
    assert set(plots) == {"mse", "l0"} | ({"frequencies"} if kind != "linear" else set())
    assert set(plots) <= set(ids)


def test_the_page_is_inert_and_fetches_nothing(tmp_path):
    evaluation = evaluated("molt")
    page = write_molt_report(make_run(tmp_path / "run", evaluation), evaluation).read_text()
    assert "<script>alert(1)" not in page
    assert "<b>other</b>" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))


def test_a_mean_has_an_error_of_one_and_recovers_what_it_should():
    evaluation = evaluated("molt")
    assert evaluation.floors["mean"].nmse == pytest.approx(1, abs=1e-3)
    assert evaluation.l0 == pytest.approx(4, abs=0.5)
    assert evaluation.active_rank == pytest.approx(32 * evaluation.l0)
    written = json.loads(json.dumps(evaluation.scalars()))
    assert written["behaviour"]["recovered_mean"] == pytest.approx(evaluation.behaviour.recovered_mean)
    assert "frequencies" not in written

"""What is exported holds to the formats, and says what the details say."""

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import analysis.dashboards
from analysis.dashboards.details import Details, look_at
from analysis.dashboards.export_neuronpedia import export_neuronpedia
from analysis.dashboards.export_saedashboard import export_saedashboard, slug
from analysis.dashboards.opening import Opened
from analysis.dashboards.replacement import ReplacementSource
from analysis.dashboards.replacement_opening import opened_of
from analysis.dashboards.sources import Text
from analysis.dashboards.survey import Survey, survey
from molt_lens import Molt, Replacement
from molt_lens.hosts import Site
from molt_lens.packing import keep_mask
from tests.analysis.dashboards.tiny_site import SURROGATE, tiny_opened
from tests.molt_lens.host_models import tiny_host

SCHEMAS = Path(analysis.dashboards.__file__).parent / "schemas"


def check(content: Any, schema: str) -> None:
    jsonschema.validate(content, json.loads((SCHEMAS / f"{schema}.json").read_text()))


def molt_opened() -> Opened:
    host = tiny_host("gemma3")
    torch.manual_seed(0)
    replacement = Replacement(Molt(32, 32, gate="topk:2", ladder=((8, 1), (4, 3)))).eval()
    source = ReplacementSource(host, Site(1, target="post_norm_out"), replacement, "A MOLT / of ours")
    windows = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
    text = Text(windows, torch.zeros_like(windows), keep_mask(host, windows))
    return opened_of(source, None, text, "random bytes")


Looked = tuple[Opened, int, Survey, list[Details]]


@pytest.fixture(scope="module", params=["cayley", "molt"])
def looked(request) -> Looked:
    opened = tiny_opened() if request.param == "cayley" else molt_opened()
    surveys = survey(opened.source, opened.text)
    group = len(surveys) - 1
    units = surveys[group].counter.opened.nonzero().flatten()[:20].tolist()
    chosen = [[] for _ in surveys]
    chosen[group] = units
    return opened, group, surveys[group], look_at(opened.source, opened.text, surveys, chosen)[group]


def test_a_batch_of_saedashboard(looked: Looked, tmp_path):
    opened, group, own, details = looked
    path = export_saedashboard(tmp_path, *looked, batch=3)
    assert path == tmp_path / "saedashboard" / opened.source.groups[group].name / "batch-3.json"
    batch = json.loads(path.read_bytes().decode("ascii"))
    check(batch, "saedashboard")
    assert [f["feature_index"] for f in batch["features"]] == [d.unit for d in details]
    logits = opened.source.logits(torch.stack([d.written for d in details]))
    for feature, d, moved in zip(batch["features"], details, logits, strict=True):
        assert feature["frac_nonzero"] == pytest.approx(own.counter.frequency()[d.unit].item())
        assert sum(feature["freq_hist_data_bar_heights"]) == int(own.counter.opened[d.unit])
        assert sum(feature["logits_hist_data_bar_heights"]) == len(moved)
        widths = torch.tensor(feature["freq_hist_data_bar_values"]).diff()
        torch.testing.assert_close(widths, widths.mean().expand(49), atol=1e-4, rtol=0)
        top = moved.topk(10)
        assert feature["pos_values"] == pytest.approx(top.values.tolist(), abs=1e-3)
        assert feature["pos_str"] == [opened.strings[t] for t in top.indices.tolist()]
        assert feature["neg_values"] == sorted(feature["neg_values"])
        for activation, context in zip(feature["activations"], d.contexts, strict=True):
            act = context.acts[context.peak]
            assert activation["tokens"] == [opened.strings[t] for t in context.tokens]
            assert activation["values"][activation["qualifying_token_index"]] == pytest.approx(act, abs=1e-3)
            if context.which == "strongest":
                assert (activation["bin_min"], activation["bin_contains"]) == (-1, -1)
            else:
                assert activation["bin_min"] - 1e-3 <= act <= activation["bin_max"] + 1e-3
                assert 0 < activation["bin_contains"] <= 1


def test_intervals_hold_all_events(looked: Looked, tmp_path):
    _, _, _, details = looked
    batch = json.loads(export_saedashboard(tmp_path, *looked, batch=0).read_text())
    for feature, d in zip(batch["features"], details, strict=True):
        shares = {a["bin_min"]: a["bin_contains"] for a in feature["activations"] if a["bin_contains"] >= 0}
        parts = [sum(d.histogram[i : i + 10]) / sum(d.histogram) for i in range(0, 50, 10)]
        assert set(shares.values()) <= set(parts)
        assert sum(parts) == pytest.approx(1)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("ascii").splitlines()]


def test_the_tree_of_neuronpedia(looked: Looked, tmp_path):
    opened, group, own, details = looked
    folder = export_neuronpedia(tmp_path, *looked, batch=0)
    model = folder.parent.name
    assert folder.parent == tmp_path / "neuronpedia" / "v1" / model
    features, activations = (rows(folder / name / "batch-0.jsonl.gz") for name in ("features", "activations"))
    for row in features:
        check(row, "neuronpedia_features")
    for row in activations:
        check(row, "neuronpedia_activations")
    assert {(row["modelId"], row["layer"]) for row in features + activations} == {(model, folder.name)}
    assert [row["index"] for row in features] == [str(d.unit) for d in details]
    assert [row["maxActApprox"] for row in features] == own.counter.max_act[[d.unit for d in details]].tolist()
    assert len({row["id"] for row in activations}) == len(activations) == sum(len(d.contexts) for d in details)
    for row in activations:
        assert row["maxValue"] == row["values"][row["maxValueTokenIndex"]] == max(row["values"])
    tables = {name: json.loads((folder / f"{name}.jsonl").read_text()) for name in ("model", "release", "source")}
    sourceset = json.loads((folder / "sourceset.jsonl").read_text())
    assert tables["model"]["id"] == tables["source"]["modelId"] == sourceset["modelId"] == model
    assert tables["source"]["id"] == folder.name == f"{opened.source.groups[group].layer}-{sourceset['name']}"
    assert tables["source"]["setName"] == sourceset["name"] == features[0]["sourceSetName"]
    assert sourceset["releaseName"] == tables["release"]["name"]


def test_what_is_exported_again_is_the_same(looked: Looked, tmp_path):
    def files() -> dict[str, bytes]:
        export_saedashboard(tmp_path, *looked, batch=0)
        export_neuronpedia(tmp_path, *looked, batch=0)
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert files() == files()


def test_without_a_direct_path_there_are_no_logits(looked: Looked, tmp_path):
    opened, group, own, details = looked
    without = [Details(**(vars(d) | {"written": None})) for d in details]
    batch = json.loads(export_saedashboard(tmp_path, opened, group, own, without, batch=0).read_text())
    check(batch, "saedashboard")
    assert all(f["pos_str"] == f["neg_values"] == f["logits_hist_data_bar_values"] == [] for f in batch["features"])


def test_a_lone_surrogate_is_ascii_on_disk(tmp_path):
    opened = tiny_opened()
    surveys = survey(opened.source, opened.text)
    units = surveys[0].counter.opened.nonzero().flatten()[:1].tolist()
    details = look_at(opened.source, opened.text, surveys, [units, [], [], []])[0]
    path = export_saedashboard(tmp_path, opened, 0, surveys[0], details, batch=0)
    tokens = [
        t for a in json.loads(path.read_bytes().decode("ascii"))["features"][0]["activations"] for t in a["tokens"]
    ]
    assert any(SURROGATE in token for token in tokens)


@pytest.mark.parametrize(("name", "expected"), [("google/Gemma 3", "google-gemma-3"), ("<b>", "b"), ("日", "unnamed")])
def test_names_that_neuronpedia_takes(name, expected):
    assert slug(name) == expected


def test_the_schemas_refuse_what_lacks_a_field(looked: Looked, tmp_path):
    batch = json.loads(export_saedashboard(tmp_path, *looked, batch=0).read_text())
    del batch["features"][0]["pos_str"]
    with pytest.raises(jsonschema.ValidationError, match="pos_str"):
        check(batch, "saedashboard")

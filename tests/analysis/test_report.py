"""The report of a fabricated run: complete, self-contained, and inert whatever the tokens are."""

import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.evaluate import Evaluation
from analysis.figures import worth_figure
from analysis.plots import ACCENT, GREY, rgb
from analysis.report import write_report
from cayley_interp.losses import PairedDifference
from tests.analysis.fabricated import evaluate, make_run

LEVELS = "4,2,0;7,4,8"


class Page(html.parser.HTMLParser):
    """The page as a browser's parser sees it: tags, attributes, text outside scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str):
        if self.tags[-1:] and self.tags[-1][0] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(LEVELS)


@pytest.fixture(scope="module")
def vanilla() -> Evaluation:
    return evaluate(None)


def build(folder: Path, levels: str | None, evaluation: Evaluation) -> Page:
    path = write_report(make_run(folder, levels, evaluation), evaluation)
    assert path == folder / "report.html"
    assert not list(folder.glob(".*tmp*"))
    return Page(path.read_text(encoding="utf-8"))


def test_report_of_a_cayley_gpt(tmp_path: Path, evaluation: Evaluation):
    page = build(tmp_path / "run", LEVELS, evaluation)
    for part in (
        "12,345",
        "5,000",
        "1.07 GB",
        "deadbeefdead",
        "Zombie",
        "Bits / token",
        f"{evaluation.levels[1][1].bits_per_token:.0f}",
        f"{evaluation.val_loss:.4f}",
        "model.n_layers",
    ):
        assert part in page.text
    plots = [attrs["id"] for _, attrs in page.tags if attrs.get("class") == "plot"]
    assert plots == ["loss", "rates", "silent", "worth", "frequency-0", "frequency-1"]
    assert len([1 for tag, _ in page.tags if tag == "article"]) == len(evaluation.features)
    headings = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


def test_report_of_a_vanilla_gpt_says_so(tmp_path: Path, vanilla: Evaluation):
    page = build(tmp_path / "run", None, vanilla)
    assert "there are no features" in page.text
    assert "Zombie" not in page.text
    assert "none (vanilla)" in page.text


def test_nothing_is_loaded_from_anywhere(tmp_path: Path, evaluation: Evaluation):
    page = build(tmp_path / "run", LEVELS, evaluation)
    loads = [
        value for _, attrs in page.tags for key in ("src", "href", "srcset", "action") if (value := attrs.get(key))
    ]
    assert all(value.startswith(("#", "data:")) for value in loads), loads
    assert not [attrs for tag, attrs in page.tags if tag in ("iframe", "object", "embed", "base")]


def test_hostile_tokens_make_no_element_and_no_attribute(tmp_path: Path, evaluation: Evaluation):
    page = build(tmp_path / "run", LEVELS, evaluation)
    assert "alert(1)" in page.text  # shown, so that the next lines mean something
    assert "{{ 7 * 7 }}" in page.text
    assert "\\x00" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert len([1 for tag, _ in page.tags if tag == "script"]) == 1 + 6 + 1  # plotly, figures, the page's own
    assert not re.search("[\x00\u200f\u202e]", page.text)


def test_name_of_the_run_is_escaped(tmp_path: Path, evaluation: Evaluation):
    path = write_report(make_run(tmp_path / "run", LEVELS, evaluation), evaluation)
    assert "<title>tiny &lt;b&gt;" in path.read_text(encoding="utf-8")


def test_mlps_that_write_nothing_are_named(tmp_path: Path, evaluation: Evaluation, vanilla: Evaluation):
    worths = [PairedDifference(0.5, 0.01, 12, 192), PairedDifference(0.01, 0.01, 12, 192)]
    for levels, measured in ((LEVELS, evaluation), (None, vanilla)):
        measured = replace(measured, mlp_worths=worths)
        page = build(tmp_path / f"{levels}", levels, measured)
        assert "over 192 of the validation tokens" in page.text
        assert "Worth nothing here: the MLP of layer 1." in page.text
        page = build(tmp_path / f"{levels}-lively", levels, replace(measured, mlp_worths=worths[:1] * 2))
        assert "Worth nothing here" not in page.text


def test_the_worth_of_mlps_is_drawn_with_three_standard_errors(evaluation: Evaluation):
    worths = [PairedDifference(0.5, 0.01, 12, 192), PairedDifference(0.01, 0.01, 12, 192)]
    (bars,) = worth_figure(replace(evaluation, mlp_worths=worths)).data
    assert list(bars.y) == [0.5, 0.01]
    assert list(bars.error_y.array) == [0.03, 0.03]
    assert list(bars.marker.color) == [rgb(ACCENT), rgb(GREY)]


@pytest.mark.parametrize("kept", [[], ["train_loss"], ["val_loss"]])
def test_missing_metrics_leave_their_place_empty(tmp_path: Path, evaluation: Evaluation, kept: list[str]):
    run = make_run(tmp_path / "run", LEVELS, evaluation)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{"step": line["step"]} | {key: line[key] for key in kept if key in line} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "environment.json").unlink()
    text = Page(write_report(run, evaluation).read_text(encoding="utf-8")).text
    assert ("No losses were logged" in text) == (not kept)
    (run / "metrics.jsonl").unlink()
    write_report(run, evaluation)


def test_losses_that_are_not_finite_are_survived(tmp_path: Path, evaluation: Evaluation):
    run = make_run(tmp_path / "run", LEVELS, evaluation)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "tokens": 1, "train_loss": NaN}\n')
    text = write_report(run, replace(evaluation, val_loss=float("nan"))).read_text(encoding="utf-8")
    assert "NaN" not in "".join(re.findall(r'<script type="application/json".*?</script>', text, re.S))


def test_bad_run_folders_are_refused(tmp_path: Path, evaluation: Evaluation):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        write_report(tmp_path, evaluation)
    run = make_run(tmp_path / "run", LEVELS, evaluation)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        write_report(run, evaluation)
    (run / "metrics.jsonl").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        write_report(run, evaluation)
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        write_report(run, evaluation)

"""Replacements opened by name: of a run, of a folder, of Gemma Scope, and the one that comes with the package."""

import json
from pathlib import Path

import pytest
import torch

from analysis.behaviour import measure_behaviour
from analysis.dashboards.build import build
from analysis.dashboards.cayley_opening import open_beside
from analysis.dashboards.details import look_at
from analysis.dashboards.labels import MAX_FREQUENCY
from analysis.dashboards.opening import Opened, open_named
from analysis.dashboards.replacement_opening import is_saelens, open_source
from analysis.dashboards.survey import survey
from analysis.held_out import HeldOut, write_held_out
from analysis.parity import Subject
from cayley_interp import CayleyGPT
from molt_lens import MixtureOfDecoders, Molt, Replacement, SparseMap, Transcoder
from molt_lens.folder import save_replacement
from molt_lens.hosts import Host, Site, load_host
from tests.analysis.dashboards.tiny_site import ByRule, read_data, tiny_opened
from tests.analysis.fabricated import make_tokenizer
from tests.molt_lens.host_models import D_VOCAB, EOS_ID, tiny_model, tiny_tokenizer
from tests.molt_lens.test_gemma_scope import config, params, write

D = 32


def with_tokenizer() -> CayleyGPT:
    model = tiny_opened().source.model
    model.tokenizer = make_tokenizer()
    return model


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Host:
    folder = tmp_path_factory.mktemp("gemma")
    tiny_model("gemma3").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_host(folder)


def write_run(folder: Path, host: Host, map: SparseMap) -> Path:
    """What is left of a run that has ended, as far as it matters here."""
    folder.mkdir()
    save_replacement(Replacement(map).eval(), folder / "model", host=host, site=Site(1))
    (folder / "config.json").write_text(json.dumps({"host": host.name, "seed": 0}))
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    ids[:, 20] = EOS_ID
    write_held_out(folder, HeldOut(ids, host.name, host.fingerprint))
    lines = [{"step": 10, "mse": 0.9, "l0": 4.0}, {"step": 20, "mse": 0.5, "l0": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def extras_of(opened: Opened) -> list[dict]:
    surveys = survey(opened.source, opened.text)
    units = surveys[0].counter.opened.nonzero().flatten()[:5].tolist()
    details = look_at(opened.source, opened.text, surveys, [units])[0]
    return opened.extras(0, details, lambda token: token, lambda *_: None)


def test_a_molts_run_is_read_on_what_it_held_out(host, tmp_path):
    run = write_run(tmp_path / "run", host, Molt(D, D, gate="topk:2", ladder=((8, 1), (4, 3))))
    opened = open_named(str(run), layers=None, tokens=1_000, device="cpu")
    assert opened.kind == "molt"
    assert opened.text.windows.shape == (8, 32)
    assert len(opened.text.documents.unique()) == 9
    assert ("text", "what its run held out") in opened.about
    assert ("logits", "through the norm behind the MLP too, at the scale that it has at each token") in opened.about
    assert [(f.title, f.curves[0].points) for f in opened.figures] == [
        ("Error", [(10, 0.9), (20, 0.5)]),
        ("Open units", [(10, 4), (20, 3)]),
    ]
    assert len(opened.strings) == D_VOCAB
    assert {len(extra["singular"]["raw"]) for extra in extras_of(opened)} <= {4, 8}
    assert opened.fingerprint != open_source(str(run), tokens=1_000, host=host.name).source.name


def test_the_model_page_says_what_the_host_says_with_it_spliced_in(host, tmp_path):
    run = write_run(tmp_path / "run", host, Molt(D, D, gate="topk:2", ladder=((8, 1), (4, 3))))
    opened = open_named(str(run), layers=None, tokens=1_000, device="cpu")
    (sheet,) = opened.sheets(lambda *_: None)
    source = opened.source
    zero = torch.zeros(source.host.d_model)
    expected = measure_behaviour(
        source.host, {source.site: source.replacement}, opened.text.windows, {source.site: zero}
    )
    values = [float(row[1]) for row in sheet.rows]
    figures = (expected.ce_host, expected.ce_spliced, expected.ce_zero, expected.recovered_zero)
    assert values == pytest.approx([*figures, expected.kl, expected.top1], abs=1e-3)
    assert f"{expected.tokens:,} predicted tokens" in sheet.title


def test_a_vanilla_model_is_beside_a_cayley_gpt_alone(host, tmp_path):
    run = write_run(tmp_path / "run", host, Molt(D, D, gate="topk:2", ladder=((8, 1), (4, 3))))
    with pytest.raises(ValueError, match="is no Cayley-GPT; leave --vanilla out"):
        open_named(str(run), layers=None, tokens=1_000, device="cpu", vanilla="vanilla-tiny-sotu")
    with pytest.raises(ValueError, match="have different tokenizers"):
        open_beside(Subject("tiny", with_tokenizer(), None), "vanilla-tiny-sotu", "cpu")


MAPS = [
    lambda: Transcoder(D, D, n_features=24, gate="topk:3"),
    lambda: MixtureOfDecoders(D, D, n_experts=6, hidden=16, gate="topk:2"),
]


@pytest.mark.parametrize("make", MAPS, ids=["transcoder", "mxd"])
def test_a_transcoder_and_a_mixture_of_decoders_have_pages_of_features(host, tmp_path, make):
    map = make()
    save_replacement(Replacement(map).eval(), tmp_path / "map", host=host, site=Site(2, target="post_norm_out"))
    opened = open_source(str(tmp_path / "map"), tokens=512)
    assert opened.kind == "transcoder"
    assert opened.text.windows.shape == (4, 128)
    extras = extras_of(opened)
    if isinstance(map, Transcoder):
        assert all(len(extra["nearest"]) == 12 and -1 <= extra["encoder_decoder_cosine"] <= 1 for extra in extras)
    else:
        assert all(extra["nearest"] == [] and extra["encoder_decoder_cosine"] is None for extra in extras)
    with pytest.raises(ValueError, match="is of layer 2, not of 0"):
        open_source(str(tmp_path / "map"), tokens=512, layers=[0])


def test_a_gemma_scope_folder(host, tmp_path):
    folder = write(tmp_path / "scope", params(), config())
    opened = open_source(str(folder), tokens=256, host=host.name)
    assert opened.source.groups[0].name == "L1"
    assert opened.source.groups[0].n_units == 48


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gemma-scope-2:x", False), ("gpt2-small-res-jb:blocks.8.hook_resid_pre", True), ("runs/molt", False)],
)
def test_names_that_saelens_is_asked_for(name, expected):
    assert is_saelens(name) == expected


def test_nothing_of_that_name():
    with pytest.raises(FileNotFoundError):
        open_source("no/such/replacement/here", tokens=256)


@pytest.mark.slow
@pytest.mark.gemma
def test_the_molt_of_the_package():
    opened = open_source("molt-gemma-3-270m-L9-2M", tokens=1_024)
    assert opened.text.windows.shape == (4, 256)
    assert [(figure.title, figure.curves[0].points[-1][0]) for figure in opened.figures] == [
        ("Error", 1_953),
        ("Open units", 1_953),
    ]
    surveys = survey(opened.source, opened.text)
    assert surveys[0].counter.l0() == pytest.approx(4, abs=0.6)
    details = look_at(opened.source, opened.text, surveys, [[13]])[0]
    (page,) = opened.extras(0, details, lambda token: token, lambda *_: None)
    # Held against the notebook that reads the same transform step by step.
    assert page["pairs"][0]["gain"] == pytest.approx(609.4, abs=0.1)
    assert page["stable_rank_raw"] == pytest.approx(3.6, abs=0.05)
    assert page["stable_rank"] == pytest.approx(15.5, abs=0.05)
    written = {opened.strings[token] for pair in page["pairs"] for token in pair["writes"] + pair["writes_against"]}
    assert {" inappropriate", " appreciated", " conclusively"} <= written
    assert page["nmse"] < 0.4
    assert page["nmse"] <= page["nmse_always"] <= page["nmse_without"]


class Reader(ByRule):
    """Keeps what it is asked."""

    def __init__(self):
        super().__init__()
        self.prompts: list[str] = []

    def complete(self, prompt: str, max_tokens: int) -> str:
        self.prompts.append(prompt)
        return super().complete(prompt, max_tokens)


def test_transforms_that_open_seldom_are_named_by_what_they_read_and_write(host, tmp_path):
    run = write_run(tmp_path / "run", host, Molt(D, D, gate="topk:2", ladder=((4, 14),)))
    opened = open_named(str(run), layers=None, tokens=1_000, device="cpu")
    provider = Reader()
    build(opened, tmp_path / "site", features=("top:14",), provider=provider)
    naming = [prompt for prompt in provider.prompts if "Fits:" not in prompt]
    assert naming
    assert all("\nIt reads: '" in prompt and "\nIt writes: '" in prompt for prompt in naming)
    counter = survey(opened.source, opened.text)[0].counter
    often = (counter.opened / counter.tokens > MAX_FREQUENCY).tolist()
    assert any(often)
    assert not all(often)
    (group,) = read_data(tmp_path / "site", "site")["groups"]
    labels = read_data(tmp_path / "site", f"index-{group['name']}")["label"]
    assert any(labels)
    assert not any(label for label, is_often in zip(labels, often, strict=True) if is_often)

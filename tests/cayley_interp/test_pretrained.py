"""Where a name leads: bundled, run, model, foreign checkpoint, or the Hub; and what is said where it leads nowhere."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cayley_interp import CayleyGPT, bundled_models, load_pretrained, pretrained, push_to_hub, save_pretrained
from cayley_interp.folder import MODEL_FILES
from tests.cayley_interp.foreign_writer import corpus, model_config, state_dict, trained, write_checkpoint
from tests.cayley_interp.hub import Hub
from tests.cayley_interp.test_folder import TOKENS, assert_same, make

# ---- Folders and names ----


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, finished."""
    folder = tmp_path / "run"
    save_pretrained(make(), folder / "model", training={"recipe": "tiny", "val_loss": 4.5})
    (folder / "checkpoints").mkdir()
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.json").write_text('{"name": "tiny"}')
    return folder


def test_a_run_its_model_and_its_weights_are_one_model(run):
    for name in (run, str(run / "model"), run / "model" / "model.safetensors"):
        assert_same(load_pretrained(name, wrap=None), make())


def test_the_default_is_a_bridge_in_the_dtype_asked_for(run):
    bridge = load_pretrained(run, dtype=torch.float64)
    logits = bridge(TOKENS)
    assert type(bridge).__name__ == "CayleyBridge"
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, make().double()(TOKENS))


@pytest.mark.parametrize("has", ["metrics.jsonl", "checkpoints"])
def test_a_run_that_is_not_finished_says_how_to_finish_it(run, has):
    shutil.rmtree(run / "model")
    (run / "metrics.jsonl").unlink() if has == "checkpoints" else (run / "checkpoints").rmdir()
    with pytest.raises(FileNotFoundError, match=f"has no model/ yet: finish it with .* --resume {run}"):
        load_pretrained(run, wrap=None)


def test_a_bundled_model_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "BUNDLED", tmp_path)
    save_pretrained(make(), tmp_path / "one")
    assert bundled_models() == ["one"]
    assert_same(load_pretrained("one", wrap=None), make())


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "/no/such/folder", "a/b/c/d", "a b/c"])
def test_a_name_that_leads_nowhere(name):
    with pytest.raises(
        FileNotFoundError, match=f"there is no model '{name}': expected a bundled name .* Hub id owner/"
    ):
        load_pretrained(name, wrap=None)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no model: expected config\.json with model\.safetensors, a run"
    ):
        load_pretrained(tmp_path, wrap=None)


def test_a_dtype_that_holds_no_weights(run):
    with pytest.raises(
        ValueError, match=r"dtype must be a floating-point one, such as torch\.float32, got torch\.int8"
    ):
        load_pretrained(run, wrap=None, dtype=torch.int8)


# ---- Libraries ----


def wrap_errors(*packages: Path, before: str = "") -> dict[str, str]:
    """What each wrap says in a process that finds `packages` first; of no model, so that one is not read before."""
    code = before + (
        "\nimport json\nfrom cayley_interp import load_pretrained\nerrors = {}\n"
        "for wrap in ('bridge', 'hooked', 'brige'):\n"
        "    try: load_pretrained('/no/such/model', wrap=wrap)\n"
        "    except (ImportError, ValueError) as error: errors[wrap] = str(error)\n"
        "print(json.dumps(errors))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, packages))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


def test_without_transformer_lens_the_bare_model_is_offered():
    errors = wrap_errors(before="import sys; sys.modules['transformer_lens'] = None")
    for wrap in ("bridge", "hooked"):
        assert f'wrap="{wrap}" needs TransformerLens: pip install "cayley-interp[lens]"; wrap=None' in errors[wrap]
    assert errors["brige"] == 'wrap must be "bridge", "hooked" or None, got \'brige\''


def test_a_transformer_lens_without_the_class_is_named_with_its_version(tmp_path):
    (tmp_path / "transformer_lens").mkdir()
    (tmp_path / "transformer_lens" / "__init__.py").touch()
    (tmp_path / "transformer_lens-4.9.9.dist-info").mkdir()
    (tmp_path / "transformer_lens-4.9.9.dist-info" / "METADATA").write_text("Name: transformer-lens\nVersion: 4.9.9\n")
    errors = wrap_errors(tmp_path)
    assert (
        'TransformerLens 4.9.9 has no HookedTransformer, which version 4 removed: use wrap="bridge"' in errors["hooked"]
    )
    assert 'wrap="bridge" does not work with TransformerLens 4.9.9 (No module named' in errors["bridge"]


# ---- Checkpoints of other code ----


class _Payload:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_malicious_checkpoint_in_a_folder_is_not_executed(tmp_path):
    executed = tmp_path / "executed"
    (tmp_path / "foreign").mkdir()
    torch.save({"model": {}, "config": _Payload(executed)}, tmp_path / "foreign" / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt\.pt: needs more than weights: .*mkdir.* Nothing of it was executed"):
        load_pretrained(tmp_path / "foreign", wrap=None)
    (tmp_path / "foreign" / "ckpt.pt").write_bytes(pickle.dumps(_Payload(executed)))
    with pytest.raises(ValueError, match=r"ckpt\.pt: not a file of torch\.save"):
        load_pretrained(tmp_path / "foreign", wrap=None)
    assert not executed.exists()


# ---- The Hub ----

CLIENT = """
import json
tokens, results, errors = torch.load(home + "/tokens.pt"), {}, {}

def attempt(label, function, *arguments, **options):
    try:
        results[label] = function(*arguments, **options)
    except (ValueError, OSError) as error:
        errors[label] = f"{type(error).__name__}: {error}"

def load(label, name, **options):
    attempt(label, lambda: load_pretrained(name, wrap=None, **options)(tokens))
"""
FIRST = """
attempt("push broken", push_to_hub, home + "/broken", "owner/broken")
attempt("push", push_to_hub, home + "/run", "owner/name")
attempt("push v2", push_to_hub, home + "/vanilla", "owner/name", revision="v2")
load("main", "owner/name")
load("v2", "owner/name", revision="v2")
load("by commit", "owner/name", revision=results["push v2"].split("/")[-1])
load("foreign", "owner/many/ckpt_b.pt", text=open(home + "/text.txt").read())
load("no repository", "owner/none")
load("no revision", "owner/name", revision="v3")
load("no file", "owner/many/ckpt_c.pt")
load("which file", "owner/many")
"""
SECOND = """
load("main", "owner/name")
load("v2", "owner/name", revision="v2")
load("foreign", "owner/many/ckpt_b.pt")
load("never fetched", "owner/other")
"""
THE_END = """
torch.save(results, home + "/results.pt")
print(json.dumps(errors))
"""


@dataclass
class Played:
    """What a process of a user did with a Hub, and then another one without it."""

    hub: Hub
    online: dict[str, Any]
    online_errors: dict[str, str]
    offline: dict[str, Any]
    offline_errors: dict[str, str]


@pytest.fixture(scope="module")
def foreign() -> CayleyGPT:
    return trained(None, steps=50)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, foreign: CayleyGPT) -> Played:
    home = tmp_path_factory.mktemp("home")
    save_pretrained(make(), home / "run" / "model", training={"recipe": "tiny", "val_loss": 4.5})
    (home / "run" / "metrics.jsonl").touch()
    save_pretrained(make(levels=None), home / "vanilla")
    save_pretrained(make(), home / "broken")
    with (home / "broken" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    torch.save(TOKENS, home / "tokens.pt")
    (home / "text.txt").write_text(corpus())
    checkpoint = write_checkpoint(home / "foreign", state_dict(foreign), model_config(foreign)).read_bytes()
    tokenizer = (home / "foreign" / "tokenizer.json").read_bytes()

    def play(code: str, **environment: str) -> tuple[dict[str, Any], dict[str, str]]:
        done = hub.python(f"home = {str(home)!r}{CLIENT}{code}{THE_END}", home / "cache", **environment)
        assert done.returncode == 0, done.stderr
        return torch.load(home / "results.pt"), json.loads(done.stdout.splitlines()[-1])

    with Hub() as hub:
        hub.commit("owner/many", "main", {"ckpt_a.pt": b"", "ckpt_b.pt": checkpoint, "tokenizer.json": tokenizer})
        online = play(FIRST)
    return Played(hub, *online, *play(SECOND, HF_HUB_OFFLINE="1"))


def test_a_pushed_model_comes_back_from_the_hub(played):
    assert torch.equal(played.online["main"], make()(TOKENS))
    assert torch.equal(played.online["v2"], make(levels=None)(TOKENS))
    assert torch.equal(played.online["by commit"], played.online["v2"])


def test_the_whole_folder_is_pushed_with_its_card(played):
    files = played.hub.files("owner/name")
    assert set(MODEL_FILES) < set(files)
    assert "| recipe | tiny |" in files["README.md"].decode()
    assert json.loads(files["training.json"])["val_loss"] == 4.5
    assert played.online["push"].startswith(f"{played.hub.url}/owner/name/commit/")


def test_a_model_that_cannot_be_read_is_not_pushed(played):
    assert "model.safetensors is damaged or cut short" in played.online_errors["push broken"]
    assert not [request for request in played.hub.requests if "broken" in request]
    assert "owner/broken" not in played.hub.branches


def test_a_second_load_needs_no_hub(played):
    for label in ("main", "v2", "foreign"):
        assert torch.equal(played.offline[label], played.online[label])
    error = played.offline_errors["never fetched"]
    assert "FileNotFoundError: 'owner/other' is not a bundled model" in error
    assert "outgoing traffic has been disabled" in error


def test_a_repository_or_revision_that_is_not_there(played):
    error = played.online_errors["no repository"]
    assert "FileNotFoundError: 'owner/none' is not a bundled model" in error
    assert "not a folder here, and could not be fetched from the Hub: 404" in error
    assert "could not be fetched from the Hub at v3: 404" in played.online_errors["no revision"]


def test_one_checkpoint_of_several_goes_by_its_file(played, foreign):
    torch.testing.assert_close(played.online["foreign"], foreign(TOKENS))
    choices = "; load one of its checkpoints as owner/many/ckpt_a.pt, owner/many/ckpt_b.pt"
    assert "the Hub repository owner/many has no ckpt_c.pt" + choices in played.online_errors["no file"]
    assert "owner/many has no model.safetensors or ckpt.pt" + choices in played.online_errors["which file"]


def test_a_foreign_checkpoint_is_not_pushed(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(ValueError, match="is not a model's folder: save_pretrained it first"):
        push_to_hub(tmp_path, "owner/name")

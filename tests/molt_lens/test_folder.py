"""Folders of replacements: what is saved is what is loaded, and nothing that is not whole, or not ours, is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from molt_lens import LinearMap, MixtureOfDecoders, Molt, Replacement, SparseMap, Transcoder
from molt_lens import folder as folder_module
from molt_lens.folder import check_site, load_replacement, save_replacement
from molt_lens.hosts import Host, Site
from tests.molt_lens.host_models import tiny_host

D = 32
LADDER = ((8, 1), (4, 2), (2, 4))
GATES = ["relu", "jumprelu", "topk:2", "batchtopk:2", "reference"]
SITE = Site(1, target="post_norm_out")
TRAINING = {"recipe": "tiny", "tokens": 300_000, "fvu": 0.25}


@pytest.fixture(scope="module")
def host() -> Host:
    return tiny_host("gemma3", d_model=D)


def every_map(gate: str) -> dict[str, SparseMap]:
    return {
        "molt": Molt(D, D, gate=gate, ladder=LADDER),
        "molt of n 2, with skip": Molt(D, D, gate=gate, ladder=LADDER, n=2, skip=True),
        "transcoder": Transcoder(D, D, n_features=40, gate=gate),
        "transcoder with skip": Transcoder(D, D, n_features=40, gate=gate, skip=True),
        "mxd": MixtureOfDecoders(D, D, n_experts=20, hidden=15, gate=gate),
        "linear": LinearMap(D, D),
    }


@torch.no_grad()
def replacement_of(made: SparseMap, dtype: torch.dtype = torch.float32) -> Replacement:
    """Nothing at the value it is made with, running thresholds and frozen norms included."""
    replacement = Replacement(made).to(dtype)
    for tensor in (*replacement.parameters(), *replacement.buffers()):
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) + 0.1)
    return replacement.eval()


def molt(dtype: torch.dtype = torch.float32) -> Replacement:
    torch.manual_seed(0)
    return replacement_of(Molt(D, D, gate="jumprelu", ladder=LADDER), dtype)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- There and back ----


@pytest.mark.parametrize("gate", GATES)
def test_every_kind_comes_back_as_it_was(tmp_path, host, gate):
    torch.manual_seed(0)
    x = torch.randn(50, D)
    for name, made in every_map(gate).items():
        replacement = replacement_of(made)
        save_replacement(replacement, tmp_path / name, host=host, site=SITE, training=TRAINING)
        loaded, record = load_replacement(tmp_path / name)
        assert loaded.state_dict().keys() == replacement.state_dict().keys()
        for key, tensor in replacement.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), (name, key)
        assert torch.equal(loaded(x), replacement(x)), name
        assert not loaded.training
        assert loaded.map.config() == made.config()
        assert record.site == SITE
        assert (record.host_name, record.host_fingerprint) == (host.name, host.fingerprint)
        assert record.training == TRAINING
        check_site(record, host)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_comes_back(tmp_path, host, dtype):
    replacement = molt(dtype)
    save_replacement(replacement, tmp_path / "a", host=host, site=SITE)
    loaded, _ = load_replacement(tmp_path / "a")
    for name, tensor in replacement.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_matrices_may_be_stored_in_less(tmp_path, host):
    replacement = molt()
    save_replacement(replacement, tmp_path / "a", host=host, site=SITE, matrices=torch.bfloat16)
    stored, (loaded, _) = load_file(tmp_path / "a" / "model.safetensors"), load_replacement(tmp_path / "a")
    for name, tensor in replacement.state_dict().items():
        assert stored[name].dtype == (torch.bfloat16 if tensor.ndim > 1 else torch.float32)
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], stored[name].float()), name


def test_a_folded_map_comes_back(tmp_path, host):
    replacement = molt()
    folded = Replacement(replacement.folded()).eval()
    save_replacement(folded, tmp_path / "a", host=host, site=SITE)
    loaded, _ = load_replacement(tmp_path / "a")
    x = torch.randn(50, D)
    assert torch.equal(loaded(x), folded(x))


def test_the_names_of_the_site_are_written(tmp_path, host):
    save_replacement(molt(), tmp_path / "a", host=host, site=SITE)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["hooks"] == {
        "hf_input": "model.layers.1.pre_feedforward_layernorm.output",
        "hf_target": "model.layers.1.post_feedforward_layernorm.output",
        "tl_input": "blocks.1.mlp.hook_in",
        "tl_target": "blocks.1.ln2_post.hook_out",
    }


# ---- Written whole ----


def test_an_older_one_is_replaced(tmp_path, host):
    save_replacement(replacement_of(LinearMap(D, D)), tmp_path / "a", host=host, site=SITE)
    save_replacement(molt(), tmp_path / "a", host=host, site=SITE, training=TRAINING)
    loaded, record = load_replacement(tmp_path / "a")
    assert loaded.map.kind == "molt"
    assert record.training == TRAINING
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("broken", ["save_file", "_put_in_place", "rename"])
def test_a_save_that_fails_leaves_the_older_one(tmp_path, host, monkeypatch, broken):
    save_replacement(molt(), tmp_path / "a", host=host, site=SITE)
    before = contents(tmp_path / "a")

    def fail(*_):
        raise OSError("no space left on device")

    if broken == "rename":
        rename = Path.rename

        def fail_into_place(self: Path, target: Path) -> Path:
            in_place = target.name == "a" and not self.name.endswith("-old")
            return fail() if in_place else rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_into_place)
    else:
        monkeypatch.setattr(folder_module, broken, fail)
    with pytest.raises(OSError, match="no space"):
        save_replacement(replacement_of(LinearMap(D, D)), tmp_path / "a", host=host, site=SITE)
    assert contents(tmp_path / "a") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_is_no_replacement_is_not_written_over(tmp_path, host):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "a-host").mkdir()
    (tmp_path / "a-host" / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    (tmp_path / "a-host" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "a-file").write_text("mine")
    save_replacement(molt(), tmp_path / "annotated", host=host, site=SITE)
    (tmp_path / "annotated" / "notes.md").write_text("mine")
    for name in ("notes", "a-host", "a-file", "annotated"):
        before = contents(tmp_path / name) if name != "a-file" else None
        with pytest.raises(ValueError, match="something else than a replacement"):
            save_replacement(molt(), tmp_path / name, host=host, site=SITE)
        assert before is None or contents(tmp_path / name) == before
    assert (tmp_path / "a-file").read_text() == "mine"


def test_an_empty_folder_is_taken_and_parents_are_made(tmp_path, host):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "runs" / "one" / "model"):
        save_replacement(molt(), folder, host=host, site=SITE)
        assert load_replacement(folder)[1].site == SITE


def test_a_site_that_the_host_has_not_writes_nothing(tmp_path, host):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        save_replacement(molt(), tmp_path / "a", host=host, site=Site(7))
    assert list(tmp_path.iterdir()) == []


# ---- Refused at loading ----


@pytest.fixture
def saved(tmp_path, host) -> Path:
    save_replacement(molt(), tmp_path / "a", host=host, site=SITE)
    return tmp_path / "a"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_replacement(saved)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no replacement's folder"):
        load_replacement(tmp_path / "absent")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_weights_cut_short(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_replacement(saved)


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: t for name, t in weights.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["map.U", "input.std", "map.gate.log_threshold"])
def test_weights_that_are_not_finite(saved, name, bad):
    tensor = load_file(saved / "model.safetensors")[name]
    tensor.view(-1)[1] = bad
    edit_weights(saved, **{name: tensor})
    with pytest.raises(ValueError, match=f"nan or inf in {name}"):
        load_replacement(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"map.U": torch.ones(3, D)}, r"map\.U"),
        ({"map.V": None}, r"map\.V"),
        ({"map.W_skip": torch.ones(D, D)}, r"map\.W_skip"),
        ({"output.mean": torch.ones(D + 1)}, r"output\.mean"),
    ],
)
def test_weights_of_another_map(saved, changes, message):
    edit_weights(saved, **changes)
    with pytest.raises(ValueError, match=f"(?s)not of the map that config.json describes.*{message}"):
        load_replacement(saved)


def test_weights_that_are_no_floats(saved):
    save_file({"map.U": torch.ones(3, dtype=torch.int64)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="not of the map"):
        load_replacement(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": None},
        {"map": None},
        {"map": {"kind": "sae"}},
        {"map": {"kind": "linear", "d_in": -1, "d_out": 4}},
        {"map": {"kind": "molt", "d_in": 4, "d_out": 4, "gate": "topk:99"}},
        {"map": "molt"},
        {"site": {"layer": -1}},
        {"site": {"layer": 1, "input": "resid_pre"}},
        {"site": [1]},
    ],
)
def test_a_config_that_describes_nothing(saved, changes):
    config = saved / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match="does not describe a replacement"):
        load_replacement(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model_type": "gemma3_text"}', "\udce9"])
def test_a_config_of_something_else(saved, text):
    (saved / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="does not describe a replacement"):
        load_replacement(saved)


# ---- The host it belongs to ----


def test_another_host_is_refused(saved):
    _, record = load_replacement(saved)
    with pytest.raises(ValueError, match="has other weights"):
        check_site(record, tiny_host("gemma3", d_model=D, seed=1))


def test_another_site_is_refused(saved, host):
    """The same weights, but what is called by its names here is another activation."""
    _, record = load_replacement(saved)
    for other in (replace(SITE, layer=2), replace(SITE, target="mlp_out"), replace(SITE, input="pre_norm_in")):
        with pytest.raises(ValueError, match="its activations are"):
            check_site(replace(record, site=other), host)

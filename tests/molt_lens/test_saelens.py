"""Replacements as SAELens SAEs: the same numbers alone, saved, and attached to bridges of real models."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import molt_lens.saelens
from molt_lens import LinearMap, Molt, Replacement, SparseMap, Transcoder
from molt_lens.folder import ReplacementRecord, load_replacement, save_replacement
from molt_lens.gemma_scope import load_gemma_scope
from molt_lens.hosts import Host, Site, load_host
from molt_lens.replacement import spliced
from molt_lens.saelens import (
    MoltSAE,
    MoltSAEConfig,
    TranscoderSAE,
    TranscoderSAEConfig,
    register,
    replacement_sae,
)
from tests.molt_lens.host_models import tiny_bridge, tiny_host

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
LADDER = ((8, 1), (4, 4))
MAPS = {
    "molt": lambda d, gate: Molt(d, d, gate=gate, ladder=LADDER),
    "molt-skip": lambda d, gate: Molt(d, d, gate=gate, ladder=LADDER, skip=True),
    "transcoder": lambda d, gate: Transcoder(d, d, n_features=40, gate=gate),
    "skip-transcoder": lambda d, gate: Transcoder(d, d, n_features=40, gate=gate, skip=True),
}


def replacement(kind: str = "molt-skip", d: int = 32, gate: str = "topk:3", seed: int = 0) -> Replacement:
    """Random weights and standardisers, and a gate whose state says what it does outside training."""
    torch.manual_seed(seed)
    made = Replacement(MAPS[kind](d, gate))
    for name, parameter in made.named_parameters():
        if name != "map.gate.log_threshold":
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    made.input.set(torch.randn(d), torch.rand(d) + 0.5)
    made.output.set(torch.randn(d), torch.rand(d) + 0.5)
    made(torch.randn(64, d))
    return made.eval()


def record(host: Host, site: Site, folder: Path, made: Replacement) -> ReplacementRecord:
    save_replacement(made, folder, host=host, site=site)
    return load_replacement(folder)[1]


def sae_transformer(bridge: TransformerBridge) -> SAETransformerBridge:
    """As SAETransformerBridge.boot_transformers makes one."""
    bridge.__class__ = SAETransformerBridge
    bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}  # pyright: ignore[reportAttributeAccessIssue]
    return bridge  # pyright: ignore[reportReturnType]


@pytest.fixture
def about(tmp_path) -> ReplacementRecord:
    return record(tiny_host("gemma3"), Site(1, target="post_norm_out"), tmp_path / "folder", replacement())


# ---- By itself ----


@pytest.mark.parametrize(
    ("kind", "gate"),
    [*((kind, "topk:3") for kind in MAPS), *(("molt-skip", gate) for gate in ("relu", "jumprelu", "batchtopk:3"))],
)
def test_it_computes_and_saves_what_the_replacement_is(tmp_path, about, kind, gate):
    made = replacement(kind, gate=gate)
    sae = replacement_sae(made, about)
    sae.save_model(tmp_path / "sae")
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert type(loaded) is type(sae)
    assert loaded.cfg == sae.cfg
    assert (sae.cfg.d_in, sae.cfg.d_out, sae.cfg.d_sae) == (32, 32, made.map.n_units)
    x = torch.randn(3, 5, 32)
    expected = made.encode(x)
    assert 0 < (expected != 0).float().mean() < 1
    for one in (sae, loaded):
        acts = one.encode(x)
        torch.testing.assert_close(acts, expected)
        # Not to the last bit: a product's rounding depends on how its operands lie in memory, on some processors.
        torch.testing.assert_close(one.decode(acts), made.decode(acts, x))
        torch.testing.assert_close(one(x), made(x))
        assert one.replacement.map.ranks == made.map.ranks
        torch.testing.assert_close(one.replacement(x), made(x))


def test_it_is_a_copy_with_the_record_in_its_metadata(about):
    made = replacement()
    sae = replacement_sae(made, about)
    sae.replacement.map.b_dec.data.zero_()
    assert made.map.b_dec.count_nonzero() == 32
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == ("blocks.1.mlp.hook_in", "blocks.1.ln2_post.hook_out")
    assert metadata.hf_hook_name == "model.layers.1.pre_feedforward_layernorm.output"
    assert metadata.hf_hook_name_out == "model.layers.1.post_feedforward_layernorm.output"
    assert (metadata.model_name, metadata.host_fingerprint) == (about.host_name, about.host_fingerprint)
    assert metadata.sae_lens_version


def test_every_hook_sees_its_tensor_and_edits_count(about):
    made = replacement()
    sae = replacement_sae(made, about)
    x = torch.randn(4, 32)
    y, cache = sae.run_with_cache(x)
    torch.testing.assert_close(cache["hook_sae_input"], x)
    torch.testing.assert_close(cache["hook_sae_acts_pre"], made.map.pre_acts(made.input(x)))
    torch.testing.assert_close(cache["hook_sae_acts_post"], made.encode(x))
    torch.testing.assert_close(cache["hook_sae_recons"], y)
    torch.testing.assert_close(cache["hook_sae_output"], y)
    closed = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", lambda pre, hook: 0 * pre)])  # noqa: ARG005
    torch.testing.assert_close(closed, made.decode(torch.zeros(4, made.map.n_units), x))
    zeroed = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: 0 * acts)])  # noqa: ARG005
    torch.testing.assert_close(zeroed, closed)


def test_decode_is_at_the_x_encoded_last_or_at_the_one_it_is_given(about):
    made = replacement()
    sae = replacement_sae(made, about)
    acts = torch.rand(4, made.map.n_units)
    with pytest.raises(ValueError, match="nothing has been encoded"):
        sae.decode(acts)
    first, second = torch.randn(4, 32), torch.randn(4, 32)
    sae.encode(first)
    sae.encode(second)
    torch.testing.assert_close(sae.decode(acts), made.decode(acts, second))
    torch.testing.assert_close(sae.decode(acts, first), made.decode(acts, first))
    with pytest.raises(ValueError, match=r"encoded last has shape \(4, 32\)"):
        sae.decode(acts[:3])
    with pytest.raises(ValueError, match=r"d_in=32, got an input of shape \(3, 1\)"):
        sae.encode(torch.randn(3, 1))


def test_a_transcoder_has_weights_and_without_skip_needs_no_x(about):
    made = replacement("transcoder", gate="relu")
    sae = replacement_sae(made, about)
    assert isinstance(sae, TranscoderSAE)
    x, acts = torch.randn(6, 32), torch.rand(6, 40)
    zero = torch.zeros(1, 32)
    pre = x @ sae.W_enc + made.map.pre_acts(made.input(zero))
    torch.testing.assert_close(sae.encode(x), pre.relu())
    torch.testing.assert_close(sae.decode(acts), acts @ sae.W_dec + sae.decode(torch.zeros(6, 40)))
    torch.testing.assert_close(sae.decode(acts[:2]), made.decode(acts, x)[:2])
    assert not hasattr(replacement_sae(replacement("molt"), about), "W_dec")


def test_other_dtypes(tmp_path, about):
    made = replacement()
    sae = replacement_sae(copy.deepcopy(made).double(), about)
    assert sae.dtype == torch.float64
    sae.save_model(tmp_path / "sae")
    x = torch.randn(4, 32, dtype=torch.float64)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "sae")(x), sae(x), rtol=0, atol=0)
    half = replacement_sae(made, about)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, made(x.bfloat16().float()).bfloat16())


# ---- In a model ----


def check_attached(
    host: Host, bridge: SAETransformerBridge, made: dict[Site, Replacement], saes: list[SAE], ids: Tensor
):
    with spliced(host, made, "replace"):
        expected = host.logits(ids)
    own = host.logits(ids)
    assert (expected - own).abs().max() > 1e-2
    torch.testing.assert_close(bridge(ids), own, rtol=0, atol=1e-4)
    torch.testing.assert_close(bridge.run_with_saes(ids, saes=saes), expected, rtol=0, atol=1e-4)
    restored = bridge.run_with_saes(ids, saes=saes, use_error_term=True)
    torch.testing.assert_close(restored, own, rtol=0, atol=1e-4)
    name = f"{saes[0].cfg.metadata.hook_name_out}.hook_sae_acts_post"
    _, cache = bridge.run_with_cache_with_saes(ids, saes=saes)
    site = next(iter(made))
    with spliced(host, made, "replace", edit=lambda at, acts: seen.setdefault(at, acts)):
        seen: dict[Site, Tensor] = {}
        host.logits(ids)
    torch.testing.assert_close(cache[name], seen[site], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bridge(ids), own, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "target", "kind"),
    [
        ("gpt2", "mlp_out", "molt"),
        ("gpt2", "mlp_out", "skip-transcoder"),
        ("gemma3", "mlp_out", "transcoder"),
        ("gemma3", "post_norm_out", "molt-skip"),
    ],
)
def test_attached_to_a_bridge_it_gives_the_spliced_logits(tmp_path, family, target, kind):
    host, bridge = tiny_host(family), sae_transformer(tiny_bridge(family))
    made = {Site(layer, target=target): replacement(kind, seed=layer) for layer in (0, 2)}
    saes = [replacement_sae(one, record(host, site, tmp_path / str(site.layer), one)) for site, one in made.items()]
    check_attached(host, bridge, made, saes, IDS)


def test_attached_to_what_the_norm_reads(tmp_path):
    host, bridge = tiny_host("gpt2"), sae_transformer(tiny_bridge("gpt2"))
    made = {Site(1, input="pre_norm_in"): replacement()}
    saes = [replacement_sae(one, record(host, site, tmp_path / "1", one)) for site, one in made.items()]
    check_attached(host, bridge, made, saes, IDS)


# ---- The registry, and what is refused ----


def test_the_architectures_are_our_own():
    assert SAE_CLASS_REGISTRY["molt"][1] is MoltSAEConfig
    assert SAE_CLASS_REGISTRY["molt_lens_transcoder"][1] is TranscoderSAEConfig
    assert SAE_CLASS_REGISTRY["transcoder"][0].__module__.startswith("sae_lens.")


def test_registering_again_is_no_harm_but_a_name_of_others_is_theirs(monkeypatch):
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "molt", SAE_CLASS_REGISTRY["molt"])  # put back afterwards
    register(MoltSAE, MoltSAEConfig)
    assert SAE_CLASS_REGISTRY["molt"] == (MoltSAE, MoltSAEConfig)
    SAE_CLASS_REGISTRY["molt"] = SAE_CLASS_REGISTRY["standard"]
    with pytest.raises(ValueError, match="already registered"):
        register(MoltSAE, MoltSAEConfig)


def test_without_saelens_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens.registry", None)
    with pytest.raises(ImportError, match=r'pip install "cayley-interp\[saelens\]"'):
        importlib.reload(molt_lens.saelens)


MOLT: SparseMap = Molt(16, 16, gate="relu", ladder=((4, 2),))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"map": Transcoder(16, 16, n_features=9, gate="relu").config()}, "of kind 'molt', got 'transcoder'"),
        ({"map": {}}, "got None"),
        ({"map": MOLT.config(), "d_sae": 31}, "d_sae=2, got 31"),
        ({"map": MOLT.config() | {"gate": "softmax"}}, "no gate is called"),
        ({"map": MOLT.config(), "normalize_activations": "layer_norm"}, "its own standardisers"),
        ({"map": MOLT.config(), "apply_b_dec_to_input": True}, "its own standardisers"),
        ({"map": MOLT.config(), "reshape_activations": "hook_z"}, "its own standardisers"),
    ],
)
def test_configs_that_cannot_work_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        MoltSAEConfig(**fields)


def test_what_saelens_would_do_to_weights_is_refused(about):
    sae = replacement_sae(replacement(), about)
    with pytest.raises(NotImplementedError, match="nothing to fold"):
        sae.fold_W_dec_norm()
    with pytest.raises(NotImplementedError, match="own standardisers"):
        sae.fold_activation_norm_scaling_factor(2.0)
    with pytest.raises(ValueError, match="kind 'linear'"):
        replacement_sae(Replacement(LinearMap(32, 32)).eval(), about)


# ---- The real Gemma 3 270M, and what SAELens makes of a Gemma Scope 2 transcoder there ----


@pytest.mark.gemma
def test_on_the_real_gemma_saelens_own_loader_reads_the_wrong_tensor_and_drops_the_skip(tmp_path, monkeypatch):
    """Theirs depends on the MLP's output and not on the skip; ours gives the spliced logits. Seen in SAELens 6.54."""
    host = load_host("gemma-3-270m")
    ids = torch.tensor([[host.bos_id, *host.tokenize("We must keep the peace among nations, and")]])
    folder = tmp_path / "transcoder/layer_9_width_16k_l0_small_affine"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    tensors = {
        "w_enc": torch.randn(640, 512) / 80,
        "w_dec": torch.randn(512, 640),
        "b_enc": torch.zeros(512),
        "b_dec": torch.zeros(640),
        "threshold": torch.full((512,), 0.1),
        "affine_skip_connection": torch.randn(640, 640) / 10,
    }
    save_file(tensors, folder / "params.safetensors")
    hooks = {
        f"hf_hook_point_{side}": f"model.layers.9.{norm}_feedforward_layernorm.output"
        for side, norm in (("in", "pre"), ("out", "post"))
    }
    about = {"architecture": "jump_relu", "model_name": "google/gemma-3-270m", "affine_connection": True, "width": 512}
    (folder / "config.json").write_text(json.dumps(about | hooks))

    scope = load_gemma_scope(folder)
    ours, our_record = scope.on(host)
    model = copy.deepcopy(host.model)
    bridge = SAETransformerBridge.boot_transformers(
        "google/gemma-3-270m", hf_model=model, tokenizer=host.tokenizer, device="cpu"
    )
    check_attached(host, bridge, {scope.site: ours}, [replacement_sae(ours, our_record)], ids)

    monkeypatch.setattr(
        pretrained_sae_loaders,
        "hf_hub_download",
        lambda _repo_id=None, filename="", subfolder="", **_: str(tmp_path / subfolder / filename),
    )
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    monkeypatch.setattr(pretrained_sae_loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    cfg, state, _ = pretrained_sae_loaders.gemma_3_sae_huggingface_loader(
        "google/gemma-scope-2-270m-pt", str(folder.relative_to(tmp_path))
    )
    theirs = SAE.load_from_disk(folder, converter=lambda *_, **__: (cfg, state))
    read: list[Tensor] = []
    theirs.hook_sae_input.add_hook(lambda x, hook: read.append(x), is_permanent=True)  # noqa: ARG005
    logits = [bridge.run_with_saes(ids, saes=[theirs])]
    x, y = host.capture(scope.site, ids)
    torch.testing.assert_close(read[0], y, rtol=1e-4, atol=1e-2)
    assert (read[0] - x).abs().max() > 1
    theirs.W_skip.data.normal_()  # pyright: ignore[reportAttributeAccessIssue]
    logits.append(bridge.run_with_saes(ids, saes=[theirs]))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    with spliced(host, {scope.site: ours}, "replace"):
        assert (host.logits(ids) - logits[0]).abs().max() > 0.1

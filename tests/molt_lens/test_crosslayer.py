"""Checkpoints of crosslayer-transcoder, written by the transcription in every layout, read to the same outputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from molt_lens import Molt
from molt_lens.crosslayer import read_crosslayer
from tests.molt_lens.crosslayer_transcription import Stack, Transcription, randomise

D, N_LAYERS = 16, 5
GROUPS = [(8, 2), (4, 4), (2, 8)]


def one(groups: list[tuple[int, int]] = GROUPS) -> Transcription:
    made = randomise(Transcription(D, groups, N_LAYERS))
    assert isinstance(made, Transcription)
    return made


def state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def assert_equal(replacement, theirs: Transcription, layer: int) -> None:
    x = 3 * torch.randn(2, 50, D, dtype=torch.float64)
    z = (x - theirs.input_standardizer.mean[layer]) / theirs.input_standardizer.std[layer]
    gates, _ = theirs.standardized(z.flatten(0, 1))
    assert 0.05 < (gates > 0).double().mean() < 0.95
    acts = replacement.encode(x)
    expected = theirs(x.flatten(0, 1), layer).view_as(x)
    torch.testing.assert_close(acts.flatten(0, 1), gates, rtol=0, atol=1e-12)
    torch.testing.assert_close(replacement(x), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(replacement.decode(acts, x), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(replacement.folded()(x), expected, rtol=0, atol=1e-10)


# ---- Layouts ----


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
@pytest.mark.parametrize("prefix", ["", "model.", "model._orig_mod."])
def test_one_layer(tmp_path, suffix, prefix):
    theirs = one()
    replacement = read_crosslayer(write(tmp_path / f"molt{suffix}", state(theirs, prefix)), layer=3)
    assert_equal(replacement, theirs, 3)
    molt = replacement.map
    assert isinstance(molt, Molt)
    assert not replacement.training
    assert (molt.n, molt.ladder) == (2, ((8, 1), (4, 2), (2, 4)))
    assert molt.ranks == 2 * [8] + 4 * [4] + 8 * [2]
    torch.testing.assert_close(molt.norms(), theirs.norms())


def test_a_checkpoint_of_lightning(tmp_path):
    """With an optimiser, hyper-parameters, and other modules of the run beside the model."""
    theirs = one()
    weights = state(theirs, "model.") | {"last_active": torch.zeros(14), "replacement_model.gpt2.wte": torch.zeros(3)}
    optimizer = torch.optim.Adam(theirs.parameters())
    theirs(torch.randn(4, D, dtype=torch.float64), 0).sum().backward()
    optimizer.step()
    payload = {
        "state_dict": weights,
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"learning_rate": 2e-4, "lambda_sparsity": 5e-4, "optimizer": "adam"},
        "global_step": 20_000,
    }
    torch.save(payload, tmp_path / "clt.ckpt")
    assert_equal(read_crosslayer(tmp_path / "clt.ckpt", layer=1), one(), 1)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("shared_once", [False, True])
def test_all_layers_in_one_file(tmp_path, prefix, shared_once):
    theirs = Stack(D, GROUPS, N_LAYERS)
    randomise(theirs)
    weights = state(theirs, prefix)
    if shared_once:
        weights = {n: t for n, t in weights.items() if not ("molts." in n and "standardizer" in n)}
    path = write(tmp_path / "all.safetensors", weights)
    for layer, layers_molt in enumerate(theirs.molts):
        assert isinstance(layers_molt, Transcription)
        assert_equal(read_crosslayer(path, layer), layers_molt, layer)
    with pytest.raises(ValueError, match="give the layer"):
        read_crosslayer(path)
    with pytest.raises(ValueError, match="layer=7"):
        read_crosslayer(path, layer=7)


def test_layers_prefix(tmp_path):
    theirs = one()
    path = write(tmp_path / "a.safetensors", state(theirs, "layers.4."))
    assert_equal(read_crosslayer(path), theirs, 4)


def test_a_folder_with_a_folder_for_each_layer(tmp_path):
    """As hf.co/georglange/qwen3-4b-molt: not every layer is there, and each config.json says which it is."""
    made = {}
    for layer in (0, 1, 4):
        made[layer] = randomise(Transcription(D, GROUPS, N_LAYERS), seed=layer)
        write(tmp_path / f"layer-{layer:02d}" / "checkpoint.safetensors", state(made[layer]))
        (tmp_path / f"layer-{layer:02d}" / "config.json").write_text(json.dumps({"layer": layer, "N": 2}))
    for layer, theirs in made.items():
        assert_equal(read_crosslayer(tmp_path, layer), theirs, layer)
    assert_equal(read_crosslayer(tmp_path / "layer-04"), made[4], 4)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 4\]: say which"):
        read_crosslayer(tmp_path)
    with pytest.raises(ValueError, match="0 checkpoints of layer 2"):
        read_crosslayer(tmp_path, 2)
    with pytest.raises(ValueError, match="is of layer 4"):
        read_crosslayer(tmp_path / "layer-04" / "checkpoint.safetensors", layer=1)


def test_a_folder_with_a_file_for_each_layer(tmp_path):
    """As its callback writes them; two steps of one layer are not chosen between."""
    made = {}
    for layer in range(2):
        made[layer] = randomise(Transcription(D, GROUPS, N_LAYERS), seed=layer)
        write(tmp_path / f"molt-multilayer-2gpu_layer_{layer}_step36000.pt", state(made[layer]))
    for layer, theirs in made.items():
        assert_equal(read_crosslayer(tmp_path, layer), theirs, layer)
    write(tmp_path / "molt-multilayer-2gpu_layer_1_step18000.pt", state(made[1]))
    with pytest.raises(ValueError, match=r"2 checkpoints of layer 1.*step18000"):
        read_crosslayer(tmp_path, 1)


@pytest.mark.parametrize("rows", [1, None])
def test_statistics_of_one_layer_need_no_layer(tmp_path, rows):
    theirs = one()
    weights = state(theirs)
    for name in weights:
        if "standardizer" in name:
            weights[name] = weights[name][2:3] if rows else weights[name][2]
    assert_equal(read_crosslayer(write(tmp_path / "a.safetensors", weights)), theirs, 2)


# ---- The definition ----


def test_counts_that_do_not_double(tmp_path):
    groups = [(5, 3), (4, 2), (3, 7)]
    theirs = one(groups)
    replacement = read_crosslayer(write(tmp_path / "a.safetensors", state(theirs)), layer=0)
    assert_equal(replacement, theirs, 0)
    assert isinstance(replacement.map, Molt)
    assert (replacement.map.n, replacement.map.ladder) == (1, tuple(groups))


def test_a_gate_opens_above_its_threshold_and_above_zero(tmp_path):
    """Exactly at the threshold it is closed, in float32 too: no detour over the logarithm."""
    theirs = Transcription(D, [(2, 4)], N_LAYERS)
    weights = state(theirs)
    weights["nonlinearity.theta"] = torch.tensor([[0.03, 0.0, -0.5, 0.03]])
    weights["e.weight"] = torch.zeros(4, D)
    weights["e.bias"] = torch.tensor([0.03, 1e-45, -0.25, 0.0])
    weights["e.bias"][3] = torch.nextafter(torch.tensor(0.03), torch.tensor(1.0))
    acts = read_crosslayer(write(tmp_path / "a.safetensors", weights), layer=0).encode(torch.randn(1, D))
    assert acts.tolist() == [[0.0, weights["e.bias"][1].item(), 0.0, weights["e.bias"][3].item()]]


def test_a_tiny_deviation_is_kept(tmp_path):
    """Theirs is clamped at 1e-8 and divided by: another choice than our standardiser's, and it is their definition."""
    theirs = one()
    theirs.input_standardizer.std[0, 3] = 1e-8
    replacement = read_crosslayer(write(tmp_path / "a.safetensors", state(theirs)), layer=0)
    assert replacement.input.std[3].item() == 1e-8
    x = torch.randn(6, D, dtype=torch.float64)
    torch.testing.assert_close(replacement(x), theirs(x, 0), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("saved", "read"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_dtypes(tmp_path, saved, read):
    theirs = one().to(saved)
    replacement = read_crosslayer(write(tmp_path / "a.safetensors", state(theirs)), layer=0)
    assert {tensor.dtype for tensor in replacement.state_dict().values()} == {read}
    assert torch.equal(replacement.map.W_enc, theirs.e.weight.to(read))


# ---- What is refused ----


def test_a_row_of_the_statistics_must_be_chosen(tmp_path):
    path = write(tmp_path / "a.safetensors", state(one()))
    with pytest.raises(ValueError, match="5 layers: say which"):
        read_crosslayer(path)
    with pytest.raises(ValueError, match="layers 0 to 4, and layer 5"):
        read_crosslayer(path, layer=5)


def change(name: str, tensor: Tensor | None):
    def apply(weights: dict[str, Tensor]) -> None:
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("Vs.1", None), r"lacks Vs\.1"),
        (change("Us.0", None), r"lacks Us\.0"),
        (change("nonlinearity.theta", None), r"lacks nonlinearity\.theta"),
        (change("output_standardizer.std", None), r"lacks output_standardizer\.std"),
        (change("e.weight", None), "no MOLT of crosslayer-transcoder.*Us"),
        (change("W_skip", torch.ones(D, D)), "has W_skip, which such a MOLT has not"),
        (change("Us.0", torch.ones(2, 8)), r"expected \[n, rank, d\]"),
        (change("Us.0", torch.ones(2, 7, D)), r"expected \[n, rank, d\]"),
        (change("Us.1", torch.ones(4, 4, D + 1)), "of another width"),
        (change("e.weight", torch.ones(13, D)), r"expected \[14, 16\]"),
        (change("nonlinearity.theta", torch.ones(1, 12, 14)), r"expected \[1, 14\]"),
        (change("input_standardizer.mean", torch.ones(N_LAYERS)), r"expected \[16\] or \[layers, 16\]"),
        (change("e.bias", torch.full((14,), torch.nan)), r"nan or inf in e\.bias"),
        (change("output_standardizer.std", torch.zeros(D)), "not above 0"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, spoil, message):
    weights = state(one())
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        read_crosslayer(write(tmp_path / "a.safetensors", weights), layer=0)


def test_rows_of_other_layers_may_be_unset(tmp_path):
    """The statistics of layers that were never trained are whatever memory held."""
    theirs = one()
    weights = state(theirs)
    weights["input_standardizer.std"][1] = torch.nan
    assert_equal(read_crosslayer(write(tmp_path / "a.safetensors", weights), layer=0), theirs, 0)


def test_a_rank_above_d(tmp_path):
    path = write(tmp_path / "a.safetensors", state(one([(D + 1, 2)])))
    with pytest.raises(ValueError, match="rank 17 is more"):
        read_crosslayer(path, layer=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("size", [0, 5, 3000])
def test_files_cut_short(tmp_path, suffix, size):
    path = write(tmp_path / f"a{suffix}", state(one()))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="download it again"):
        read_crosslayer(path, layer=0)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_code_is_refused_by_name_and_not_run(tmp_path):
    torch.save({"state_dict": state(one(), "model."), "hyper_parameters": Harmful()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"needs more than weights: .*exec.*Nothing of it was executed"):
        read_crosslayer(tmp_path / "a.ckpt", layer=0)


@pytest.mark.parametrize("payload", [[1, 2], {"state_dict": 3}, {1: 2}, torch.ones(3)])
def test_no_state_dict(tmp_path, payload):
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="expected a state dict"):
        read_crosslayer(tmp_path / "a.pt", layer=0)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_crosslayer(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        read_crosslayer(tmp_path)

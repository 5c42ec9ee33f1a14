"""Foreign checkpoints come back as the model that was written; what is not one is refused by name."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from cayley_interp import CayleyGPT, foreign
from cayley_interp.bottleneck import parse_levels
from cayley_interp.foreign import find_checkpoint, load_foreign, read_checkpoint
from cayley_interp.foreign_tensors import match_roles, role_assignments
from tests.cayley_interp.foreign_writer import (
    LEVELS,
    corpus,
    corpus_tokens,
    model_config,
    small_tokenizer,
    state_dict,
    trained,
    untrained,
    write_checkpoint,
    write_safetensors,
)

FLAGS = {"cayley_per_parent_budget": True, "cayley_score_standardize": True, "cayley_forward_standardized": True}
BLOCK = "transformer.h.0."


@pytest.fixture(scope="module")
def vanilla() -> CayleyGPT:
    return trained(levels=None, steps=40)


@pytest.fixture(autouse=True)
def no_search_beyond_need(monkeypatch):
    """Which reading wins is tested in test_conventions; here a few windows do."""
    monkeypatch.setattr("cayley_interp.conventions.N_TOKENS", 1024)


def load(path: Path, console: Console | None = None) -> CayleyGPT:
    return load_foreign(path, text=corpus(), console=console or Console(file=io.StringIO(), width=250))


def assert_same(loaded: CayleyGPT, model: CayleyGPT) -> None:
    ids = corpus_tokens()[-640:].view(10, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=1e-5)


def refuse(tmp_path: Path, message: str, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> None:
    path = write_checkpoint(tmp_path, tensors, model_config(untrained()) if config is None else config)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "conventions.json").exists()


# ---- What comes back ----


def test_a_vanilla_checkpoint_needs_no_search(tmp_path, vanilla):
    path = write_checkpoint(tmp_path, state_dict(vanilla), model_config(vanilla))
    loaded = load(path)
    assert_same(loaded, vanilla)
    assert loaded.config == vanilla.config
    assert not loaded.training
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.to_str() == small_tokenizer().to_str()
    assert loaded.head.weight is loaded.tok.weight
    record = json.loads((tmp_path / "conventions.json").read_text())
    assert record["reading"] is None
    assert record["loss"] < record["unigram_loss"]


def test_safetensors_of_the_same_names_with_a_config_beside(tmp_path, vanilla):
    path = write_safetensors(tmp_path, state_dict(vanilla), model_config(vanilla))
    assert_same(load(path), vanilla)


def test_half_precision_comes_back_as_float32(tmp_path, vanilla):
    halved = {name: tensor.bfloat16() for name, tensor in state_dict(vanilla).items()}
    loaded = load(write_checkpoint(tmp_path, halved, model_config(vanilla)))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_the_second_load_measures_nothing_until_the_checkpoint_changes(tmp_path, vanilla, monkeypatch):
    path = write_checkpoint(tmp_path, state_dict(vanilla), model_config(vanilla))
    load(path)
    with monkeypatch.context() as patch:
        patch.setattr(foreign, "_windows", lambda *_: pytest.fail("measured again"))
        assert_same(load(path), vanilla)
    changed = state_dict(vanilla)
    changed["transformer.ln_f.weight"] = changed["transformer.ln_f.weight"] * 0.9
    write_checkpoint(tmp_path, changed, model_config(vanilla))
    fingerprint = json.loads((tmp_path / "conventions.json").read_text())["fingerprint"]
    load(path)
    assert json.loads((tmp_path / "conventions.json").read_text())["fingerprint"] != fingerprint


def test_a_saved_reading_is_used_if_it_is_possible_and_conventions_may_be_garbage(tmp_path, monkeypatch):
    model = trained(steps=40)
    path = write_checkpoint(tmp_path, state_dict(model), model_config(model, **FLAGS))
    choices = {name: values[:1] for name, values in foreign.CHOICES.items()}
    monkeypatch.setattr(foreign, "CHOICES", choices)
    monkeypatch.setitem(foreign._FLAGS, "cayley_score_standardize", ("score_standardize", {True: ("feature",)}))
    (tmp_path / "conventions.json").write_text("garbage")
    printed = io.StringIO()
    assert_same(load(path, Console(file=printed, width=250)), model)
    shown = printed.getvalue()
    assert "sae.running_mean.0 + transformer.h.*.sae.running_mean.1" in shown
    assert "layers.*.sparse.mean" in shown
    assert "num_batches_tracked" in shown
    monkeypatch.setattr(foreign, "_windows", lambda *_: pytest.fail("measured again"))
    assert_same(load(path), model)


def test_a_folder_that_cannot_be_written_does_not_stop_the_load(tmp_path, vanilla, monkeypatch):
    def refuse_to_save(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("cayley_interp.conventions.save_conventions", refuse_to_save)
    printed = io.StringIO()
    load(write_checkpoint(tmp_path, state_dict(vanilla), model_config(vanilla)), Console(file=printed, width=250))
    assert "could not be saved (read-only)" in printed.getvalue()


# ---- Which file ----


def test_the_checkpoint_of_a_folder(tmp_path):
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "a.pt").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "a.pt"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(ValueError, match=r"several checkpoints: a\.pt, b\.safetensors"):
        find_checkpoint(tmp_path)
    (tmp_path / "ckpt.pt").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "ckpt.pt"


def test_our_own_format_is_not_foreign(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"n_layers": 2}')
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "config.json").write_text('{"n_layer": 2}')
    assert find_checkpoint(tmp_path) == tmp_path / "model.safetensors"


# ---- Refusals: the file ----


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_file(tmp_path, keep):
    path = write_checkpoint(tmp_path, state_dict(untrained()), model_config(untrained()))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match=r"not a file of torch\.save, or cut short: download it again"):
        load(path)


def test_a_file_damaged_inside(tmp_path):
    path = write_checkpoint(tmp_path, state_dict(untrained()), model_config(untrained()))
    data = bytearray(path.read_bytes())
    start = data.index(b"data.pkl") + 200
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"download it again|without running code"):
        load(path)


def test_damaged_safetensors(tmp_path):
    path = write_safetensors(tmp_path, state_dict(untrained()), model_config(untrained()))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged or not safetensors"):
        load(path)


def test_files_without_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path / "ckpt.pt")
    torch.save({"weights": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"a state dict under `model`, found the keys \['weights'\]"):
        load(tmp_path / "ckpt.pt")
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="no config: expected one of model_config, model_args, config"):
        load(tmp_path / "ckpt.pt")
    torch.save({"model": {"a": 3}, "config": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="names to tensors; these are not: a"):
        load(tmp_path / "ckpt.pt")


# ---- Refusals: the tensors ----


def changed(name: str, value: Tensor | None) -> dict[str, Tensor]:
    tensors = state_dict(untrained())
    tensors.pop(name, None)
    return tensors if value is None else tensors | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (BLOCK + "mlp.c_fc.weight", None, r"missing: transformer\.h\.0\.mlp\.c_fc\.weight"),
        (BLOCK + "attn.c_attn.weight", torch.ones(64, 64), r"has the shape \[64, 64\], expected \[192, 64\]"),
        (BLOCK + "ln_1.weight", torch.full((64,), torch.nan), r"ln_1\.weight holds values that are not finite"),
        (BLOCK + "ln_1.weight", torch.ones(64).to(torch.int8), r"ln_1\.weight is torch\.int8: expected floating"),
        (BLOCK + "ln_1.bias", torch.ones(64), r"bias=False models only\): transformer\.h\.0\.ln_1\.bias"),
        ("lm_head.weight", torch.ones(384, 64), "has a tied head, so this is another model"),
        ("transformer.wpe.weight", None, r"models without learned positions \(RoPE\) are not supported"),
        ("transformer.wpe.weight", torch.ones(64), r"wpe\.weight must be matrices"),
        ("transformer.h.7.ln_1.weight", torch.ones(64), "there are 3 blocks, but one is numbered 7"),
        ("extra.weight", torch.ones(3), r"tensors of no known use: extra\.weight"),
        (BLOCK + "sae.signs", torch.ones(8, 64), r"blocks 0 and 1 differ .*: sae\.signs"),
        (BLOCK + "sae.bias.1", torch.full((512,), torch.inf), r"sae\.bias\.1 holds values that are not finite"),
        (BLOCK + "sae.running_std.0", torch.zeros(64), "named like a std, but it has entries that are not above 0"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(tmp_path, name, value, message):
    refuse(tmp_path, message, changed(name, value))


def test_the_same_name_with_and_without_a_prefix(tmp_path):
    tensors = state_dict(untrained())
    refuse(tmp_path, "two tensors lm_head.weight", tensors | {"module.lm_head.weight": tensors["lm_head.weight"]})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"sae.rotation": torch.eye(64)}, r"no known use in every block: sae\.rotation \[64, 64\]; expected one entry"),
        ({"sae.gain": torch.ones(512)}, r"no known use in every block: sae\.gain; each role needs one tensor for each"),
        ({"sae.beta": -torch.ones(576)}, "cannot be told apart or are too many"),
        ({"sae.rstd": torch.ones(576)}, r"sae\.rstd: reads as a reciprocal"),
        ({"sae.generators": torch.arange(64)}, r"no known use in every block: sae\.generators \[64\]"),
    ],
)
def test_a_tensor_left_over_in_every_block_is_named(tmp_path, extra, message):
    tensors = state_dict(untrained())
    tensors |= {f"transformer.h.{i}.{name}": tensor for i in range(2) for name, tensor in extra.items()}
    refuse(tmp_path, message, tensors)


def test_bottleneck_tensors_of_a_vanilla_config_are_left_over(tmp_path):
    message = r"no known use in every block: sae\.bias\.0.*the config gives no cayley_levels"
    refuse(tmp_path, message, state_dict(untrained()), model_config(untrained(levels=None)))


# ---- Roles by name, then by values ----


def roles_of(tensors: dict[str, Tensor]) -> list[tuple[str, ...]]:
    families, _ = match_roles([tensors, tensors], parse_levels(LEVELS))
    return [tuple(roles) for roles in role_assignments(families)]


def per_level(*names: str, scale: float = -1.0) -> dict[str, Tensor]:
    return {name: torch.linspace(scale, 2, size) for name, size in zip(names, (64, 512), strict=True)}


def test_names_decide_before_values():
    named = per_level("root_bias", "leaf_bias") | per_level("stats.0.mu", "stats.1.mu")
    assert roles_of(named | per_level("a.var", "b.var", scale=0.5)) == [("mean", "bias", "var")]
    assert roles_of({"x.sigma": torch.ones(1, 576), "x.b_bias": torch.ones(576)}) == [("std", "bias")]


def test_values_leave_only_a_positive_tensor_for_the_scale():
    found = roles_of({"p0": torch.linspace(-1, 1, 576), "p1": torch.linspace(0.1, 1, 576), "bias": torch.ones(576)})
    assert found == [("mean", "std", "bias"), ("mean", "var", "bias")]


def test_a_list_of_parameters_is_paired_in_order():
    flat = {f"p.{i}": torch.full((size,), -float(i)) for i, size in enumerate([64, 64, 512, 512])}
    families, _ = match_roles([flat], parse_levels(LEVELS))
    assert [family.names for family in families] == [("p.0", "p.2"), ("p.1", "p.3")]


# ---- Refusals: the config and the tokenizer ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, "the config says n_layer = 3, its tensors 2"),
        ({"block_size": 1024}, "the config says block_size = 1024, its tensors 64"),
        ({"vocab_size": 50304}, "the config says vocab_size = 50304, its embedding has 384 rows"),
        ({"vocab_size": "many"}, "the config says vocab_size = many"),
        ({"n_head": None}, "must give n_head"),
        ({"cayley_levels": None}, "must give cayley_levels, as .*; found None"),
        ({"cayley_levels": "6,4"}, "levels are written"),
        ({"cayley_levels": [[5, 4, 0], [9, 8, 16]]}, "no known use in every block"),
        ({"cayley_locations": ["resid_mid"]}, "only mlp_in is supported"),
        ({"sparsity_mode": "topk"}, "sparsity_mode is 'topk', expected cayley or none"),
        ({"cayley_score_standardize": "yes"}, "cayley_score_standardize is 'yes', expected true or false"),
        ({"cayley-levels": "7,4,0"}, r"gives cayley_levels twice: .* and '7,4,0'"),
    ],
)
def test_a_config_that_is_not_understood(tmp_path, change, message):
    refuse(tmp_path, message, state_dict(untrained()), model_config(untrained()) | change)


def test_levels_as_a_string_and_flags_with_dashes(tmp_path):
    config = model_config(untrained()) | {"cayley-forward-standardized": False, "cayley_levels": LEVELS}
    path = write_checkpoint(tmp_path, state_dict(untrained()), config)
    found = read_checkpoint(path)
    settings = foreign._settings(found.config, foreign.read_backbone(found.tensors))
    assert settings.levels == LEVELS
    assert settings.choices["forward_standardized"] == (False,)
    assert settings.choices["routing"] == ("per_parent", "parents")


def test_the_config_that_the_model_was_built_from_is_believed_first(tmp_path):
    tensors = state_dict(untrained())
    training = {"n_head": 4, "n_layer": 2, "seed": 1}
    torch.save({"model": tensors, "model_args": {"n_head": 2}, "config": training}, tmp_path / "ckpt.pt")
    (tmp_path / "config.json").write_text('{"n_layer": 3, "note": "beside"}')
    found = read_checkpoint(tmp_path / "ckpt.pt").config
    assert found == {"n_head": 2, "n_layer": 2, "seed": 1, "note": "beside"}


def test_a_tokenizer_larger_than_the_embedding(tmp_path, vanilla):
    path = write_checkpoint(tmp_path, state_dict(vanilla), model_config(vanilla))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"GPT-2's tokenizer .* has 50257 entries, but the embedding has 384 rows"):
        load(path)


def test_too_little_text(tmp_path, vanilla):
    path = write_checkpoint(tmp_path, state_dict(vanilla), model_config(vanilla))
    with pytest.raises(ValueError, match=r"told apart on 1,040 tokens of text, but it has only"):
        load_foreign(path, text="Fellow citizens.", console=Console(file=io.StringIO()))


# ---- Refusals: another architecture ----


def test_an_untrained_model_is_not_understood(tmp_path):
    model = untrained(levels=None)
    refuse(tmp_path, "not understood: its loss", state_dict(model), model_config(model))


def test_a_model_with_layernorms_is_not_taken_for_one_with_rmsnorms(tmp_path, monkeypatch):
    class Centred(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(-1, keepdim=True))

    with monkeypatch.context() as patched:
        patched.setattr(nn, "RMSNorm", Centred)
        model = trained(levels=None, steps=60)
    # What LayerNorm and softmax both ignore, and a longer training would have brought in.
    model.tok.weight.data += 0.1
    refuse(tmp_path, "norms are LayerNorms", state_dict(model), model_config(model))


def test_padded_rows_of_the_embedding_are_kept(tmp_path, vanilla):
    loaded = load(write_checkpoint(tmp_path, state_dict(vanilla), model_config(vanilla)))
    assert loaded.config.d_vocab == 384
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.get_vocab_size() < 384

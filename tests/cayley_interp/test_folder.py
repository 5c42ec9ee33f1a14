"""A model's folder: bitwise round trips, one error for each way a file can be wrong, and saves that lose nothing."""

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from cayley_interp import CayleyGPT, CayleyGPTConfig, load_pretrained, save_pretrained
from cayley_interp.folder import MODEL_FILES, read_model

SMALL = {"n_layers": 2, "n_heads": 2, "d_model": 16, "n_ctx": 12, "d_vocab": 50}
LEVELS = "4,3,0;7,5,6"
TOKENS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))


def make(levels: str | None = LEVELS, n_entries: int = 50, **options) -> CayleyGPT:
    """A model whose every number is its own, with a tokenizer."""
    torch.manual_seed(0)
    model = CayleyGPT(CayleyGPTConfig(**{**SMALL, "levels": levels, **options})).eval()
    for sae in model.bottlenecks():
        torch.nn.init.normal_(sae.bias)
        sae.mean.normal_()
        sae.std.uniform_(0.5, 2)
        sae.n_updates.fill_(700)
        sae.tokens_since_active.random_(2**40)  # past what float32 holds
    model.tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_entries)}, unk_token="w0"))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pretrained(make(), tmp_path / "model")


def assert_same(a: CayleyGPT, b: CayleyGPT) -> None:
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        other = b.state_dict()[name]
        assert value.dtype == other.dtype, name
        assert torch.equal(value, other), name


# ---- Round trips ----


@pytest.mark.parametrize(
    "options",
    [{"levels": None}, {}, {"dictionary": "random", "dictionary_seed": 3, "routing": "parents", "signed": True}],
)
def test_a_model_comes_back_bit_for_bit(tmp_path, options):
    model = make(**options)
    loaded = load_pretrained(save_pretrained(model, tmp_path / "model"), wrap=None)
    assert_same(loaded, model)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert model.tokenizer is not None
    assert loaded.tokenizer.to_str() == model.tokenizer.to_str()
    assert loaded.head.weight is loaded.tok.weight
    assert not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_bias_without_gradient_stays_so(tmp_path):
    model = make(forward_standardized=False)
    loaded = read_model(save_pretrained(model, tmp_path / "model"))
    assert not any(sae.bias.requires_grad for sae in loaded.bottlenecks())


def test_a_model_without_tokenizer_comes_back_without(tmp_path):
    model = make()
    model.tokenizer = None
    assert read_model(save_pretrained(model, tmp_path / "model")).tokenizer is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bottleneck_keeps_float32_exactly_in_a_smaller_dtype(folder, dtype):
    model, loaded = make(), load_pretrained(folder, wrap=None, dtype=dtype)
    assert loaded.tok.weight.dtype == loaded.blocks()[0].mlp.fc_in.weight.dtype == dtype
    for ours, theirs in zip(model.bottlenecks(), loaded.bottlenecks(), strict=True):
        for name, value in ours.state_dict().items():
            assert value.dtype == theirs.state_dict()[name].dtype
            assert torch.equal(value, theirs.state_dict()[name]), name
    assert loaded(TOKENS).isfinite().all()
    again = load_pretrained(save_pretrained(loaded, folder), wrap=None, dtype=dtype)
    assert_same(again, loaded)


def test_float64_loses_nothing(tmp_path):
    model = make().double()
    torch.nn.init.normal_(model.tok.weight)
    torch.nn.init.normal_(model.bottlenecks()[0].bias)
    folder = save_pretrained(model, tmp_path / "model")
    assert_same(load_pretrained(folder, wrap=None, dtype=torch.float64), model)
    assert_same(load_pretrained(folder, wrap=None), model.float())


def test_the_device_is_the_one_asked_for(folder):
    model = load_pretrained(folder, wrap=None, device="meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert load_pretrained(folder, wrap=None).tok.weight.device.type == "cpu"


def test_what_is_known_of_the_training_is_beside_the_model(tmp_path):
    known = {"recipe": "tiny", "tokens": 5}
    folder = save_pretrained(make(), tmp_path / "model", training=known)
    assert sorted(p.name for p in folder.iterdir()) == sorted(MODEL_FILES)
    assert json.loads((folder / "training.json").read_text()) == known
    (folder / "training.json").write_bytes(b"\xff{")
    assert_same(load_pretrained(folder, wrap=None), make())


# ---- Files that are wrong ----


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder, wrap=None)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"is not a saved CayleyGPT: it has no {name}"):
        read_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"n_layers": 2', "Expecting ',' delimiter"),
        (b"\xff\xfe\x00n_layers", "can't decode byte"),
        (b"", "Expecting value"),
    ],
)
def test_a_config_that_is_not_json(folder, content, message):
    (folder / "config.json").write_bytes(content)
    refuse(folder, rf"config\.json is not the config of a CayleyGPT: .*{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 2}, "it has n_layer, which no CayleyGPT has"),
        ({"n_heads": None}, "n_heads must be int, got None"),
        ({"n_layers": "two"}, "n_layers must be int, got 'two'"),
        ({"n_layers": True}, "n_layers must be int, got True"),
        ({"signed": "false"}, "signed must be bool, got 'false'"),
        ({"routing": "by_parent"}, r"routing must be Literal\['per_parent', 'parents'\], got 'by_parent'"),
        ({"levels": [[4, 3, 0]]}, r"levels must be str \| None, got \[\["),
        ({"levels": "4,3"}, "levels are written"),
        ({"n_heads": 3}, "n_heads must divide d_model=16, got 3"),
        ({"n_ctx": -1}, "negative dimension -1"),
    ],
)
def test_a_config_that_cannot_be(folder, change, message):
    values = asdict(make().config) | change
    (folder / "config.json").write_text(json.dumps(values))
    refuse(folder, rf"config\.json is not the config of a CayleyGPT: .*{message}")


def test_a_config_without_a_field(folder):
    values = asdict(make().config)
    del values["n_heads"]
    (folder / "config.json").write_text(json.dumps(values))
    refuse(folder, r"config\.json is not the config of a CayleyGPT: it lacks n_heads")


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_weights_cut_short(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(folder, r"model\.safetensors is damaged or cut short, fetch or save it again")


def test_weights_of_random_bytes(folder):
    (folder / "model.safetensors").write_bytes(os.urandom(10_000))
    refuse(folder, r"model\.safetensors is damaged or cut short")


class _Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_weights_that_are_a_pickle_are_not_executed(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "model.safetensors").write_bytes(pickle.dumps(_Payload()))
    refuse(folder, r"model\.safetensors is damaged or cut short")
    torch.save(_Payload(), folder / "model.safetensors")
    refuse(folder, r"model\.safetensors is damaged or cut short")
    assert not Path("executed").exists()


def edit(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


BIAS, STD, SEEN = (f"layers.1.sparse.{name}" for name in ("bias", "std", "tokens_since_active"))


def put(name: str, index: int, value: float):
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[index] = value

    return change


def replace(name: str, make_other):
    return lambda weights: weights.update({name: make_other(weights[name]).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm_f.weight"), r"lacks norm_f\.weight: it is not of the model"),
        (lambda w: w.update({"extra": torch.ones(1)}), "holds extra, which the model of its config.json does not have"),
        (replace("wpe.weight", lambda t: t[:-1]), r"wpe\.weight has shape \[11, 16\], its config\.json asks for \[12"),
        (replace(BIAS, lambda t: t[None]), rf"{BIAS} has shape \[1, 144\], its config\.json asks for \[144\]"),
        (
            replace("wpe.weight", lambda t: t.int()),
            r"wpe\.weight has dtype torch\.int32, expected one of torch\.float32",
        ),
        (replace(STD, lambda t: t.to(torch.float8_e4m3fn)), rf"{STD} has dtype torch\.float8_e4m3fn, expected one of"),
        (replace(SEEN, lambda t: t.float()), rf"{SEEN} has dtype torch\.float32, expected one of torch\.int64"),
        (put("tok.weight", 7, torch.nan), r"tok\.weight holds 1 values that are nan or infinite of 800"),
        (put(BIAS, 3, -torch.inf), rf"{BIAS} holds 1 values that are nan or infinite of 144"),
        (put(STD, 0, 0.0), rf"{STD} holds standard deviations that are not positive"),
        (put(STD, 143, -1.0), rf"{STD} holds standard deviations that are not positive"),
    ],
)
def test_weights_that_are_not_the_models(folder, change, message):
    edit(folder, change)
    refuse(folder, message)


def test_a_tokenizer_that_cannot_be_read(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    refuse(folder, r"tokenizer\.json is not a tokenizer\.json of the `tokenizers` library")


def test_a_tokenizer_of_another_model(tmp_path):
    folder = save_pretrained(make(n_entries=51), tmp_path / "model")
    refuse(folder, r"tokenizer\.json has 51 entries, the model has d_vocab = 50: it is the tokenizer of another model")


# ---- Saving ----


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_model_is_replaced_whole(folder):
    (folder / "training.json").write_text("{}")
    save_pretrained(make(levels=None), folder)
    assert_same(read_model(folder), make(levels=None))
    assert not (folder / "training.json").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_link_to_a_model_stays_a_link(folder):
    link = folder.with_name("latest")
    link.symlink_to(folder)
    save_pretrained(make(levels=None), link)
    assert link.is_symlink()
    assert_same(read_model(folder), make(levels=None))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: (f / "notes.txt").write_text("mine"), r"is not a model's folder alone: it has notes\.txt; choose"),
        (
            lambda f: (f / "config.json").write_text("{}"),
            "is not a model's folder; choose another, nothing was written",
        ),
        (lambda f: (f / "config.json").unlink(), "is not a model's folder; choose another, nothing was written"),
        (lambda f: (f / ".git").mkdir(), r"it has \.git; choose"),
    ],
)
def test_what_is_not_a_model_is_not_replaced(folder, prepare, message):
    prepare(folder)
    before = contents(folder.parent)
    with pytest.raises(ValueError, match=message):
        save_pretrained(make(), folder)
    assert contents(folder.parent) == before


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ValueError, match="is a file, not a folder for a model"):
        save_pretrained(make(), tmp_path / "model")
    assert contents(tmp_path) == {"model": b"mine"}


@pytest.mark.parametrize(("name", "value"), [("tok.weight", torch.nan), (STD, 0.0)])
def test_a_model_that_could_not_be_read_again_is_not_saved(folder, name, value):
    before, model = contents(folder.parent), make()
    put(name, 0, value)({key: tensor.detach() for key, tensor in model.state_dict().items()})
    with pytest.raises(ValueError, match=f"{name} holds"):
        save_pretrained(model, folder)
    assert contents(folder.parent) == before


def test_what_json_cannot_hold_stops_a_save_before_it_writes(folder):
    before = contents(folder.parent)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_pretrained(make(), folder, training={"tokens": torch.ones(1)})
    assert contents(folder.parent) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_save_that_fails_while_renaming_leaves_the_older_model(folder, monkeypatch, failing):
    before, rename, calls = contents(folder.parent), Path.rename, []

    def broken(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(make(levels=None), folder)
    assert contents(folder.parent) == before


def test_a_save_that_fails_while_writing_leaves_the_older_model(folder, monkeypatch):
    before = contents(folder.parent)

    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError("input/output error")))
    with pytest.raises(OSError, match="input/output error"):
        save_pretrained(make(levels=None), folder)
    assert contents(folder.parent) == before


def test_what_a_killed_save_left_is_cleared_by_the_next(folder):
    shutil.copytree(folder, folder.with_name(".model.new"))
    shutil.copytree(folder, folder.with_name(".model.old"))
    save_pretrained(make(), folder)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]

"""The converter takes weights out of a checkpoint that pickles classes, and runs nothing of it."""

import dataclasses
import enum
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from cayley_interp.convert import convert, main
from cayley_interp.foreign import find_checkpoint, load_foreign, read_checkpoint
from tests.cayley_interp.foreign_writer import (
    corpus,
    model_config,
    small_tokenizer,
    state_dict,
    untrained,
    write_checkpoint,
)


class Mode(enum.Enum):
    CAYLEY = "cayley"


def pickled_config(path: Path) -> Path:
    """A config of classes of a package that the reader does not have, as the published checkpoints hold."""
    model = untrained()
    module = types.ModuleType("sparse_stranger")
    config = dataclasses.make_dataclass(
        "StrangerConfig", list(model_config(model)), namespace={"__module__": module.__name__}
    )
    vars(module).update(StrangerConfig=config, Mode=Mode)
    before = Mode.__module__
    sys.modules[module.__name__] = module
    try:
        Mode.__module__ = module.__name__
        values = model_config(model) | {"sparsity_mode": Mode.CAYLEY}
        return write_checkpoint(path, state_dict(model), config(**values), out_dir=Path("out"))
    finally:
        Mode.__module__ = before
        del sys.modules[module.__name__]


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker: Path) -> dict[str, Attack]:
    return {
        "os.system": Attack(os.system, f"touch {marker}"),
        "eval": Attack(eval, f"open({str(marker)!r}, 'w')"),
        "subprocess": Attack(subprocess.check_call, ["touch", str(marker)]),
    }


def test_a_config_of_foreign_classes_is_refused_then_converted(tmp_path):
    path = pickled_config(tmp_path / "stranger")
    with pytest.raises(
        ValueError, match=r"needs more than weights: .*sparse_stranger\.StrangerConfig.*python -m"
    ) as error:
        read_checkpoint(path)
    assert f"cayley_interp.convert {path} OUT_FOLDER" in str(error.value)
    out = tmp_path / "converted"
    main([str(path), str(out)])
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((out / "config.json").read_text())["model_config"]["sparsity_mode"] == "cayley"
    file = find_checkpoint(out)
    assert file == out / "model.safetensors"
    converted = read_checkpoint(file)
    assert converted.config == model_config(untrained())
    for name, tensor in state_dict(untrained()).items():
        assert torch.equal(converted.tensors[name], tensor), name
    assert "sparse_stranger" not in sys.modules
    assert sorted(p.name for p in tmp_path.iterdir()) == ["converted", "stranger"]


@pytest.mark.parametrize("kind", ["os.system", "eval", "subprocess"])
def test_an_attack_is_refused_by_loading_and_by_converting(tmp_path, kind):
    marker = tmp_path / "marker"
    path = write_checkpoint(
        tmp_path / "evil", state_dict(untrained()), model_config(untrained()), trap=attacks(marker)[kind]
    )
    with pytest.raises(
        ValueError, match=r"needs more than weights: .*(system|eval|check_call).*Nothing of it was executed"
    ):
        load_foreign(path, text=corpus())
    with pytest.raises(ValueError, match=r"would call .*(system|eval|check_call).*nothing is converted"):
        convert(path, tmp_path / "out")
    assert not marker.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil"]
    torch.load(path, weights_only=False)  # the trap was a real one
    assert marker.exists()


def test_an_attack_without_the_zip_is_refused(tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "ckpt.pt"
    path.write_bytes(pickle.dumps(attacks(marker)["os.system"]))
    for attempt in (lambda: load_foreign(path, text=""), lambda: convert(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"not a file of torch\.save, or cut short"):
            attempt()
    assert not marker.exists()


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path):
    path = pickled_config(tmp_path / "stranger")
    (path.parent / "tokenizer.json").write_text("not a tokenizer")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        convert(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stranger"]


def test_the_command_says_what_is_wrong(tmp_path):
    path = write_checkpoint(tmp_path / "plain", state_dict(untrained()), model_config(untrained()))
    with pytest.raises(SystemExit, match=r"error: .*plain is there already"):
        main([str(path), str(tmp_path / "plain")])
    with pytest.raises(SystemExit, match="error: no checkpoint at"):
        main([str(tmp_path / "none.pt"), str(tmp_path / "out")])
    assert (path.parent / "tokenizer.json").read_text() == small_tokenizer().to_str()

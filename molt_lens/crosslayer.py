"""MOLTs that crosslayer-transcoder has trained, as replacements whose outputs are those of its own definition.

    replacement = read_crosslayer(Path("qwen3-4b-molt"), layer=17)      # the folder, or one of its files

https://github.com/Goreg12345/crosslayer-transcoder, model/molt.py; weights: hf.co/georglange/qwen3-4b-molt, 30 layers.
In standardised coordinates, transforms counted group after group:

    z = (x - mean_in) / std_in                     nothing is added to std: it was clamped at 1e-8 when it was saved
    g_t = pre_t where pre_t > theta_t and pre_t > 0, else 0,   pre = z e.weight^T + e.bias
    y = std_out * sum_t g_t (z V_t) U_t + mean_out

`Us.i` [n_i, r_i, d] and `Vs.i` [n_i, d, r_i] hold the transforms of one rank; mean_out is the only output bias. The
tensors do not say which activations they belong to: those of the Hub go from what the MLP's norm reads (`pre_norm_in`)
to what the MLP gives (`mlp_out`).
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from molt_lens.molt import Molt
from molt_lens.standardize import Replacement

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
GATE_NAMES = ("e.weight", "e.bias", "nonlinearity.theta", "nonlinearity.bandwidth")
STANDARDIZER_NAMES = tuple(f"{side}_standardizer.{name}" for side in ("input", "output") for name in ("mean", "std"))

DETECTOR = re.compile(
    r"(?P<wrapper>((_orig_mod|model|module)\.)*)(?P<stack>((molts|layers)\.(?P<layer>\d+)\.)?)e\.weight"
)
"""The name of one map's detector says how all its tensors are called: Lightning puts `model.` in front of all, a stack
of layers `molts.17.` (its MultiLayerMolt) or `layers.17.` in front of each layer's."""
LAYER_IN_NAME = re.compile(r"(?<![A-Za-z0-9])layer[-_]?(\d+)(?![A-Za-z0-9])")


def read_crosslayer(path: Path, layer: int | None = None) -> Replacement:
    """The MOLT of one layer, in eval mode, in the dtype of its weights, at least float32.

    Understood are safetensors and, without unpickling more than weights, Lightning's .ckpt and files of torch.save;
    names as `Us.0`, behind `model.` (Lightning), and behind `molts.17.` or `layers.17.` (all layers in one file). Its
    gates are `reference` ones: theirs to the last bit, thresholds of 0 and less among them.

    Args:
        path: a file, or a folder with one file a layer, in it (`NAME_layer_17.pt`) or one level below
            (`layer-17/checkpoint.safetensors`). A config.json beside a file says its layer, else its name does.
        layer: which of several, counted from 0; needed wherever the file has statistics of several layers and neither
            its config.json nor its name says whose weights it holds.

    Raises:
        FileNotFoundError: no file there.
        ValueError: damaged, in need of code, ambiguous, of another layer, or without the tensors of such a MOLT in
            fitting shapes; a rank above d, which no transform has.
    """
    file = _find_file(path, layer)
    said = _layer_said(file)
    if None not in (said, layer) and said != layer:
        raise ValueError(f"{file} is of layer {said} by its config.json or its name, and layer {layer} was asked for")
    layer = said if layer is None else layer
    try:
        state, layer = _tensors_of_layer(_read_state(file), layer)
        return _replacement(state, layer)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def molt_of_groups(
    Us: Sequence[Float[Tensor, "_ _ d_out"]],
    Vs: Sequence[Float[Tensor, "_ d_in _"]],
    e_weight: Float[Tensor, "unit d_in"],
    e_bias: Float[Tensor, " unit"],
    theta: Float[Tensor, " unit"],
    bandwidth: Float[Tensor, ""],
) -> Molt:
    """A Molt with `reference` gates from that project's parameters, U [n, r, d_out] and V [n, d_in, r] of each rank."""
    counts = [len(U) for U in Us]
    n = math.gcd(*counts)
    ladder = tuple((U.shape[1], count // n) for U, count in zip(Us, counts, strict=True))
    d_in, d_out = Vs[0].shape[1], Us[0].shape[2]
    with torch.device("meta"):  # a random start of what may be a billion parameters would be thrown away
        molt = Molt(d_in, d_out, n=n, gate="reference", ladder=ladder)
    tensors = {
        "U": torch.cat([U.flatten(0, 1) for U in Us]),
        "V": torch.cat([V.mT.flatten(0, 1) for V in Vs]),
        "W_enc": e_weight.clone(),
        "b_enc": e_bias.clone(),
        "b_dec": e_weight.new_zeros(d_out),
        "centre": e_weight.new_zeros(d_in),
        "gate.threshold": theta.clone(),
        "gate.bandwidth": bandwidth.clone(),
    }
    molt.load_state_dict(tensors, assign=True)
    return molt


# ---- Which file ----


def _find_file(path: Path, layer: int | None) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = sorted(f for pattern in ("*", "*/*") for f in path.glob(pattern) if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise FileNotFoundError(f"{path} has no {', '.join(SUFFIXES)} file, nor has a folder in it")
    if len(files) == 1:
        return files[0]
    said = {file: _layer_said(file) for file in files}
    if layer is None:
        layers = sorted({number for number in said.values() if number is not None})
        raise ValueError(f"{path} has {len(files)} checkpoints, of the layers {layers}: say which, layer=...")
    fitting = [file for file in files if said[file] == layer]
    if len(fitting) != 1:
        listed = ", ".join(str(file.relative_to(path)) for file in (fitting or files)[:8])
        raise ValueError(
            f"{path} has {len(fitting)} checkpoints of layer {layer} by their config.json or name ({listed}): give the "
            "path of the one to read"
        )
    return fitting[0]


def _layer_said(file: Path) -> int | None:
    """The layer by the config.json beside the file, by the file's name, or by that of its folder."""
    config = file.with_name("config.json")
    if config.is_file():
        try:
            content = json.loads(config.read_text())
        except ValueError as error:
            raise ValueError(f"{config} is damaged ({error}): download it again") from error
        if isinstance(content, dict) and isinstance(content.get("layer"), int):
            return content["layer"]
    found = LAYER_IN_NAME.findall(file.stem)
    folder = LAYER_IN_NAME.fullmatch(file.resolve().parent.name)
    return int(found[-1]) if found else int(folder[1]) if folder else None


# ---- Which tensors ----


def _read_state(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"damaged or cut short ({error}): download it again") from error
    if not zipfile.is_zipfile(file):
        raise ValueError("no safetensors and not of torch.save, or cut short: download it again")
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        payload = None if needed else torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"damaged ({error}): download it again") from error
    if needed:
        raise ValueError(
            f"needs more than weights: {', '.join(sorted(needed)[:8])}. Nothing of it was executed: have its "
            "state_dict alone written, as safetensors"
        )
    state = payload.get("state_dict", payload) if isinstance(payload, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError("expected a state dict, names to tensors, or one under state_dict")
    return state


def _tensors_of_layer(state: dict[str, Any], layer: int | None) -> tuple[dict[str, Tensor], int | None]:
    """One layer's tensors by their bare names, and its number where that is known."""
    maps = [match for name in state if (match := DETECTOR.fullmatch(name))]
    if not maps:
        raise ValueError(
            "no MOLT of crosslayer-transcoder: expected e.weight, bare or behind model., molts.17. or layers.17.; "
            f"found {', '.join(sorted(state)[:8])}{' ...' if len(state) > 8 else ''}"
        )
    fitting = [m for m in maps if not m["stack"] or layer in (None, int(m["layer"]))]
    if len(fitting) != 1:
        listed = ", ".join(match[0] for match in maps[:8])
        raise ValueError(
            f"has {len(maps)} maps ({listed}), {len(fitting)} of them for layer={layer}: give the layer of one"
        )
    found = fitting[0]
    layer = int(found["layer"]) if found["stack"] else layer
    wrapper, prefix = found["wrapper"], found["wrapper"] + found["stack"]
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    for name in STANDARDIZER_NAMES:  # a stack's layers share theirs, which may be written once
        if name not in tensors and wrapper + name in state:
            tensors[name] = state[wrapper + name]
    _check_names(tensors)
    return tensors, layer


def _check_names(tensors: dict[str, Any]) -> None:
    n_groups = 1 + max((int(n.split(".")[1]) for n in tensors if re.fullmatch(r"[UV]s\.\d{1,3}", n)), default=0)
    groups = [f"{kind}.{i}" for kind in ("Us", "Vs") for i in range(n_groups)]
    expected = {*groups, *GATE_NAMES, *STANDARDIZER_NAMES}
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"lacks {', '.join(missing)}; found {', '.join(sorted(tensors)[:16])}")
    if unknown := sorted(n for n, value in tensors.items() if n not in expected or not isinstance(value, Tensor)):
        raise ValueError(f"has {', '.join(unknown[:8])}, which such a MOLT has not: its outputs would not be these")


# ---- The replacement ----


def _replacement(tensors: dict[str, Tensor], layer: int | None) -> Replacement:
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    n_groups = sum(name.startswith("Us.") for name in tensors)
    Us, Vs = ([tensors[f"{kind}.{i}"].to(dtype) for i in range(n_groups)] for kind in ("Us", "Vs"))
    e_weight, e_bias, theta, bandwidth = (tensors[name].to(dtype) for name in GATE_NAMES)
    d_in, d_out = _check_shapes(Us, Vs, e_weight, e_bias, theta, bandwidth)
    sizes = {"input": d_in, "output": d_out}
    rows = {n: _row(n, tensors[n], sizes[n.split("_")[0]], layer).to(dtype) for n in STANDARDIZER_NAMES}
    named = dict(zip(GATE_NAMES, (e_weight, e_bias, theta, bandwidth), strict=True)) | rows
    named |= {f"{kind}.{i}": t for kind, ts in (("Us", Us), ("Vs", Vs)) for i, t in enumerate(ts)}
    if broken := sorted(name for name, tensor in named.items() if not tensor.isfinite().all()):
        raise ValueError(f"nan or inf in {', '.join(broken)}")
    if flat := sorted(name for name in rows if name.endswith("std") and not (rows[name] > 0).all()):
        raise ValueError(f"{', '.join(flat)} has entries that are not above 0: that project clamps them at 1e-8")
    molt = molt_of_groups(Us, Vs, e_weight, e_bias, theta.flatten(), bandwidth.view(()))
    replacement = Replacement(molt).to(dtype).eval()
    # Not by Standardizer.set, which would take a tiny deviation for none.
    replacement.input.load_state_dict({name: rows[f"input_standardizer.{name}"] for name in ("mean", "std")})
    replacement.output.load_state_dict({name: rows[f"output_standardizer.{name}"] for name in ("mean", "std")})
    return replacement


def _check_shapes(
    Us: list[Tensor], Vs: list[Tensor], e_weight: Tensor, e_bias: Tensor, theta: Tensor, bandwidth: Tensor
) -> tuple[int, int]:
    """d_in and d_out."""
    for i, (U, V) in enumerate(zip(Us, Vs, strict=True)):
        shapes = f"Us.{i} {list(U.shape)}, Vs.{i} {list(V.shape)}"
        if U.ndim != 3 or V.ndim != 3 or len(U) != len(V) or U.shape[1] != V.shape[2] or 0 in (*U.shape, *V.shape):
            raise ValueError(f"{shapes}: expected [n, rank, d] and [n, d, rank]")
        if U.shape[2] != Us[0].shape[2] or V.shape[1] != Vs[0].shape[1]:
            raise ValueError(f"{shapes} are of another width than Us.0 {list(Us[0].shape)}, Vs.0 {list(Vs[0].shape)}")
        if U.shape[1] > min(U.shape[2], V.shape[1]):
            raise ValueError(f"{shapes}: rank {U.shape[1]} is more than a map of this width has, factor it anew")
    n_units, d_in, d_out = sum(len(U) for U in Us), Vs[0].shape[1], Us[0].shape[2]
    if e_weight.shape != (n_units, d_in) or e_bias.shape != (n_units,):
        raise ValueError(
            f"e.weight {list(e_weight.shape)} and e.bias {list(e_bias.shape)}: expected [{n_units}, {d_in}] and "
            f"[{n_units}], one row for each transform in Us"
        )
    if theta.shape not in ((1, n_units), (n_units,)) or bandwidth.numel() != 1:
        raise ValueError(
            f"nonlinearity.theta {list(theta.shape)} and .bandwidth {list(bandwidth.shape)}: expected [1, {n_units}] "
            "and one number"
        )
    return d_in, d_out


def _row(name: str, statistics: Tensor, d: int, layer: int | None) -> Tensor:
    if statistics.shape in ((d,), (1, d)):
        return statistics.view(d)
    if statistics.ndim != 2 or statistics.shape[1] != d:
        raise ValueError(f"{name} is {list(statistics.shape)}: expected [{d}] or [layers, {d}]")
    if layer is None:
        raise ValueError(f"{name} is of {len(statistics)} layers: say which layer these weights are for, layer=...")
    if not 0 <= layer < len(statistics):
        raise ValueError(f"{name} is of the layers 0 to {len(statistics) - 1}, and layer {layer} was asked for")
    return statistics[layer]

"""Gemma Scope: Google DeepMind's transcoders for Gemma 3 (Gemma Scope 2) and Gemma 2, as replacements of a host's MLPs.

    scope = load_gemma_scope("google/gemma-scope-2-270m-pt/transcoder/layer_9_width_16k_l0_small_affine")
    replacement, record = scope.on(host)        # refused where the host is not the model it was trained on
    with spliced(host, {scope.site: replacement}, "replace"):
        host.logits(input_ids)

Both read what the norm before the MLP gives and write what the norm behind it gives:

    acts = pre where pre > threshold and pre > 0, else 0,   pre = x w_enc + b_enc
    y = acts w_dec + b_dec (+ x affine_skip_connection)

in float32 and in raw coordinates: no standardiser. A threshold of at most 0 is that of a ReLU. Thresholds are kept as
logarithms, as all of ours, which moves one by less than 1e-6 of itself. None was trained on special tokens, nor those
for instruction-tuned models of Gemma Scope 2 on the first four positions: see `keep` of `spliced`.
"""

import copy
import json
import re
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from molt_lens.folder import ReplacementRecord
from molt_lens.host_files import fetch
from molt_lens.hosts import Host, Site
from molt_lens.standardize import Replacement
from molt_lens.transcoder import Transcoder

CONFIG, PARAMS, PARAMS_1 = "config.json", "params.safetensors", "params.npz"
SHORTHANDS = {"gemma-scope-2": "google/gemma-scope-2-", "gemma-scope": "google/gemma-scope-"}
GEMMA_OF = {1: 2, 2: 3}
"""Gemma Scope 1 is of Gemma 2, Gemma Scope 2 of Gemma 3."""
HOOKS = {
    "hf_hook_point_in": r"model\.(?:language_model\.)?layers\.(\d+)\.pre_feedforward_layernorm\.output",
    "hf_hook_point_out": r"model\.(?:language_model\.)?layers\.(\d+)\.post_feedforward_layernorm\.output",
}


@dataclass(frozen=True)
class GemmaScope:
    """A transcoder as it was published, not yet anyone's replacement."""

    generation: Literal[1, 2]
    site: Site
    model_name: str | None
    """Which Gemma it was trained on, such as gemma-3-270m or gemma-3-1b-it; None where nothing says so."""
    config: dict[str, Any]
    """Its config.json and where it was read; of Gemma Scope 1, what its path says."""
    transcoder: Transcoder
    """In eval mode, on the CPU. Gemma Scope 1's reads the norm's output without its gain: only `on` makes it fit."""

    def on(self, host: Host) -> tuple[Replacement, ReplacementRecord]:
        """The transcoder as a replacement in this host, and its record.

        Names are compared where the host's ends in one of Google's (`google/gemma-3-1b-it`, `.../gemma-3-270m`); of a
        host by another name, the family and the sizes decide. The weights it was trained on cannot be compared: no
        Gemma Scope says which they were.

        Gemma Scope 1 had the gain of the norm folded into the MLP, so its transcoders read the norm's output before the
        gain. Here w_enc is divided by the host's gain instead: host and transcoder then are what they were.

        Raises:
            ValueError: the host is another model, or has a gain of 0, behind which Gemma Scope 1 saw and we cannot.
        """
        self._check_host(host)
        transcoder = self.transcoder
        if self.generation == 1:
            gain = 1 + host.modules(self.site).input_module.get_parameter("weight").detach().float().cpu()
            if (gain == 0).any():
                raise ValueError(f"{host.name} has a gain of 0 before the MLP of layer {self.site.layer}")
            transcoder = copy.deepcopy(transcoder)
            transcoder.rescale_(gain, torch.ones_like(gain))
        record = ReplacementRecord(
            self.site, asdict(host.names(self.site)), host.name, host.fingerprint, {"gemma_scope": self.config}
        )
        return Replacement(transcoder).eval(), record

    def _check_host(self, host: Host) -> None:
        needed = f"gemma{GEMMA_OF[self.generation]}"
        model_type = str(getattr(getattr(host.model, "config", None), "model_type", None))
        if model_type not in (needed, f"{needed}_text"):
            raise ValueError(
                f"Gemma Scope {self.generation} is of Gemma {GEMMA_OF[self.generation]}, and {host.name} is of "
                f"model_type {model_type}"
            )
        if host.d_model != self.transcoder.d_in or self.site.layer >= host.n_layers:
            raise ValueError(
                f"this Gemma Scope is of layer {self.site.layer} of a model with d_model={self.transcoder.d_in}"
                f"{f' ({self.model_name})' if self.model_name else ''}, and {host.name} has {host.n_layers} layers of "
                f"d_model={host.d_model}"
            )
        name = gemma_name(host.name)
        if None not in (name, self.model_name) and name != self.model_name:
            raise ValueError(
                f"this Gemma Scope was trained on {self.model_name}, and the host is {host.name}: load that"
            )


def load_gemma_scope(source: str | Path, *, revision: str | None = None) -> GemmaScope:
    """A transcoder of Gemma Scope 1 or 2.

    Args:
        source: what `resolve_gemma_scope` takes.
        revision: branch, tag or commit, of what comes from the Hub.

    Raises:
        FileNotFoundError: no such folder, here or on the Hub.
        ValueError: no transcoder, damaged, of the wrong shapes, or with nan or inf.
    """
    folder = resolve_gemma_scope(source, revision=revision)
    try:
        if (folder / PARAMS).is_file():
            config, tensors = _read_config(folder), _read_safetensors(folder / PARAMS)
            _check_config(config, tensors)
            generation, layer = 2, _layer_of_hooks(config)
        else:
            config, tensors = {}, _read_npz(folder / PARAMS_1)
            generation, layer = 1, _layer_of_path(folder)
        transcoder = _transcoder(tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    name = gemma_name(str(config["model_name"])) if "model_name" in config else _model_of_path(folder)
    config = {**config, "source": str(source), "revision": revision}
    return GemmaScope(generation, Site(layer, "pre_norm_out", "post_norm_out"), name, config, transcoder)


def resolve_gemma_scope(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a transcoder, fetched from the Hub where it is not here.

    Args:
        source: a folder with params.safetensors (and config.json) or params.npz; on the Hub OWNER/REPOSITORY/PATH; or,
            for `google/gemma-scope-2-270m-pt/PATH`, `gemma-scope-2:270m-pt/PATH`, and for
            `google/gemma-scope-2b-pt-transcoders/PATH`, `gemma-scope:2b-pt-transcoders/PATH`. Behind `gemma-scope-2:`
            and `gemma-scope:` a folder or a whole id will do too.

    Raises:
        FileNotFoundError: no such folder, here or on the Hub, or no params in it.
        ValueError: a revision of a folder that is here.
    """
    given = str(source)
    prefix, _, rest = given.partition(":")
    if prefix in SHORTHANDS and rest:
        size = re.match(r"\d+[mb]-(pt|it)", rest)
        given = SHORTHANDS[prefix] + rest if size and not Path(rest).is_dir() else rest
    folder = Path(given)
    if folder.is_dir() and revision is not None:
        raise ValueError(f"a revision is one of the Hub, but {folder} is here: leave it out")
    if not folder.is_dir():
        folder = _download(given, revision)
    if not any((folder / name).is_file() for name in (PARAMS, PARAMS_1)):
        raise FileNotFoundError(f"{folder} has neither {PARAMS} (Gemma Scope 2) nor {PARAMS_1} (Gemma Scope 1)")
    return folder


def gemma_name(name: str) -> str | None:
    """Which Gemma the end of a name or path says: `google/gemma-3-270m-pt` -> gemma-3-270m, `.../gemma-3-1b-it` ->
    gemma-3-1b-it. None where it says none."""
    found = re.fullmatch(r"gemma-v?([23])-(\d+[mb])(-pt|-it)?", Path(name).name.lower())
    return found and f"gemma-{found[1]}-{found[2]}{'-it' if found[3] == '-it' else ''}"


# ---- Where it is, and what its path says ----


def _download(name: str, revision: str | None) -> Path:
    owner, _, rest = name.partition("/")
    repository, _, path = rest.partition("/")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*){2,}", name):
        raise FileNotFoundError(
            f"there is no folder {name!r}, and on the Hub a transcoder is OWNER/REPOSITORY/PATH, such as "
            "google/gemma-scope-2-270m-pt/transcoder/layer_9_width_16k_l0_small_affine"
        )
    wanted = [f"{path}/{file}" for file in (CONFIG, PARAMS, PARAMS_1)]
    otherwise = f"{name!r} is no folder here"
    folder = fetch(f"{owner}/{repository}", revision, wanted=wanted, otherwise=otherwise) / path
    if not folder.is_dir():
        raise FileNotFoundError(f"{owner}/{repository} has no folder {path}, or the Hub could not be asked for it")
    return folder


def _layer_of_path(folder: Path) -> int:
    """The releases' paths hold it: transcoder/layer_9_width_16k_l0_small, layer_7/width_16k/average_l0_70."""
    found = re.findall(r"(?<![^/])layer_(\d+)(?=[_/]|$)", "/".join(folder.parts[-3:]))
    if not found:
        raise ValueError("which layer it is of is in the name of its folder (layer_9_...), but this folder's has none")
    return int(found[-1])


def _model_of_path(folder: Path) -> str | None:
    """Which Gemma a repository's name says: gemma-scope-2-270m-pt of Gemma 3, gemma-scope-2b-pt-transcoders of 2."""
    found = re.findall(r"gemma-scope-(2-)?(\d+[mb]-(?:pt|it))", str(folder))
    return gemma_name(f"gemma-{3 if found[-1][0] else 2}-{found[-1][1]}") if found else None


# ---- What is in it ----


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json; some folders of the release have none, and their path says the same."""
    if not (folder / CONFIG).is_file():
        if not folder.parent.name.startswith("transcoder"):
            raise ValueError(f"without {CONFIG}, a folder below transcoder/ or transcoder_all/ is expected")
        layer = f"model.layers.{_layer_of_path(folder)}"
        return {
            "architecture": "jump_relu",
            "hf_hook_point_in": f"{layer}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"{layer}.post_feedforward_layernorm.output",
            "affine_connection": folder.name.endswith("_affine"),
        }
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{CONFIG} is damaged ({error}): download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} holds a {type(config).__name__}, expected an object")
    return config


def _check_config(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if config.get("architecture") != "jump_relu" or config.get("type", "transcoder") != "transcoder":
        raise ValueError(
            f"expected a transcoder of architecture jump_relu, got type {config.get('type')!r} of architecture "
            f"{config.get('architecture')!r}: SAEs, crosscoders and cross-layer transcoders replace no MLP"
        )
    if "width" in config and config["width"] != tensors["b_enc"].numel():
        raise ValueError(f"config.json says width {config['width']}, and b_enc has {tensors['b_enc'].numel()}")
    affine = "affine_skip_connection" in tensors
    if config.get("affine_connection", affine) != affine:
        raise ValueError(
            f"config.json says affine_connection {config['affine_connection']}, and {PARAMS} has "
            f"{'an' if affine else 'no'} affine_skip_connection"
        )


def _layer_of_hooks(config: dict[str, Any]) -> int:
    layers = set()
    for key, pattern in HOOKS.items():
        found = re.fullmatch(pattern, str(config.get(key)))
        if found is None:
            raise ValueError(
                f"{key} is {config.get(key)!r}: expected model.layers.L.pre_feedforward_layernorm.output going in and "
                "model.layers.L.post_feedforward_layernorm.output coming out"
            )
        layers.add(int(found[1]))
    if len(layers) > 1:
        raise ValueError(f"it goes from one layer to another ({sorted(layers)}): no replacement of one MLP")
    return layers.pop()


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} is damaged or cut short, download it again: {error}") from error
    return _checked(tensors)


def _read_npz(file: Path) -> dict[str, Tensor]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name.lower(): torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file.name} is damaged or no archive of plain arrays, download it again: {error}") from error
    return _checked(tensors)


def _checked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float32, once names, shapes and values are right."""
    needed = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
    if tensors.keys() - {"affine_skip_connection"} != needed:
        raise ValueError(
            f"expected {', '.join(sorted(needed))}, perhaps affine_skip_connection, found {', '.join(sorted(tensors))}"
        )
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len(shapes["w_enc"]) != 2:
        raise ValueError(f"w_enc is {shapes['w_enc']}, expected [d_in, width]: a cross-layer transcoder?")
    d, width = shapes["w_enc"]
    expected = {
        "w_enc": [d, width],
        "w_dec": [width, d],
        "b_enc": [width],
        "b_dec": [d],
        "threshold": [width],
        "affine_skip_connection": [d, d],
    }
    if wrong := [
        f"{name} is {shape}, expected {expected[name]}" for name, shape in shapes.items() if shape != expected[name]
    ]:
        raise ValueError("; ".join(wrong))
    if broken := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ValueError(f"nan or inf in {', '.join(broken)}: download it again")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _transcoder(tensors: dict[str, Tensor]) -> Transcoder:
    d, width = tensors["w_enc"].shape
    skip = tensors.get("affine_skip_connection")
    with torch.device("meta"):  # a random start would be thrown away
        transcoder = Transcoder(d, d, n_features=width, gate="jumprelu", skip=skip is not None)
    threshold = tensors["threshold"].double().clamp(min=torch.finfo(torch.float32).tiny)
    state = {
        "W_enc": tensors["w_enc"].T.contiguous(),
        "b_enc": tensors["b_enc"],
        "W_dec": tensors["w_dec"],
        "b_dec": tensors["b_dec"],
        "centre": torch.zeros(d),
        "gate.log_threshold": threshold.log().float(),
        "gate.bandwidth": torch.tensor(0.001),  # of the surrogate gradient that they were trained with
    }
    if skip is not None:
        state["W_skip"] = skip.T.contiguous()
    transcoder.load_state_dict(state, assign=True)
    return transcoder.eval()

"""Foreign checkpoints: nanoGPT's `ckpt.pt`, or safetensors of the same names, as a CayleyGPT.

    model = load_foreign(Path("cayley-small-2L-mlp_in-20B/ckpt.pt"), text=text)

Nothing of the file is executed: it is read with `weights_only`, and one that needs more is refused. What its tensors
are is matched by `foreign_tensors.py`, what its flags leave open is measured by `conventions.py`, and what remains
unclear is refused by name. The model that comes back has our names, our order of features, and its tokenizer.
"""

import hashlib
import json
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from cayley_interp import conventions
from cayley_interp.bottleneck import parse_levels
from cayley_interp.conventions import CHOICES, Bottlenecks, Measured, Reading
from cayley_interp.foreign_tensors import Backbone, match_roles, read_backbone, role_assignments
from cayley_interp.model import CayleyGPT, CayleyGPTConfig
from cayley_interp.tokenizer import gpt2_tokenizer, read_tokenizer, vocab_size

if TYPE_CHECKING:
    from rich.console import Console

CONFIG_KEYS = ("model_config", "model_args", "config")
"""Where a checkpoint keeps its config. Where two differ the first is believed: the model was built from it."""
WRAPPERS = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's
FINGERPRINT_SIZE = 1 << 16  # tensors of up to so many entries are hashed whole


class ForeignCheckpoint(NamedTuple):
    tensors: dict[str, Tensor]
    """By nanoGPT's names, without the prefixes of wrappers."""
    config: dict[str, Any]


class _Settings(NamedTuple):
    """What the config of a foreign checkpoint says."""

    n_heads: int
    levels: str | None
    choices: dict[str, tuple[Any, ...]]
    unread: list[str]
    """Flags of the bottleneck that have no meaning here."""


def find_checkpoint(folder: Path) -> Path | None:
    """The foreign checkpoint file of a folder: `ckpt.pt`, else its only .pt or .safetensors; None if it has none.

    Raises:
        ValueError: there are several.
    """
    config = _read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "n_layers" in config and (folder / "model.safetensors").is_file():
        return None  # our own format
    if (folder / "ckpt.pt").is_file():
        return folder / "ckpt.pt"
    found = sorted(p for p in folder.glob("*") if p.suffix in (".pt", ".safetensors") and p.is_file())
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{folder} has several checkpoints: {names}; give the path of the one to load")
    return found[0] if found else None


def load_foreign(
    checkpoint: Path, *, text: str, published_loss: float | None = None, console: "Console | None" = None
) -> CayleyGPT:
    """The model of a foreign checkpoint in float32 on the CPU, in eval mode, with its tokenizer.

    Args:
        checkpoint: a .pt file, or a .safetensors with its config.json beside it; also a tokenizer.json, else GPT-2's.
        text: at least 8,192 tokens of the kind the model was trained on: readings are told apart by their loss on it.
        published_loss: validation loss in nats per token, shown beside the measured ones.
        console: where the mapping and the losses are printed; by default the terminal.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, unsafe, of another architecture, or not understood; the message says which and why.
    """
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    try:
        found = read_checkpoint(checkpoint)
        return _convert(found, checkpoint, text, published_loss, console)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def read_checkpoint(path: Path) -> ForeignCheckpoint:
    """Tensors and config of a foreign checkpoint; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, needs more than weights, or lacks tensors or config.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    beside = _read_config(path.with_name("config.json")) if path.with_name("config.json").is_file() else {}
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"damaged or not safetensors ({error}): download it again") from error
        payload: dict[str, Any] = {}
    else:
        payload = read_payload(path)
        tensors = payload["model"]
    config: dict[str, Any] = {}
    own = {key: value for key, value in beside.items() if key not in CONFIG_KEYS}
    for source in (own, *(where.get(key) for where in (beside, payload) for key in reversed(CONFIG_KEYS))):
        if isinstance(source, dict):
            config |= _normalised(source)
    if not config:
        raise ValueError(f"no config: expected one of {', '.join(CONFIG_KEYS)} in the file, or a config.json beside it")
    return ForeignCheckpoint(_without_wrappers(tensors), config)


def read_payload(path: Path) -> dict[str, Any]:
    """What a `torch.save` file holds, with a state dict under `model`, by `weights_only`.

    Raises:
        ValueError: damaged, not such a file, or needs more than weights.
    """
    if needed := unsafe_globals(path):
        raise ValueError(
            f"needs more than weights: {', '.join(needed)}. Nothing of it was executed. To take out the weights "
            f"and the plain values of its config, without its code: python -m cayley_interp.convert {path} OUT_FOLDER"
        )
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"cannot be read without running code of its own: {error}") from error
    except (RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"damaged ({error}): download it again") from error
    if not isinstance(payload, dict) or not isinstance(payload.get("model"), dict):
        holds = f"the keys {sorted(map(str, payload))}" if isinstance(payload, dict) else type(payload).__name__
        raise ValueError(f"expected a dict with a state dict under `model`, found {holds}")
    if other := [str(k) for k, v in payload["model"].items() if not isinstance(k, str) or not isinstance(v, Tensor)]:
        raise ValueError(f"`model` must be a state dict, names to tensors; these are not: {', '.join(other[:8])}")
    return payload


def unsafe_globals(path: Path) -> list[str]:
    """Names of the classes and functions a `torch.save` file asks for beyond weights; it is not unpickled for that.

    Raises:
        ValueError: damaged, or not such a file.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("not a file of torch.save, or cut short: download it again, or save it with torch >= 1.6")
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"damaged ({error}): download it again") from error


def _convert(
    found: ForeignCheckpoint, checkpoint: Path, text: str, published_loss: float | None, console: "Console"
) -> CayleyGPT:
    backbone = read_backbone(found.tensors)
    settings = _settings(found.config, backbone)
    tokenizer = _tokenizer(checkpoint, backbone.d_vocab)
    bottlenecks, counters = None, []
    if settings.levels is not None:
        families, counters = match_roles(backbone.rest, parse_levels(settings.levels))
        bottlenecks = Bottlenecks(settings.levels, settings.choices, families)
    elif backbone.rest[0]:
        raise ValueError(
            f"tensors of no known use in every block: {', '.join(backbone.rest[0])}; a vanilla GPT has none, and the "
            "config gives no cayley_levels"
        )
    model = CayleyGPT(
        CayleyGPTConfig(
            n_layers=backbone.n_layers,
            n_heads=settings.n_heads,
            d_model=backbone.d_model,
            n_ctx=backbone.n_ctx,
            d_vocab=backbone.d_vocab,
        )
    ).eval()
    model.load_state_dict(backbone.state | {"head.weight": backbone.state["tok.weight"]})
    reading = _decide(model, bottlenecks, found, checkpoint, tokenizer, text, published_loss, console)
    console.print(_mapping_table(backbone, bottlenecks, reading, counters, settings.unread))
    model.tokenizer = tokenizer
    return model


def _decide(
    model: CayleyGPT,
    bottlenecks: Bottlenecks | None,
    found: ForeignCheckpoint,
    checkpoint: Path,
    tokenizer: Tokenizer,
    text: str,
    published_loss: float | None,
    console: "Console",
) -> Reading | None:
    """Install the reading that was saved, or else measure all and save the best."""
    path, fingerprint = checkpoint.with_name("conventions.json"), _fingerprint(found, checkpoint)
    saved = conventions.saved_conventions(path, fingerprint)
    if saved is not None and bottlenecks is None:
        return None
    if saved is not None and bottlenecks is not None:
        reading = conventions.saved_reading(saved, conventions.possible_readings(model.config, bottlenecks))
        if reading is not None:
            conventions.install(model, bottlenecks, reading)
            return reading
    windows = _windows(tokenizer, text, min(model.config.n_ctx, conventions.WINDOW))
    results: list[Measured] = []
    if bottlenecks is not None:
        results = conventions.identify(model, bottlenecks, windows, console, published_loss)
    losses = results[0].losses if results else conventions.losses_of(model, windows)
    unigram = conventions.check_understood(model, losses, windows)
    summary = {"loss": losses.mean().item(), "unigram_loss": unigram, "published_loss": published_loss}
    console.print(f"loss {summary['loss']:.4f} nats per token, by token frequency alone {unigram:.4f}")
    try:
        conventions.save_conventions(path, fingerprint, results, summary | {"tokens": losses.numel()})
    except OSError as error:
        console.print(f"the conventions could not be saved ({error}): the next load will measure them again")
    return results[0].readings[0] if results else None


# ---- The config ----


def _settings(config: dict[str, Any], backbone: Backbone) -> _Settings:
    """Documented flags fix their reading; those that are missing are searched.

    Raises:
        ValueError: config and tensors disagree, or a value that is not understood.
    """
    actual = {"n_layer": backbone.n_layers, "n_embd": backbone.d_model, "block_size": backbone.n_ctx}
    for key, value in actual.items():
        if config.get(key, value) != value:
            raise ValueError(f"the config says {key} = {config[key]}, its tensors {value}")
    n_heads = config.get("n_head")
    if not isinstance(n_heads, int):
        raise ValueError(f"the config must give n_head, the number of attention heads; found {n_heads!r}")
    declared = config.get("vocab_size", backbone.d_vocab)
    if not isinstance(declared, int) or declared > backbone.d_vocab:  # fewer than the rows is padding
        raise ValueError(f"the config says vocab_size = {declared}, its embedding has {backbone.d_vocab} rows")
    known = {"cayley_levels", "cayley_locations", *_FLAGS}
    unread = [key for key in config if key.startswith("cayley_") and key not in known]
    mode = config.get("sparsity_mode", "cayley" if config.get("cayley_levels") else "none")
    if mode not in ("cayley", "none"):
        raise ValueError(f"sparsity_mode is {mode!r}, expected cayley or none")
    if mode == "none":
        return _Settings(n_heads, None, CHOICES, unread)
    locations = config.get("cayley_locations", "mlp_in")
    if locations not in ("mlp_in", ["mlp_in"], ("mlp_in",)):
        raise ValueError(f"cayley_locations is {locations!r}: only mlp_in is supported")
    choices = dict(CHOICES)
    for flag, (choice, meanings) in _FLAGS.items():
        if (value := config.get(flag)) is None:
            continue
        if not isinstance(value, bool):
            raise ValueError(f"{flag} is {value!r}, expected true or false")
        choices[choice] = meanings[value]
    return _Settings(n_heads, _levels(config.get("cayley_levels")), choices, unread)


_FLAGS: dict[str, tuple[str, dict[bool, tuple[Any, ...]]]] = {
    "cayley_per_parent_budget": ("routing", {True: ("per_parent",), False: ("parents",)}),
    "cayley_score_standardize": ("score_standardize", {True: ("feature", "token"), False: ("none",)}),
    "cayley_forward_standardized": ("forward_standardized", {True: (True,), False: (False,)}),
}


def _levels(levels: Any) -> str:
    if isinstance(levels, (list, tuple)) and all(isinstance(level, (list, tuple)) for level in levels):
        levels = ";".join(",".join(str(number) for number in level) for level in levels)
    if not levels or not isinstance(levels, str):
        raise ValueError(
            'the config must give cayley_levels, as [[10, 16, 0], [15, 32, 256]] or "10,16,0;15,32,256"; '
            f"found {levels!r}"
        )
    return ";".join(",".join(str(number) for number in level) for level in parse_levels(levels))


def _normalised(config: dict[str, Any]) -> dict[str, Any]:
    """Keys with underscores; a key spelled twice must say the same twice."""
    normalised: dict[str, Any] = {}
    for key, value in config.items():
        name = str(key).replace("-", "_")
        if name in normalised and normalised[name] != value:
            raise ValueError(f"the config gives {name} twice: {normalised[name]!r} and {value!r}")
        normalised[name] = value
    return normalised


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(config).__name__}")
    return config


# ---- Names, tokens, and what is shown ----


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        while short.startswith(WRAPPERS):
            short = short.split(".", 1)[1]
        if short in plain:
            raise ValueError(f"there are two tensors {short}, with and without a prefix of {', '.join(WRAPPERS)}")
        plain[short] = tensor
    return plain


def _tokenizer(checkpoint: Path, d_vocab: int) -> Tokenizer:
    path = checkpoint.with_name("tokenizer.json")
    tokenizer = read_tokenizer(path) if path.is_file() else gpt2_tokenizer()
    size = vocab_size(tokenizer)
    if size > d_vocab:
        which = "tokenizer.json" if path.is_file() else "GPT-2's tokenizer (there is no tokenizer.json beside it)"
        raise ValueError(
            f"{which} has {size} entries, but the embedding has {d_vocab} rows: put the model's own tokenizer.json "
            "beside the checkpoint"
        )
    return tokenizer


def _windows(tokenizer: Tokenizer, text: str, length: int) -> Int64[Tensor, "n window"]:
    """Enough windows of the text for N_TOKENS predicted tokens."""
    n = -(-conventions.N_TOKENS // length)
    needed = n * (length + 1)
    # A token is rarely more than a few characters, and a whole corpus need not be encoded for so few of them.
    ids = tokenizer.encode(text[: 40 * needed], add_special_tokens=False).ids
    if len(ids) < needed:
        raise ValueError(f"the readings are told apart on {needed:,} tokens of text, but it has only {len(ids):,}")
    return torch.tensor(ids[:needed]).view(n, length + 1)


def _fingerprint(found: ForeignCheckpoint, checkpoint: Path) -> str:
    """Changes with the size, names, shapes, config and small tensors of a checkpoint."""
    config = json.dumps(found.config, sort_keys=True, default=str)
    digest = hashlib.sha256(f"{checkpoint.stat().st_size} {config}".encode())
    for name, tensor in sorted(found.tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() <= FINGERPRINT_SIZE:
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _mapping_table(
    backbone: Backbone, bottlenecks: Bottlenecks | None, reading: Reading | None, counters: list[str], unread: list[str]
):
    from rich.table import Table

    table = Table(title=f"{backbone.n_layers} blocks, d_model {backbone.d_model}, d_vocab {backbone.d_vocab}")
    for column in ("in the file", "here", "decided by"):
        table.add_column(column)
    for theirs, ours in backbone.mapping:
        table.add_row(theirs, ours, "name")
    if bottlenecks is not None and reading is not None:
        assignments = role_assignments(bottlenecks.families)
        for i, family in enumerate(bottlenecks.families):
            by = "name" if family.named else "values" if len({a[i] for a in assignments}) == 1 else "loss"
            here = "std = sqrt(var)" if reading.roles[i] == "var" else reading.roles[i]
            table.add_row(" + ".join(f"transformer.h.*.{n}" for n in family.names), f"layers.*.sparse.{here}", by)
        conventions_used = {k: v for k, v in asdict(reading).items() if k in CHOICES}
        table.caption = ", ".join(f"{name} {value}" for name, value in conventions_used.items())
    for name in counters:
        table.add_row(f"transformer.h.*.{name}", "ignored: a counter", "name")
    for key in unread:
        table.add_row(f"config {key}", "ignored: no known meaning", "")
    return table

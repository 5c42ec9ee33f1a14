"""The folder of a replacement: `config.json` and `model.safetensors`, written whole and read with every check.

config.json says what the map is, and which activations of which host it goes from and to. A replacement fed another
tensor than the one it was trained on gives numbers that look like numbers: `check_site` refuses.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from molt_lens.hosts import Host, Site
from molt_lens.maps import make_map
from molt_lens.standardize import Replacement

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class ReplacementRecord:
    """What is known of a replacement beside its weights."""

    site: Site
    hooks: dict[str, str]
    """`hf_input`, `hf_target`, `tl_input`, `tl_target`: the site by its names in transformers and TransformerLens."""
    host_name: str
    host_fingerprint: str
    training: dict[str, Any] | None


def save_replacement(
    replacement: Replacement,
    folder: Path,
    *,
    host: Host,
    site: Site,
    training: dict[str, Any] | None = None,
    matrices: torch.dtype | None = None,
) -> None:
    """Write the folder; an older one is replaced only by a whole new one.

    Args:
        matrices: dtype in which matrices are stored, bfloat16 for half the size; vectors and statistics keep theirs,
            and the replacement is loaded in float32 again.

    Raises:
        ValueError: something else is there, or in it, which would be lost; or the host has no such site.
    """
    if folder.exists() and not _is_replaceable(folder):
        raise ValueError(f"{folder} holds something else than a replacement: choose another, nothing was written")
    record = ReplacementRecord(site, asdict(host.names(site)), host.name, host.fingerprint, training)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in replacement.state_dict().items()}
        if matrices is not None:
            weights = {name: t.to(matrices) if t.ndim > 1 else t for name, t in weights.items()}
        save_file(weights, temporary / WEIGHTS)
        content = {"format": FORMAT, "map": replacement.map.config(), **asdict(record)}
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        for file in temporary.iterdir():
            file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        temporary.chmod(0o755)
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_replaceable(folder: Path) -> bool:
    """Whether nothing is lost with it: it is empty, or has the two files of a replacement and nothing else.

    A host's folder has files of the same names.
    """
    if not folder.is_dir():
        return False
    names = {entry.name for entry in folder.iterdir()}
    if CONFIG not in names:
        return not names
    try:
        content = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return names <= {CONFIG, WEIGHTS} and isinstance(content, dict) and content.keys() >= {"format", "map", "site"}


def _put_in_place(new: Path, folder: Path) -> None:
    """Rename; an older folder is deleted only after that."""
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_name(new.name + "-old")
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def load_replacement(folder: Path) -> tuple[Replacement, ReplacementRecord]:
    """A replacement in eval mode, and what is known of it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the two do not fit each other.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no replacement's folder: it has no {name}")
    try:
        content = json.loads((folder / CONFIG).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, and this version reads {FORMAT}")
        replacement = Replacement(make_map(content["map"]))
        record = ReplacementRecord(
            Site(**content["site"]),
            content["hooks"],
            content["host_name"],
            content["host_fingerprint"],
            content["training"],
        )
    except (UnicodeDecodeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a replacement: {error!r}") from error
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or cut short, save it again: {error}") from error
    if broken := sorted(name for name, tensor in weights.items() if not tensor.isfinite().all()):
        raise ValueError(f"{folder / WEIGHTS} holds nan or inf in {', '.join(broken)}")
    dtypes = {tensor.dtype for tensor in weights.values()}
    try:
        if len(dtypes) == 1:  # float64 would be rounded to what a new map is made in
            replacement.to(dtype=dtypes.pop())
        replacement.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder / WEIGHTS} is not of the map that {CONFIG} describes: {error}") from error
    return replacement.eval(), record


def check_site(record: ReplacementRecord, host: Host) -> None:
    """Whether a replacement belongs to this host.

    Raises:
        ValueError: it was trained on other weights, or its site has other names here.
    """
    if record.host_fingerprint != host.fingerprint:
        raise ValueError(
            f"this replacement was trained on {record.host_name} (fingerprint {record.host_fingerprint[:12]}), and "
            f"{host.name} has other weights (fingerprint {host.fingerprint[:12]}): load the host that it was made for"
        )
    if (here := asdict(host.names(record.site))) != record.hooks:
        raise ValueError(f"its activations are {record.hooks}, and those of {host.name} at {record.site} are {here}")

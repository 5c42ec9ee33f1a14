"""Hosts and their replacements by name, as a command line gives them."""

from pathlib import Path

import torch

from cayley_interp.folder import is_model_folder
from cayley_interp.pretrained import bundled_models, load_pretrained
from molt_lens import Replacement
from molt_lens.hosts import Host, Site, load_host
from molt_lens.opening import open_replacement


def open_host(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Host:
    """A host by name: a CayleyGPT where cayley_interp knows it, a run of one included, else what molt_lens finds.

    Raises:
        FileNotFoundError, ImportError, ValueError: what `load_pretrained` and `load_host` raise.
    """
    path = Path(name)
    if name in bundled_models() or is_model_folder(path) or is_model_folder(path / "model"):
        host = load_host(load_pretrained(name, wrap=None), device=device, dtype=dtype)
        host.name = name  # a module knows its class only
        return host
    return load_host(name, device=device, dtype=dtype)


def open_replacements(names: tuple[str, ...], host: Host) -> dict[Site, Replacement]:
    """Replacements by name, each at the site that it was made for.

    Raises:
        FileNotFoundError, ValueError: what `open_replacement` raises, or two of one layer.
    """
    replacements: dict[Site, Replacement] = {}
    for name in names:
        replacement, record = open_replacement(name, host)
        if record.site.layer in {site.layer for site in replacements}:
            raise ValueError(f"{name} is the second replacement of layer {record.site.layer}: give one a layer")
        replacements[record.site] = replacement
    return replacements

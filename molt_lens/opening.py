"""A replacement by name, for a host: one of the package, a run's or replacement's folder, or a Gemma Scope id."""

from pathlib import Path

from molt_lens.folder import CONFIG, WEIGHTS, ReplacementRecord, check_site, load_replacement
from molt_lens.gemma_scope import PARAMS, PARAMS_1, load_gemma_scope
from molt_lens.hosts import Host
from molt_lens.standardize import Replacement

BUNDLED = Path(__file__).parent / "bundled"


def bundled_replacements() -> list[str]:
    """Names of the replacements that come with the package."""
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / CONFIG).is_file())


def place_of(name: str | Path) -> Path:
    """The folder of a replacement of the package; of another name, that as a path."""
    return BUNDLED / name if str(name) in bundled_replacements() else Path(name)


def open_replacement(name: str | Path, host: Host) -> tuple[Replacement, ReplacementRecord]:
    """A replacement in eval mode on the host's device, and what is known of it.

    Args:
        name: of `bundled_replacements()`; a run's folder, whose model/ is meant; a replacement's own; or what
            `load_gemma_scope` takes.

    Raises:
        FileNotFoundError: a folder without a replacement, or neither a folder nor an id on the Hub.
        ValueError: it is damaged, or belongs to another host.
    """
    path = place_of(name)
    folder = next((f for f in (path / "model", path) if (f / CONFIG).is_file() and (f / WEIGHTS).is_file()), None)
    if folder is not None:
        replacement, record = load_replacement(folder)
    elif path.is_dir() and not any((path / file).is_file() for file in (PARAMS, PARAMS_1)):
        raise FileNotFoundError(
            f"{path} holds no replacement: neither model/ of a run that has ended, nor {CONFIG} and {WEIGHTS} of a "
            f"replacement, nor {PARAMS} or {PARAMS_1} of Gemma Scope. A run that was stopped goes on with --resume"
        )
    else:
        replacement, record = load_gemma_scope(name).on(host)
    check_site(record, host)
    return replacement.to(host.device), record

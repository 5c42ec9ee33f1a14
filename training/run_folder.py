"""The first files of a run's folder: its complete config, and where it ran."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cayley_interp.files import write_atomically
from training.environment import describe_environment

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def start_folder(config: "DataclassInstance", run_dir: Path, device: torch.device, processes: int) -> None:
    """Make the folder, with config.json and environment.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(str(device)) | {"processes": processes}
    for name, content in (("environment.json", environment), ("config.json", asdict(config))):
        write_atomically(run_dir / name, json.dumps(content, indent=2, default=str) + "\n")

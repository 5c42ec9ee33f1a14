"""What a run ran on: versions, commit, device and command line, for `environment.json`.

Environment variables are left out on purpose: they hold secrets, and run folders are shared.
"""

import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cayley_interp.kernels import backend, has_triton
from training.threads import available_cpus, flushes_denormals

PACKAGES = (
    *("torch", "numpy", "triton", "safetensors", "jaxtyping", "accelerate", "tokenizers", "datasets"),
    *("pyarrow", "psutil", "tyro", "wandb", "trackio", "cayley-interp"),
)


def describe_environment(device: str) -> dict[str, Any]:
    """The machine and the software of this process, ready for JSON; what is not installed or not there is null.

    Args:
        device: a torch device that exists, such as `cpu`, `cuda` or `cuda:1`.
    """
    torch_device = torch.device(device)
    gpu = _gpu(torch_device) if torch_device.type == "cuda" else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        **git_state(Path(__file__).parent),
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "count": os.cpu_count(),
            "available": available_cpus(),
            "torch_threads": torch.get_num_threads(),
            "flush_denormal": flushes_denormals(),
        },
        "device": f"{gpu['name'] if gpu else cpu_model()} ({device})",
        "gpu": gpu,
        "kernels": {"backend": backend(), "triton": has_triton()},
    }


def git_state(folder: Path) -> dict[str, Any]:
    """`commit` of the checkout and whether its files differ from it (`dirty`); both None outside a checkout."""
    status = _git(folder, "status", "--porcelain")
    if status is None:
        return {"commit": None, "dirty": None}
    return {"commit": _git(folder, "rev-parse", "--verify", "HEAD"), "dirty": bool(status)}


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def peak_resident_memory() -> int:
    """Bytes: the largest resident size this process has had.

    Not getrusage's figure where /proc has a better one: Linux passes that on through exec, so that a child of a large
    process starts with its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return 1024 * int(peak[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()

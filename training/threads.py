"""Threads and denormals of a training process on a CPU: as many threads as there are processors for it, all flushing.

torch starts a thread for every processor of the machine. Where a container has a quota of them, a process is bound to
a few, or several processes share a machine, that is more than can run, and they wait for each other in every operation.
"""

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def set_up_threads(device: str) -> None:
    """On a CPU flush denormals in every thread, and start no more than can run; OMP_NUM_THREADS has the last word.

    At the start of a process: each thread has a flag of its own, which it takes over from the thread that starts it.
    """
    if device != "cpu":
        return
    torch.set_flush_denormal(True)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def available_cpus(cgroup: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """Processors that this process may keep busy: those it is bound to, within the quota of its container.

    A quota of 2.5 processors is 2: a third thread would be throttled, and the others would wait for it.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *cpu_quotas(cgroup, membership)])))


def cpu_quotas(cgroup: Path, membership: Path) -> list[float]:
    """Processors allowed by each control group around this process, of version 2 and of version 1; [] without limits.

    A container sees its own group as the root of the file system, whatever its path; elsewhere the path leads there.
    """
    lines = membership.read_text().splitlines() if membership.exists() else []
    paths = {controllers: Path(path.lstrip("/")) for _, controllers, path in (line.split(":", 2) for line in lines)}
    unified = paths.get("", Path())
    v1 = next((path for controllers, path in paths.items() if "cpu" in controllers.split(",")), Path())
    quotas = []
    for folder in (cgroup / group for group in (unified, *unified.parents)):
        quotas += _quota(_numbers(folder / "cpu.max"))
    for folder in (cgroup / "cpu" / group for group in (v1, *v1.parents)):
        quotas += _quota(_numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us"))
    return quotas


def flushes_denormals() -> bool:
    """Whether this thread does, by trying."""
    return bool(torch.tensor(2.0**-126) * 0.5 == 0)


def _quota(numbers: list[str]) -> list[float]:
    """Microseconds of processor time and the period they are for; `max`, or -1 in version 1, is no limit."""
    if len(numbers) != 2 or numbers[0] in ("max", "-1"):
        return []
    return [int(numbers[0]) / int(numbers[1])]


def _numbers(file: Path) -> list[str]:
    return file.read_text().split() if file.is_file() else []

"""As many threads as processors that are really there, and all of them flush denormals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.threads import available_cpus, cpu_quotas


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", [1.5]),
        ({"cpu.max": "max 100000\n"}, "0::/\n", []),
        (
            {"user.slice/job/cpu.max": "300000 100000\n", "user.slice/cpu.max": "max 100000\n"},
            "0::/user.slice/job",
            [3],
        ),
        ({"user.slice/job/cpu.max": "max 100000", "user.slice/cpu.max": "50000 100000"}, "0::/user.slice/job", [0.5]),
        ({"cpu.max": "200000 100000"}, "0::/docker/not/here", [2]),  # a container whose path is the host's
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3:cpu,cpuacct:/\n0::/", [4]),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3:cpu,cpuacct:/", []),
        ({"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "50000"}, "4:memory:/b\n3:cpu:/a", [2]),
        ({}, "", []),
    ],
)
def test_quotas_of_control_groups(tmp_path, files, membership, expected):
    cgroup = write(tmp_path / "cgroup", files)
    assert cpu_quotas(cgroup, write(tmp_path, {"self": membership}) / "self") == expected


def test_a_quota_below_a_processor_is_one(tmp_path):
    assert available_cpus(write(tmp_path, {"cpu.max": "10000 100000"}), tmp_path / "none") == 1


def test_without_a_quota_it_is_the_processors_bound_to(tmp_path):
    assert available_cpus(tmp_path, tmp_path / "none") == len(os.sched_getaffinity(0))


def in_a_process(code: str, **variables: str) -> str:
    """Its output, bound to one processor of this process's, or to all if it does not ask."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)} | variables
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


SET_UP = (
    "import os, torch; from training.threads import *; {before}; set_up_threads('cpu'); print(torch.get_num_threads())"
)


def test_a_process_bound_to_one_processor_starts_one_thread():
    before = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    assert in_a_process(SET_UP.format(before=before)) == "1"
    assert in_a_process(SET_UP.format(before=before), OMP_NUM_THREADS="2") == "2"  # the user's word


def test_processes_of_one_machine_share_its_processors():
    expected = max(1, available_cpus() // 2)
    assert in_a_process(SET_UP.format(before="pass"), LOCAL_WORLD_SIZE="2") == str(expected)


def test_every_thread_flushes_denormals():
    code = (
        "import torch; from training.threads import *; {}; x = torch.full((1 << 22,), 1.2e-38); "
        "print(int((x * 0.5 != 0).sum()), flushes_denormals())"
    )
    assert in_a_process(code.format("set_up_threads('cpu')"), OMP_NUM_THREADS="2") == "0 True"
    assert in_a_process(code.format("pass"), OMP_NUM_THREADS="2") == f"{1 << 22} False"

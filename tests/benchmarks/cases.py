"""The benchmarks by name, in the order of their page."""

from tests.benchmarks import (
    bench_activations,
    bench_bottleneck,
    bench_jacobian,
    bench_loading,
    bench_molt,
    bench_training,
    bench_walsh,
)
from tests.benchmarks.measure import Group

MODULES = {
    "walsh": bench_walsh,
    "bottleneck": bench_bottleneck,
    "training": bench_training,
    "molt": bench_molt,
    "jacobian": bench_jacobian,
    "activations": bench_activations,
    "loading": bench_loading,
}


def groups_of(device: str) -> list[Group]:
    """Of all benchmarks; nothing of a device is touched."""
    return [group for module in MODULES.values() for group in module.groups(device)]


def notes() -> list[str]:
    return [note for module in MODULES.values() for note in module.NOTES]

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

MODULES = {
    "walsh": bench_walsh,
    "bottleneck": bench_bottleneck,
    "training": bench_training,
    "molt": bench_molt,
    "jacobian": bench_jacobian,
    "activations": bench_activations,
    "loading": bench_loading,
}

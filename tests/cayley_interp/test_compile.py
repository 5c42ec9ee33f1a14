"""A compiled model is one graph, without breaks, and equals the eager one: values, gradients and batch statistics."""

import json
import sys

import pytest

from tests.cayley_interp.compiled import VARIANTS
from tests.helpers import needs_triton, run


def outcomes(backend: str, *names: str) -> dict[str, int | str]:
    """Of each variant the number of graphs compiled in training, or the traceback of what differed."""
    interpreter = "TRITON_INTERPRET=1"  # of kernels, where one of the names asks for them
    result = run(["env", interpreter, sys.executable, "-m", "tests.cayley_interp.compiled", backend, *names])
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def traced() -> dict[str, int | str]:
    return outcomes("aot_eager", *VARIANTS, "tables", "kernels")


@pytest.mark.parametrize("name", VARIANTS)
def test_one_graph_equals_eager(traced, name):
    assert traced[name] == 1, traced[name]


def test_the_tables_are_not_made_in_the_graph(traced):
    assert isinstance(traced["tables"], int), traced["tables"]
    assert traced["tables"] < 400


@needs_triton
def test_kernels_are_no_graph_break(traced):
    assert traced["kernels"] == 1, traced["kernels"]


@pytest.mark.slow
def test_one_graph_equals_eager_as_native_code():
    assert outcomes("inductor", "per_parent") == {"per_parent": 1}

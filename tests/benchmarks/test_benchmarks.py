"""The benchmarks' own arithmetic: what is compared, what a row says, what is kept of a device that is not here."""

from collections import Counter
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks import __main__ as command
from tests.benchmarks import measure as measure_module
from tests.benchmarks import results
from tests.benchmarks.cases import groups_of
from tests.benchmarks.measure import Bound, Group, bound_seconds, gemm_rate, measure


@pytest.fixture
def sleeper(monkeypatch):
    """Cases whose calls take exactly as long as they say, the last one again and again, by a clock of their own."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(measure_module, "time", clock)

    def make(*seconds: float, tokens: int | None = None):
        lengths = chain(seconds, repeat(seconds[-1]))

        def call() -> int | None:
            clock.now += next(lengths)
            return tokens

        return lambda: call

    return make


def broken():
    raise RuntimeError("no kernel image\nis available")


def group(**cases) -> Group:
    return Group("sleep", "one", "fp32", cases, tokens=100, rounds=3)


def test_a_case_is_compared_with_the_first(sleeper):
    slow, fast = measure(group(slow=sleeper(0.04), fast=sleeper(0.01)), "cpu")
    assert slow["ratio"] == 1
    assert fast["ratio"] == pytest.approx(4)
    assert fast["tokens_per_second"] == pytest.approx(10_000)
    assert [fast["ms"], *fast["ms_range"]] == pytest.approx([10, 10, 10])


def test_a_figure_is_the_median_and_has_its_range(sleeper):
    to_warm_up = 0.9, 0.8
    (row,) = measure(group(uneven=sleeper(*to_warm_up, 0.01, 0.05, 0.02)), "cpu")
    assert [row["ms"], *row["ms_range"]] == pytest.approx([20, 10, 50])


def test_cases_that_go_through_different_numbers_are_compared_by_the_token(sleeper):
    cases = {"slow": sleeper(0.02, tokens=10), "fast": sleeper(0.02, tokens=40)}
    slow, fast = measure(Group("sleep", "one", "fp32", cases, Bound(flops=1e9), tokens=40, rounds=3), "cpu")
    assert fast["ratio"] == pytest.approx(4)
    assert fast["of_bound"] == pytest.approx(4 * slow["of_bound"])
    assert fast["of_bound"] == pytest.approx(1e9 / gemm_rate("cpu", "fp32") / 0.02)


def test_the_slower_bound_counts():
    copied = Group("", "", "fp32", {}, Bound(bytes=2**24))
    multiplied = Group("", "", "fp32", {}, Bound(bytes=2, flops=1e9))
    assert bound_seconds(copied, "cpu")[0] == "copy"
    assert bound_seconds(multiplied, "cpu") == ("GEMM", 1e9 / gemm_rate("cpu", "fp32"))


def test_what_fails_says_so_and_the_others_go_on(sleeper, tmp_path):
    rows = measure(group(slow=sleeper(0.01), broken=broken, fast=sleeper(0.01)), "cpu")
    assert rows[1]["error"] == "RuntimeError: no kernel image"
    assert rows[2]["ratio"] == pytest.approx(1)
    own = {"cpu": [group(slow=broken, broken=broken, fast=broken)], "cuda": [group(slow=broken, fast=broken)]}
    results.write(tmp_path, results.merged(results.read(tmp_path), rows, "cpu", "make bench", own), ["A note."])
    page = (tmp_path / "bench.md").read_text()
    assert "| broken | failed: RuntimeError: no kernel image |" in page
    assert "| one | fp32 | cuda | slow; fast | **not run** |" in page
    assert "cuda: **2 of 2 rows have not been run**; `make bench-gpu` runs them." in page
    assert "- A note." in page


def test_rows_of_another_device_and_of_other_benchmarks_stay(sleeper, tmp_path):
    first = group(slow=sleeper(0.04), fast=sleeper(0.01))
    other = Group("wait", "one", "fp32", {"slow": sleeper(0.01)}, rounds=1)
    groups = {"cpu": [first, other], "cuda": []}
    for one in (first, other):
        found = results.merged(results.read(tmp_path), measure(one, "cpu", 1), "cpu", "make bench", groups)
        results.write(tmp_path, found, [])
    assert [row["operation"] for row in results.read(tmp_path)["rows"] if "ms" in row] == ["sleep", "sleep", "wait"]
    without = results.merged(results.read(tmp_path), [], "cpu", "make bench", {"cpu": [other], "cuda": []})
    assert [row["operation"] for row in without["rows"]] == ["wait"]  # a benchmark that is no more leaves no row


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_groups_can_be_listed_without_the_device(device):
    groups = groups_of(device)
    keys = Counter((group.operation, group.shape, group.dtype) for group in groups)
    assert set(keys.values()) == {1}
    assert all(len(group.cases) > 1 for group in groups)
    needed = {"Walsh-Hadamard transform", "Sparse layer, forward + backward", "Training step", "Jacobian faithfulness"}
    assert needed <= {group.operation for group in groups}


def test_without_a_gpu_its_benchmarks_say_so(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert command.main(command.Bench(device="cuda", out=tmp_path)) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_benchmark_runs_and_is_written(tmp_path):
    assert command.main(command.Bench(only=["walsh", "loading"], rounds=1, out=tmp_path)) == 0
    rows = [row for row in results.read(tmp_path)["rows"] if "ms" in row]
    assert {row["operation"] for row in rows} == {"Walsh-Hadamard transform", "Start of a process"}
    assert all(row["command"] == "make bench" and row["hardware"] for row in rows)

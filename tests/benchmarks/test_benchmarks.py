"""The benchmarks' own arithmetic: what is compared, what a row says, what is kept of a device that is not here."""

import time
from collections import Counter

import pytest
import torch

from tests.benchmarks import __main__ as command
from tests.benchmarks import results
from tests.benchmarks.cases import groups_of
from tests.benchmarks.measure import Bound, Group, bound_seconds, gemm_rate, measure


def sleeper(seconds: float, tokens: int | None = None):
    def call() -> int | None:
        time.sleep(seconds)
        return tokens

    return lambda: call


def broken():
    raise RuntimeError("no kernel image\nis available")


def group(**cases) -> Group:
    return Group("sleep", "one", "fp32", cases or {"slow": sleeper(0.04), "fast": sleeper(0.01)}, tokens=100, rounds=3)


def test_a_case_is_compared_with_the_first():
    slow, fast = measure(group(), "cpu")
    assert slow["ratio"] == 1
    assert fast["ratio"] == pytest.approx(4, rel=0.2)
    assert fast["tokens_per_second"] == pytest.approx(10_000, rel=0.2)
    assert fast["ms_range"][0] <= fast["ms"] <= fast["ms_range"][1]


def test_cases_that_go_through_different_numbers_are_compared_by_the_token():
    cases = {"slow": sleeper(0.02, tokens=10), "fast": sleeper(0.02, tokens=40)}
    slow, fast = measure(Group("sleep", "one", "fp32", cases, Bound(flops=1e9), tokens=40, rounds=3), "cpu")
    assert fast["ratio"] == pytest.approx(4, rel=0.2)
    assert fast["of_bound"] == pytest.approx(4 * slow["of_bound"], rel=0.2)
    assert fast["of_bound"] == pytest.approx(1e9 / gemm_rate("cpu", "fp32") / 0.02, rel=0.2)


def test_the_slower_bound_counts():
    copied = Group("", "", "fp32", {}, Bound(bytes=2**24))
    multiplied = Group("", "", "fp32", {}, Bound(bytes=2, flops=1e9))
    assert bound_seconds(copied, "cpu")[0] == "copy"
    assert bound_seconds(multiplied, "cpu") == ("GEMM", 1e9 / gemm_rate("cpu", "fp32"))


def test_what_fails_says_so_and_the_others_go_on(tmp_path):
    rows = measure(group(slow=sleeper(0.01), broken=broken, fast=sleeper(0.01)), "cpu")
    assert rows[1]["error"] == "RuntimeError: no kernel image"
    assert rows[2]["ratio"] == pytest.approx(1, rel=0.2)
    own = {"cpu": [group(slow=broken, broken=broken, fast=broken)], "cuda": [group()]}
    results.write(tmp_path, results.merged(results.read(tmp_path), rows, "cpu", "make bench", own), ["A note."])
    page = (tmp_path / "bench.md").read_text()
    assert "| broken | failed: RuntimeError: no kernel image |" in page
    assert "| one | fp32 | cuda | slow; fast | **not run** |" in page
    assert "cuda: **2 of 2 rows have not been run**; `make bench-gpu` runs them." in page
    assert "- A note." in page


def test_rows_of_another_device_and_of_other_benchmarks_stay(tmp_path):
    first, other = group(), Group("wait", "one", "fp32", {"slow": sleeper(0.01)}, rounds=1)
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

"""What a replacement's run is told before its first step: memory by kind, and the largest size that fits."""

from dataclasses import replace

import pytest

from tests.molt_lens.host_models import tiny_host
from training.molt_preflight import estimate_molt_memory, preflight_size
from training.molt_recipes import MOLT_RECIPES
from training.preflight import PreflightError

CONFIG = MOLT_RECIPES["gemma-3-270m-L9-N1"][1]
GATES = {"molt": "batchtopk:4", "transcoder": "batchtopk:32", "mxd": "topk:32"}


@pytest.mark.parametrize("kind", GATES)
def test_maps_of_as_many_parameters_need_the_same_memory(kind):
    molt = estimate_molt_memory(CONFIG, 640, 10**10)
    memory = estimate_molt_memory(replace(CONFIG, kind=kind, gate=GATES[kind]), 640, 10**10)
    assert memory.parameters == pytest.approx(molt.parameters, rel=2e-3)
    assert memory.step == pytest.approx(molt.step, rel=2e-3)


def test_the_largest_n_fits_and_one_more_does_not():
    available = 2 * 10**9
    largest = estimate_molt_memory(CONFIG, 640, available).largest_n
    assert estimate_molt_memory(replace(CONFIG, n=largest), 640, available).needed <= available
    assert estimate_molt_memory(replace(CONFIG, n=largest + 1), 640, available).needed > available


def test_nothing_fits_beside_a_buffer_that_is_too_large():
    assert estimate_molt_memory(CONFIG, 640, 10**8).largest_n == 0


def test_a_size_that_does_not_fit_is_refused_with_one_that_does(tmp_path, monkeypatch):
    monkeypatch.setattr("training.molt_preflight.available_memory", lambda *_: 10**8)
    with pytest.raises(PreflightError, match=r"--n 50 needs about .* --n \d+ is the largest that fits"):
        preflight_size(replace(CONFIG, n=50, device="cpu"), tiny_host("gemma3"), tmp_path)

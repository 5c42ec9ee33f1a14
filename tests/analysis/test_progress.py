"""The bar tells how far a job is, how fast it goes and when it will end, also where a step takes minutes."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from analysis.progress import make_progress


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(total: float, steps: list[tuple[float, float]], rate: str = "", **fields: object) -> str:
    """What a bar reads after steps of (seconds, completed)."""
    console, clock = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None), Clock()
    bar: Progress = make_progress(rate, console)
    bar.get_time = clock
    task = bar.add_task("[b]what", total=total, **fields)
    for seconds, completed in steps:
        clock.now = seconds
        bar.update(task, completed=completed)
    with console.capture() as capture:
        console.print(bar.make_tasks_table(bar.tasks))
    return " ".join(capture.get().replace("━", "").replace("╸", "").replace("╺", "").split())


@pytest.mark.parametrize(
    ("total", "steps", "expected"),
    [
        (8, [(0, 0), (60, 1), (120, 2)], "[b]what 2/8 1/min 0:02:00 0:06:00"),
        (8, [(0, 0), (1_000, 1)], "[b]what 1/8 0:16:40 -:--:--"),
        (8, [(0, 0), (900, 1), (1_800, 2)], "[b]what 2/8 4/h 0:30:00 1:30:00"),
        (300_000, [(0, 0), (2, 10_240), (4, 20_480)], "[b]what 20,480/300,000 5,120/s 0:00:04 0:00:55"),
        (2, [(0, 0), (10, 0.25), (20, 0.5)], "[b]what 0.5/2 1.5/min 0:00:20 0:01:00"),
        (1, [(0, 0), (60, 0.1), (120, 0.2)], "[b]what 20% 10 %/min 0:02:00 0:08:00"),
        (1, [(0, 0)], "[b]what 0% 0:00:00 -:--:--"),
    ],
)
def test_rate_and_time_left(total: float, steps: list[tuple[float, float]], expected: str):
    assert shown(total, steps) == expected


def test_a_job_may_show_a_rate_of_its_own():
    line = shown(
        10, [(0, 0), (5, 5)], "loss {task.fields[loss]:.2f}  {task.fields[speed]:,.0f} tokens/s", loss=4.5, speed=9e3
    )
    assert "5/10 loss 4.50 9,000 tokens/s" in line

"""The bar of a long job: what goes on, how far it is, how fast, and the time left."""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

SPEED_SECONDS = 1_800
"""Rate and time left are from so long a time: rich's own 30 s hold no two steps of a job with slow ones."""


def make_progress(rate: str = "", console: Console | None = None) -> Progress:
    """A bar that is gone when it ends, on stderr unless a console is given.

    A task whose total is 1 is a share of a whole and shown in per cent; of any other its steps are counted.

    Args:
        rate: the rate as the job itself measures it, in rich's format of a task; by default steps or per cent by time.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DoneColumn(),
        TextColumn(rate) if rate else RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        transient=True,
        speed_estimate_period=SPEED_SECONDS,
    )


class DoneColumn(ProgressColumn):
    """`3/8`, or `38%` of a share."""

    def render(self, task: Task) -> Text:
        if task.total == 1:
            done = f"{task.completed:.0%}"
        else:
            done = f"{task.completed:,.2f}".rstrip("0").rstrip(".") + f"/{task.total:,.0f}"
        return Text(done, style="progress.percentage")


class RateColumn(ProgressColumn):
    """`2.5/s`, per minute or hour where that is slow; `12 %/min` of a share; nothing before there is a rate."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        per_second, unit = (100 * task.speed, " %") if task.total == 1 else (task.speed, "")
        for seconds, name in ((1, "s"), (60, "min"), (3_600, "h")):
            if per_second * seconds >= 1 or name == "h":
                break
        rate = per_second * seconds
        return Text(
            f"{rate:,.0f}{unit}/{name}" if rate >= 100 else f"{rate:.3g}{unit}/{name}", style="progress.data.speed"
        )

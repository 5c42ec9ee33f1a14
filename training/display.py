"""What a long job shows: lines on stderr, and a bar above which they stay."""

from rich.console import Console
from rich.progress import Progress

from analysis import progress

console = Console(stderr=True, highlight=False, soft_wrap=True)


def make_progress(rate: str = "") -> Progress:
    """A bar on the console of all lines; `rate` as in analysis/progress.py."""
    return progress.make_progress(rate, console)

"""How measurements are run from a command line: arguments by tyro, and what was wrong as one line."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

ERRORS = (ValueError, OSError, ImportError)
"""What bad input and what is missing raise; anything else is a bug, and shows where."""


def run_command(main: Callable[..., None], module: str, stopped: str | None = None) -> None:
    """Exit status 1 with a line where something was wrong, or `stopped` where it was interrupted and can go on."""
    try:
        tyro.cli(main, prog=f"python -m {module}")
    except KeyboardInterrupt:
        if stopped is None:
            raise
        sys.exit(stopped)
    except ERRORS as error:
        sys.exit(f"error: {error}")


def run_queue(options: type, run: Callable[[Any, tuple[str, ...]], int], module: str, argv: list[str]) -> int:
    """The exit status of `run(options, flags behind --)`; 2 with a line for what was wrong, 130 when interrupted."""
    end = argv.index("--") if "--" in argv else len(argv)
    try:
        return run(tyro.cli(options, args=argv[:end], prog=f"python -m {module}"), tuple(argv[end + 1 :]))
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

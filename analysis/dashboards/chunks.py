"""The data files of a site: JavaScript that registers JSON, since browsers fetch nothing from file://."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cayley_interp.files import write_atomically

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DIGITS = 4


def write_data(out: Path, key: str, value: Any) -> None:
    """`OUT/data/KEY.js`, which calls register(KEY, VALUE); whole or not there.

    Only ASCII is written, so that no line separator or lone surrogate of a token reaches the browser's parser; a number
    that is not finite is null.

    Raises:
        ValueError: a key that is no plain file name.
    """
    body = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    write_atomically(data_file(out, key), f'register("{key}",{body});\n')


def data_file(out: Path, key: str) -> Path:
    """
    Raises:
        ValueError: a key that is no plain file name.
    """
    if not KEY.fullmatch(key):
        raise ValueError(f"{key!r} names a file of the site: expected letters, digits, and . _ - after the first")
    return out / "data" / f"{key}.js"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def short(number: float, digits: int = DIGITS) -> int | float:
    """So many significant digits; a whole number as an int, which is shorter in JSON."""
    if not math.isfinite(number):
        return number
    rounded = float(f"{number:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 10**digits else rounded


def shortened(value: Any) -> Any:
    """Every float of a structure `short`."""
    if isinstance(value, float):
        return short(value)
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    return [shortened(item) for item in value] if isinstance(value, list | tuple) else value


class Strings:
    """The strings of the tokens that one file uses, each once, in the order of their first use."""

    def __init__(self, of_token: Sequence[str]):
        self._of_token = of_token
        self._number: dict[int, int] = {}

    def __call__(self, token: int) -> int:
        """Its number in `used`."""
        return self._number.setdefault(token, len(self._number))

    def used(self) -> list[str]:
        return [self._of_token[token] for token in self._number]

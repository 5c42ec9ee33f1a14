"""How an error lists names."""

from collections.abc import Iterable


def some(names: Iterable[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")

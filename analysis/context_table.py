"""Contexts as an HTML table, for a notebook: a row each, tokens shaded by the unit's value, every string escaped."""

from collections.abc import Mapping, Sequence
from html import escape

from analysis.features import Context
from analysis.plots import ACCENT


def context_table(contexts: Sequence[Context], strings: Sequence[str] | Mapping[int, str], caption: str = "") -> str:
    """The table as an HTML fragment; a token's value is what the pointer shows on it.

    Shades are relative to the largest |value| among all of these contexts.

    Args:
        strings: what to show for each token id, such as `token_strings`.
        caption: plain text.
    """
    largest = max((abs(value) for context in contexts for value in context.values), default=0) or 1
    rows = []
    for context in contexts:
        tokens = (
            _token(strings[token], value, abs(value) / largest)
            for token, value in zip(context.tokens, context.values, strict=True)
        )
        rows.append(f'<tr><td style="text-align: left; white-space: pre-wrap">{"".join(tokens)}</td></tr>')
    head = f'<caption style="text-align: left">{escape(caption)}</caption>' if caption else ""
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _token(string: str, value: float, share: float) -> str:
    if value == 0:
        return escape(string)
    style = f"background: rgba({', '.join(map(str, ACCENT))}, {0.15 + 0.65 * share:.2f})"
    return f'<span title="{value:.3g}" style="{style}">{escape(string)}</span>'

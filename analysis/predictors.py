"""Which of a map's figures goes with what splicing it into its host costs: rank correlations over the maps of a site.

Spearman's, and the partial one at equal NMSE: of the ranks' residuals, once the rank of NMSE is taken out of both. A
figure that says nothing that NMSE does not has 0 there. Maps of one host and text only, and as many as there are: the
interval is a bootstrap over maps, which were not drawn at random but declared.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from analysis.comparison_tables import COLUMNS, Point, title_of
from analysis.tables import Sheet
from molt_lens.hosts import Site

COST = "kl"
PREDICTORS = ("nmse", "fvu", "cosine", "jacobian_cosine", "jacobian_relative_error", "l0", "active_rank")
AT_EQUAL = "nmse"
FEWEST = 5
"""Maps below which there is no table."""
RESAMPLES = 2_000

Values = Float[np.ndarray, " map"]


def rank_correlation(a: Values, b: Values, given: Values | None = None) -> float:
    """Spearman's; with `given` the partial one. nan where a side does not vary, or not beside `given`."""
    a, b = rankdata(a), rankdata(b)
    if given is not None:
        a, b = (_residual(side, rankdata(given)) for side in (a, b))
    a, b = a - a.mean(), b - b.mean()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 1e-9 * len(a) ** 3 else float("nan")


def _residual(y: Values, x: Values) -> Values:
    x, y = x - x.mean(), y - y.mean()
    return y - x * (x @ y) / (x @ x) if x.any() else y


def interval(a: Values, b: Values, given: Values | None = None, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % over maps drawn with replacement; nan where the correlation is."""
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(len(a), size=len(a)) for _ in range(RESAMPLES))
    found = [rank_correlation(a[i], b[i], None if given is None else given[i]) for i in drawn]
    if not np.isfinite(found).any():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def sheet_of_predictors(points: Sequence[Point], site: Site) -> Sheet | None:
    """A row for each figure; None for too few maps, controls and maps that never open not counted."""
    maps = [p for p in points if not p.subject.control and p.value("l0") and p.value(COST) is not None]
    if len(maps) < FEWEST:
        return None
    names = {figure: name for name, figure, _ in COLUMNS}
    cost, nmse = _values(maps, COST), _values(maps, AT_EQUAL)
    rows = []
    for figure in PREDICTORS:
        having = [p.value(figure) is not None for p in maps]
        of, own, equal = (v[having] for v in (cost, _values(maps, figure), nmse))
        if len(of) < FEWEST:
            continue
        partial = "—" if figure == AT_EQUAL else _cell(own, of, equal)
        rows.append([names[figure], str(len(of)), _cell(own, of), partial])
    return Sheet(
        f"{title_of(site)}, what goes with the divergence that splicing in costs",
        ["figure", "maps", f"rank correlation with {names[COST]} (95 %)", f"the same at equal {names[AT_EQUAL]}"],
        rows,
    )


def _values(maps: Sequence[Point], figure: str) -> Values:
    return np.array([p.value(figure) for p in maps], dtype=float)


def _cell(own: Values, cost: Values, given: Values | None = None) -> str:
    value, (low, high) = rank_correlation(own, cost, given), interval(own, cost, given)
    return "—" if np.isnan(value) else f"{value:+.2f} ({low:+.2f} to {high:+.2f})"

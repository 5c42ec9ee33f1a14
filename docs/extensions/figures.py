"""The site's own figures, drawn at every build: the mathematics from the algebra itself, speed from its measurements.

Greys that suit light and dark.
"""

import json
from html import escape
from itertools import groupby
from math import log10
from pathlib import Path

import torch
from saved_notebooks import write_if_changed
from sphinx.application import Sphinx

from analysis.geometry import spectrum_by_walsh
from cayley_interp import CayleyDictionary

INK, WARM, COOL = "#8a8a8a", "#c2571b", "#3b7dbd"


def write_figures(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "static" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    write_if_changed(folder / "dictionary.svg", dictionary(CayleyDictionary(t=3, n=6)))
    spectra = {name: CayleyDictionary(t=7, n=12, map=name) for name in ("gold", "random")}
    write_if_changed(folder / "inner_products.svg", inner_products(spectra))
    write_if_changed(folder / "molt.svg", molt())
    bench = Path(app.srcdir) / "results" / "bench.json"
    write_if_changed(folder / "bounds.svg", bounds(json.loads(bench.read_text())["rows"]))


def dictionary(small: CayleyDictionary) -> str:
    """Every atom as a column of signs, and all inner products below them."""
    atoms = small.atoms(torch.arange(n := 2**small.n))
    d, cell = atoms.shape[1], 8
    gram = (atoms @ atoms.T).abs()
    signs = [
        rect(u * cell, x * cell, cell, cell, INK, 0.85 if atoms[u, x] > 0 else 0.12) for u in range(n) for x in range(d)
    ]
    top = d * cell + 30
    products = [
        rect(u * cell, top + v * cell, cell, cell, WARM if u == v else INK, float(gram[u, v]))
        for u in range(n)
        for v in range(n)
        if gram[u, v] > 1e-6
    ]
    lines = [
        f'<path d="M{b * cell} 0V{d * cell}M{b * cell} {top}V{top + n * cell}M0 {top + b * cell}H{n * cell}" '
        f'stroke="{COOL}" stroke-width="0.8"/>'
        for b in range(0, n + 1, d)
    ]
    labels = [
        label(
            0, d * cell + 19, f"{n} atoms in {d} dimensions: {n // d} orthonormal bases, each the first one times signs"
        )
    ]
    return svg(n * cell, top + n * cell, [*signs, *products, *lines, *labels])


def inner_products(dictionaries: dict[str, CayleyDictionary]) -> str:
    """How many pairs have each |inner product|, counts on a logarithmic scale; a dashed line at Welch's mean square."""
    width, height, left, most = 640, 230, 60, 0.375
    drawn = [f'<path d="M{left} 10V{height}H{width}" fill="none" stroke="{INK}"/>']
    for power in range(0, 8, 2):
        y = height - 28 * power
        drawn.append(label(left - 8, y + 4, f"10{'⁰¹²³⁴⁵⁶⁷'[power]}", "end"))
    for tick in (0, 0.125, 0.25, 0.375):
        drawn.append(label(left + (width - left - 10) * tick / most, height + 18, f"{tick:g}", "middle"))
    place = {"random": (COOL, 0.75), "gold": (WARM, 1.0)}
    for name, (colour, opacity) in place.items():
        spectrum = spectrum_by_walsh(dictionaries[name])
        for value, count in zip(spectrum.values.tolist(), spectrum.counts.tolist(), strict=True):
            size = 28 * torch.tensor(float(count)).log10().item()
            x = left + (width - left - 10) * value / most
            drawn.append(rect(x - 1.5, height - size, 3 if name == "random" else 5, size, colour, opacity))
    welch = spectrum.welch_mean_square**0.5
    x = left + (width - left - 10) * welch / most
    drawn.append(f'<path d="M{x} 10V{height}" stroke="{INK}" stroke-dasharray="4 4"/>')
    drawn.append(label(x + 6, 20, "root mean square of both, Welch's bound"))
    drawn += [label(width - 10, 60, "gold", "end", WARM), label(width - 10, 80, "random signs", "end", COOL)]
    drawn.append(
        label(left + (width - left) / 2, height + 38, "|inner product| of two atoms, d = 128, 4,096 atoms", "middle")
    )
    return svg(width, height + 48, drawn)


def molt() -> str:
    """A MOLT in one picture: gates choose, each open transform is a narrow waist as wide as its rank."""
    ranks = (512, 256, 256, 128, 128, 64, 32)
    width, row, top = 640, 34, 40
    drawn = [label(40, 20, "x"), label(150, 20, "gate"), label(330, 20, "V, rank, U", "middle"), label(560, 20, "y")]
    bottom = top + row * len(ranks)
    drawn += [rect(30, top, 30, bottom - top - 10, INK, 0.5), rect(550, top, 30, bottom - top - 10, INK, 0.5)]
    for i, rank in enumerate(ranks):
        y, is_open = top + i * row + 12, i in (0, 4, 6)
        waist = 3 + 18 * (rank / 512) ** 0.5
        colour, opacity = (WARM, 0.9) if is_open else (INK, 0.25)
        drawn.append(
            f'<path d="M60 {y}H140M180 {y}H240M420 {y}H550" stroke="{colour}" stroke-opacity="{opacity}" fill="none"/>'
        )
        drawn.append(
            f'<circle cx="160" cy="{y}" r="9" stroke="{colour}" fill="{colour}" '
            f'fill-opacity="{opacity if is_open else 0.1}"/>'
        )
        drawn.append(
            f'<path d="M240 {y - 12}L330 {y - waist / 2}L420 {y - 12}V{y + 12}L330 {y + waist / 2}L240 {y + 12}Z" '
            f'fill="{colour}" fill-opacity="{opacity}"/>'
        )
        drawn.append(label(430, y - 4, str(rank), "start", colour))
    return svg(width, bottom + 4, drawn)


def bounds(rows: list[dict]) -> str:
    """How many times its bound each implementation takes, on a logarithmic scale: the bound is the line at the left.

    A training step is not in it: with and without the bottleneck are two models, not two ways to the same numbers.
    """
    width, left, right, step, decades = 850, 425, 640, 20, 5
    drawn, y = [], 10

    def place(times: float) -> float:
        return left + (right - left) * log10(times) / decades

    rows = [row for row in rows if "of_bound" in row and row["operation"] != "Training step"]
    for operation, group in groupby(rows, key=lambda row: row["operation"]):
        y += step + 6
        drawn.append(label(0, y, escape(operation)))
        for (shape, dtype, device), case in groupby(group, key=lambda row: (row["shape"], row["dtype"], row["device"])):
            y += step
            own = list(case)
            fastest = max(own, key=lambda row: row["ratio"])
            drawn.append(label(left - 12, y + 4, escape(f"{shape}, {dtype}, {device}"), "end"))
            drawn.append(f'<path d="M{left} {y}H{right}" stroke="{INK}" stroke-opacity="0.25"/>')
            for row in own:
                colour = WARM if row is fastest else COOL if row["implementation"] == row["baseline"] else INK
                drawn.append(f'<circle cx="{place(1 / row["of_bound"]):.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
            gained = f"{fastest['implementation']}: {fastest['ratio']:.3g}x"
            drawn.append(label(right + 12, y + 4, escape(gained), "start", WARM))
    for power in range(decades + 1):
        x = place(10**power)
        drawn.append(f'<path d="M{x} 16V{y + 12}" stroke="{INK}" stroke-opacity="{1 if power == 0 else 0.25}"/>')
        drawn.append(label(x, y + 28, f"10{'⁰¹²³⁴⁵⁶⁷'[power]}", "middle"))
    drawn.append(label((left + right) / 2, y + 48, "times its bound", "middle"))
    drawn += [label(left, 8, "bound", "middle"), label(right, 8, "baseline", "end", COOL)]
    drawn.append(label(right + 12, 8, "fastest, against the baseline", "start", WARM))
    return svg(width, y + 56, drawn)


def rect(x: float, y: float, width: float, height: float, fill: str, opacity: float) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" fill-opacity="{opacity:.3g}"/>'
    )


def label(x: float, y: float, text: str, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def svg(width: float, height: float, drawn: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {width + 8:g} {height + 8:g}" '
        f'font-family="sans-serif" font-size="13">{"".join(drawn)}</svg>\n'
    )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_figures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""What each transform of a MOLT is worth, and how much of that is in its gate.

    python -m analysis.unit_worth runs/molt-a --out worth

A transform that is open at nearly every token may be a skip connection in disguise. So beside the error without it
stands the error with it always on, at the constant gate that suits it best: what is lost there is all that its gate is
good for. With e the error of the whole map, w what the transform writes at a gate of 1, g its gate: sums over tokens,

    without  |e + g w|^2        always on  |e + g w|^2 - <w, e + g w>^2 / |w|^2

and all gates held constant at once, the best linear map in the span of the transforms, is one least-squares problem.
"""

import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from analysis.command_line import run_command
from analysis.hosts import open_host
from analysis.reconstruction import CONSTANT
from analysis.subjects import SiteText, choose_text, host_of, open_subject
from analysis.tables import Sheet, to_markdown, to_rich
from cayley_interp.files import write_atomically
from molt_lens import Molt, Replacement

TOKENS_AT_A_TIME = 256


@dataclass(frozen=True)
class TransformWorth:
    """Errors are NMSE of the whole map, everything but this transform as it was."""

    unit: int
    rank: int
    frequency: float
    nmse_without: float
    nmse_always: float
    """With its gate at the best constant, at every token."""
    gate_share: float | None
    """Of what it is worth, the share that its gate brings: (always - own) / (without - own). 0 is a skip connection;
    None where it never opens."""


@dataclass(frozen=True)
class MapWorth:
    nmse: float
    nmse_constant: float
    """With every gate held at a constant, all of them fitted together to the tokens measured."""
    nmse_bare: float
    """With every gate closed."""
    tokens: int
    transforms: list[TransformWorth]


@torch.no_grad()
def transform_worth(
    replacement: Replacement, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]
) -> MapWorth:
    """Exact over these tokens, in float64.

    Raises:
        ValueError: not a MOLT; no two tokens, or activations of another width or that are not finite.
    """
    if not isinstance(replacement.map, Molt):
        raise ValueError(f"transforms are a MOLT's, and this is a {replacement.map.kind}: give the folder of a MOLT")
    if len(x) != len(y) or len(x) < 2 or (x.shape[1], y.shape[1]) != (replacement.d_in, replacement.d_out):
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit each other or a map from {replacement.d_in} to "
            f"{replacement.d_out}: expected one input and one target a token, of 2 tokens or more"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x or y has numbers that are not finite: look for inf or nan in the activations")
    variance = y.double().var(0, correction=0)
    varies = variance > CONSTANT * variance.median()
    weight = (varies / torch.where(varies, variance, 1)) / varies.sum() / len(y)
    sums = _sums(replacement, x, y, weight)
    own, without, projection, power = (sums[name] for name in ("own", "without", "projection", "power"))
    always = without - torch.where(power > 0, projection.square() / torch.where(power > 0, power, 1), 0)
    share = [s if n else None for s, n in zip(((always - own) / (without - own)).tolist(), sums["opened"], strict=True)]
    constant = torch.linalg.lstsq(sums["gram"], sums["against"], driver="gelsd").solution
    rows = zip(
        replacement.map.ranks, (sums["opened"] / len(x)).tolist(), without.tolist(), always.tolist(), share,
        strict=True,
    )  # fmt: skip
    return MapWorth(
        nmse=own.item(),
        nmse_constant=(sums["bare"] - sums["against"] @ constant).item(),
        nmse_bare=sums["bare"].item(),
        tokens=len(x),
        transforms=[TransformWorth(i, *row) for i, row in enumerate(rows)],
    )


def _sums(replacement: Replacement, x: Tensor, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Weighted sums over tokens; `gram` and `against` are those of the least-squares problem of constant gates."""
    n = replacement.map.n_units
    totals: dict[str, Tensor] = {}
    for some_x, some_y in zip(x.split(TOKENS_AT_A_TIME), y.split(TOKENS_AT_A_TIME), strict=True):
        acts = replacement.encode(some_x.float())
        bare = replacement.decode(torch.zeros_like(acts), some_x.float()).double()
        written = torch.stack([_written(replacement, unit, some_x.float()) for unit in range(n)]) - bare
        missing = some_y.double() - bare
        gated = acts.double().T[:, :, None] * written
        error = missing - gated.sum(0)
        kept = error + gated  # what is missing where a transform is left out
        flat = (written * weight.sqrt()).flatten(1)
        sums = {
            "own": (error.square() * weight).sum(),
            "bare": (missing.square() * weight).sum(),
            "without": (kept.square() * weight).sum((1, 2)),
            "projection": (kept * written * weight).sum((1, 2)),
            "power": flat.square().sum(1),
            "gram": flat @ flat.T,
            "against": flat @ (missing * weight.sqrt()).flatten(),
            "opened": (acts != 0).sum(0).double(),
        }
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    return totals


def _written(replacement: Replacement, unit: int, x: Tensor) -> Tensor:
    """What the map writes where this unit's gate is 1 and all others are closed."""
    one = torch.zeros(len(x), replacement.map.n_units, device=x.device)
    one[:, unit] = 1
    return replacement.decode(one, x).double()


# ---- The command ----


def sheet_of(name: str, worth: MapWorth) -> Sheet:
    title = (
        f"{name}: NMSE {worth.nmse:.4f} over {worth.tokens:,} tokens; {worth.nmse_constant:.4f} with every gate "
        f"constant, {worth.nmse_bare:.4f} with all closed"
    )
    header = ["transform", "rank", "open at", "NMSE without", "always on", "share of its gate"]
    by_worth = sorted(worth.transforms, key=lambda t: -t.nmse_without)
    rows = [
        [
            str(t.unit),
            str(t.rank),
            f"{t.frequency:.1%}",
            f"{t.nmse_without - worth.nmse:+.4f}",
            f"{t.nmse_always - worth.nmse:+.4f}",
            "—" if t.gate_share is None else f"{t.gate_share:.0%}",
        ]
        for t in by_worth
    ]
    return Sheet(title, header, rows)


def main(
    names: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    tokens: int = 8_192,
    host: str | None = None,
    text: Path | None = None,
    device: str = "cpu",
) -> None:
    """Take every transform of MOLTs out, and hold its gate constant, on text that they were not trained on.

    Args:
        names: Runs' or replacements' folders of MOLTs.
        out: Folder for unit_worth.json and unit_worth.md.
        tokens: Held-out tokens to measure on.
        host: The host by name; by default what the first of them was trained on.
        text: Run whose held-out text is measured on; by default the first run's.
        device: Device to measure on.
    """
    if not names:
        raise ValueError("no MOLT was named: give the folders of runs")
    held_out, text_of = choose_text(list(names), text)
    opened = open_host(host or host_of(list(names)), device)
    console, sheets, found = Console(), [], {}
    for name in names:
        subject = open_subject(name, opened, text_of[name])
        site_text = SiteText(opened, subject.site, held_out.input_ids, tokens)
        sample = site_text.sample
        worth = transform_worth(subject.make(site_text), sample.x, sample.y)
        found[name] = asdict(worth)
        sheets.append(sheet_of(name, worth))
        console.print(to_rich(sheets[-1]))
    about = {
        "command": shlex.join(["python", "-m", "analysis.unit_worth", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "host_fingerprint": opened.fingerprint,
        "maps": found,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "unit_worth.json", json.dumps(about, indent=2) + "\n")
    write_atomically(out / "unit_worth.md", "\n".join(map(to_markdown, sheets)))


if __name__ == "__main__":
    run_command(main, "analysis.unit_worth")

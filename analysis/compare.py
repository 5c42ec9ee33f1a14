"""Replacements of one host side by side: sparsity, error, behaviour, Jacobian, and what floors reach.

    python -m analysis.compare runs/molt-* runs/transcoder-* --tokens 16384 --out comparison
    python -m analysis.compare runs/molt-a gemma-scope-2:270m-pt/transcoder/layer_9_width_16k_l0_small_affine --out c

Measured on the text that the first run held out. What has been measured is kept in OUT/measured and found again.
"""

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from analysis.at_equal import sheet_at_equal
from analysis.command_line import run_command
from analysis.comparison import PARTS, Kept, Measured, Settings, measure_site
from analysis.comparison_page import write_comparison_page
from analysis.comparison_tables import SHORT, By, Comparison, lines_of, points_of, records, sheet_of
from analysis.controls import controls_of
from analysis.held_out import HeldOut
from analysis.hosts import open_host
from analysis.predictors import sheet_of_predictors
from analysis.progress import make_progress
from analysis.subjects import SiteText, choose_text, host_of, open_subject
from analysis.tables import to_csv, to_markdown, to_rich
from cayley_interp.files import write_atomically
from molt_lens.hosts import Host
from molt_lens.packing import keep_mask


def compare(
    names: list[str],
    settings: Settings,
    out: Path,
    *,
    host: str | None = None,
    text: Path | None = None,
    device: str = "cpu",
    command: str = "",
    console: Console | None = None,
) -> Comparison:
    """Measure all of them and their controls, site by site, in float32.

    Args:
        names: runs' folders, replacements' folders, or Gemma Scope ids.
        out: its measured/ keeps what was measured, and what it holds is not measured again.
        host: by name; by default what the first of the names was trained on.
        text: the run whose held-out text is measured on; by default the first run's, which all others must share.

    Raises:
        FileNotFoundError: a folder without a replacement, or a run without its held-out text.
        ValueError: no names, or one twice; another host, another held-out text, too few tokens; figures that are not
            finite.
    """
    check_names(names)
    held_out, text_of = choose_text(names, text)
    opened = open_host(host or host_of(names), device)
    sequences = check_text(held_out, opened, settings)
    subjects = [open_subject(name, opened, text_of[name]) for name in names]
    by_site = {site: [s for s in subjects if s.site == site] for site in dict.fromkeys(s.site for s in subjects)}
    controls = {site: controls_of(site, own, opened, settings.jacobian_tokens) for site, own in by_site.items()}
    kept, measured = Kept(out / "measured"), list[Measured]()
    with make_progress(console=console) as bar:
        total = PARTS * sum(len(by_site[site]) + len(controls[site]) for site in by_site)
        task = bar.add_task("", total=total)

        def advance(what: str, parts: int) -> None:
            bar.update(task, advance=parts, description=what or None)

        for site, own in by_site.items():
            site_text = SiteText(opened, site, sequences, settings.tokens)
            measured += measure_site(own, controls[site], site_text, settings, kept, advance)
    return Comparison(
        opened.name,
        opened.fingerprint,
        str(text) if text else next(name for name in names if text_of[name] == "same"),
        held_out.digest(),
        settings,
        command,
        time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        measured,
    )


def check_names(names: list[str]) -> None:
    """
    Raises:
        ValueError: no names, or one of them twice.
    """
    if not names:
        raise ValueError("nothing to compare: give runs' folders, replacements' folders or Gemma Scope ids")
    places = [str(Path(name).resolve()) if Path(name).exists() else name for name in names]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise ValueError(f"{names[places.index(place)]} and {names[i]} are the same: give each once")


def check_text(held_out: HeldOut, host: Host, settings: Settings) -> torch.Tensor:
    """The sequences that are measured on.

    Raises:
        ValueError: ids of another host, or not as many tokens as are asked for.
    """
    if held_out.host_fingerprint != host.fingerprint:
        raise ValueError(
            f"the held-out text is of {held_out.host_name} (fingerprint {held_out.host_fingerprint[:12]}), and the "
            f"host is {host.name} (fingerprint {host.fingerprint[:12]}): compare what belongs to one host"
        )
    for name in ("tokens", "behaviour_tokens", "jacobian_tokens"):
        if (asked := getattr(settings, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {asked}: expected 1 or more")
    if 2 * settings.jacobian_tokens > settings.tokens:
        raise ValueError(
            f"--jacobian-tokens {settings.jacobian_tokens}, and as many for the mean Jacobian, are among the --tokens "
            f"{settings.tokens}: ask for fewer"
        )
    kept = keep_mask(host, held_out.input_ids).sum(1).cumsum(0)
    n_ctx = held_out.input_ids.shape[1]
    if settings.tokens > kept[-1]:
        raise ValueError(
            f"--tokens {settings.tokens}: the held-out text has {int(kept[-1]):,} tokens that count, in "
            f"{len(held_out.input_ids)} sequences of {n_ctx}: ask for fewer, or train with more --val-tokens"
        )
    if settings.tokens <= kept[0] or settings.behaviour_tokens <= n_ctx:
        raise ValueError(
            f"--tokens {settings.tokens} and --behaviour-tokens {settings.behaviour_tokens}: errors are over "
            f"sequences, and two of {n_ctx} tokens are needed"
        )
    return held_out.input_ids


def write_comparison(comparison: Comparison, out: Path, by: By) -> None:
    """compare.csv and compare.json with a row a run; compare.md and index.html by config or run, and at equal."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        **{name: value for name, value in vars(comparison).items() if name not in ("measured", "settings")},
        "settings": asdict(comparison.settings),
        "maps": records(comparison),
    }
    write_atomically(out / "compare.json", json.dumps(about, indent=2, default=str) + "\n")
    write_atomically(out / "compare.csv", to_csv(lines_of(comparison)))
    points = {site: points_of(comparison, site, by) for site in comparison.sites()}
    kinds_of_sheet = (sheet_of, sheet_at_equal, sheet_of_predictors)
    sheets = [sheet(points[site], site) for site in points for sheet in kinds_of_sheet]
    write_atomically(out / "compare.md", "\n".join(to_markdown(sheet) for sheet in sheets if sheet is not None))
    write_comparison_page(comparison, out / "index.html", by)


def main(
    names: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),  # noqa: B008
    by: By = "config",
    host: str | None = None,
    text: Path | None = None,
    device: str = "cpu",
) -> None:
    """Compare what stands in for the MLPs of one host, on text that none of it was trained on.

    Args:
        names: Runs' folders, replacements' folders, or Gemma Scope ids such as gemma-scope-2:270m-pt/PATH.
        out: Folder to write to: compare.csv, compare.json, compare.md, index.html; measured/ is found again.
        by: One point a config, its seeds merged, or one a run.
        host: The host by name; by default what the first of them was trained on.
        text: Run whose held-out text is measured on, though others held out other text.
        device: Device to measure on.
    """
    command = shlex.join(["python", "-m", "analysis.compare", *sys.argv[1:]])
    console = Console()
    comparison = compare(list(names), settings, out, host=host, text=text, device=device, command=command)
    write_comparison(comparison, out, by)
    for site in comparison.sites():
        console.print(to_rich(sheet_of(points_of(comparison, site, by), site, SHORT)))
    console.print(f"table and plots: {(out / 'index.html').resolve()}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main, "analysis.compare", stopped="stopped: what was measured is kept, the same command goes on")

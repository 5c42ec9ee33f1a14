"""Pages of what a model's units do, as a site that opens from disk.

python -m analysis.dashboards cayley-tiny-2L-sotu --vanilla vanilla-tiny-sotu --out site
python -m analysis.dashboards runs/tiny-20260101-120000 --layers 0 3 --features L3.1:17,42 --out site
"""

from pathlib import Path

import tyro
from rich.console import Console

from analysis.command_line import run_command
from analysis.dashboards.build import Export, build
from analysis.dashboards.labels import open_provider
from analysis.dashboards.opening import open_named
from analysis.progress import make_progress


def main(
    name: tyro.conf.Positional[str],
    out: Path,
    layers: tuple[int, ...] = (),
    features: tuple[str, ...] = ("top:200",),
    tokens: int = 100_000,
    seed: int = 0,
    export: tuple[Export, ...] = (),
    labels: str | None = None,
    device: str = "cpu",
    host: str | None = None,
    vanilla: str | None = None,
) -> None:
    """Write a site with an index of all units of a model and pages of some; what was begun is gone on with.

    Args:
        name: A bundled Cayley-GPT, the folder of a run or of a model, a replacement, or a SAELens SAE.
        out: Folder to write to.
        layers: Whose units are looked at; by default all.
        features: Which units get a page: top:N of each group by frequency, neither dense nor zombie; random:N;
            17,42,1003; or GROUP:17,42.
        tokens: Of the text that units are looked at on, at most.
        seed: Of random:N.
        export: Other formats to write the units with a page in too, under OUT.
        labels: Who names the units with a page, openai:MODEL@URL (the key is read from OPENAI_API_KEY) or hf:NAME; by
            default nobody. A name is shown with how well it told contexts with the unit from others.
        device: Device to run the model on.
        host: Of a replacement, where its host is not found by the name that it had when the replacement was made.
        vanilla: A model to hold a Cayley-GPT against on the same text: the model page shows their paired difference.
    """
    opened = open_named(name, layers=layers or None, tokens=tokens, device=device, host=host, vanilla=vanilla)
    settings = [("layers", " ".join(map(str, layers)) or "all"), ("features", " ".join(features)), ("seed", str(seed))]
    provider = None if labels is None else open_provider(labels)
    with make_progress() as bar:
        task, doing = bar.add_task("", total=1), ""

        def advance(what: str, share: float) -> None:
            nonlocal doing
            if what != doing:
                doing = what
                bar.reset(task, total=1, description=what)
            bar.update(task, completed=share)

        page = build(
            opened,
            out,
            features=features,
            seed=seed,
            exports=export,
            provider=provider,
            settings=settings,
            progress=advance,
        )
    Console().print(f"open {page.resolve().as_uri()}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main, "analysis.dashboards", stopped="stopped: what was written is kept, the same command goes on")

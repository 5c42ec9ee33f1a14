"""A comparison without runs: two sites, seeds, a front, controls, a Gemma Scope transcoder, a folder's hostile name."""

from dataclasses import asdict, replace

from analysis.comparison import Measured, Settings
from analysis.comparison_tables import COLUMNS, Comparison
from analysis.subjects import Subject
from molt_lens.hosts import Site
from training.molt_recipes import MOLT_RECIPES

HOSTILE = '<script>window.__x=1;alert(1)</script>"'
SITES = (Site(9, target="post_norm_out"), Site(12, target="post_norm_out"))
BASE = MOLT_RECIPES["gemma-3-270m-L9-N1"][1]


def make_comparison() -> Comparison:
    """Of either site ten maps and four controls."""
    measured = []
    for site in SITES:
        for kind, gates, nmse, cosine in (
            ("molt", (2, 4, 8), 0.32, 0.42),
            ("molt-skip", (4,), 0.25, 0.5),
            ("transcoder", (16, 32, 64), 0.4, 0.16),
        ):
            for i, k in enumerate(gates):
                for seed in (0, 1) if (kind, k) == ("molt", 4) else (0,):
                    figures = make_figures(k, nmse - 0.03 * i + 0.004 * seed, cosine + 0.02 * i)
                    measured.append(Measured(run(f"runs/{kind}-{k}-{seed}", kind, f"topk:{k}", seed, site), figures))
        folder = replace(run(HOSTILE, "mxd", "topk:32", 0, site), seed=None, text="unknown")
        measured.append(Measured(folder, make_figures(10, 0.304, 0.3)))
        scope = run("gemma-scope-2:270m-pt/x", "gemma-scope skip-transcoder", "jumprelu", 0, site)
        measured.append(Measured(replace(scope, seed=None, text="unknown"), make_figures(22, 0.45, 0.35)))
        for kind, name, nmse, cosine in (
            ("zero", "zero", 1.2, 0.0),
            ("mean", "mean of the target", 1.0, 0.0),
            ("ridge", "ridge", 0.444, 0.335),
            ("mean-jacobian", "mean Jacobian", 0.85, 0.553),
        ):
            control = Subject(name, kind, site, name, lambda _: None, control=True, parameters=409_600)
            measured.append(Measured(control, make_figures(0, nmse, cosine)))
    return Comparison(
        "gemma-3-270m", "f" * 64, "runs/molt-4-0", "a" * 64, Settings(), "the command", "2026-11-22", measured
    )


def run(name: str, kind: str, gate: str, seed: int, site: Site) -> Subject:
    config = asdict(BASE) | {"name": name, "kind": kind, "gate": gate, "seed": seed, "layer": site.layer}
    return Subject(
        name,
        kind,
        site,
        name,
        lambda _: None,
        gate=gate,
        parameters=3_300_000,
        training_tokens=600_000,
        seed=seed,
        text="same",
        config=config,
    )


def make_figures(l0: float, nmse: float, cosine: float) -> dict[str, float]:
    """Every column of the table; those that are not plotted are like one another."""
    figures = {name: 0.9 for _, name, _ in COLUMNS}
    figures |= {"l0": l0, "active_rank": 80 * l0, "nmse": nmse, "jacobian_cosine": cosine, "jacobian_tokens": 1_024}
    return figures | {"l0_se": 0.01 * l0, "active_rank_se": l0, "nmse_se": 0.004, "jacobian_cosine_se": 0.006}

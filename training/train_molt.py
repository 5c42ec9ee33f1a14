"""Train a MOLT, or what it is compared with, in place of one MLP layer of a language model.

    python training/train_molt.py                                        # MOLT N=1 on layer 9 of a Gemma 3 270M
    python training/train_molt.py --kind skip-transcoder --gate topk:32  # its baselines, by the same command
    python training/train_molt.py gemma-3-1b-L13-N4 --out /data/n4
    python training/train_molt.py --resume runs/gemma-3-270m-L9-N1-20260101-120000

The run folder holds config.json, environment.json, held_out.safetensors, metrics.jsonl, checkpoints/, model/, ridge/
and report.html.
"""

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Int64
from rich.progress import Progress
from torch import Tensor

from analysis.held_out import HELD_OUT, HeldOut, read_held_out, write_held_out
from analysis.hosts import open_host
from analysis.molt_report import write_molt_report
from analysis.replacements import ReplacementEvaluation, evaluate_replacement
from cayley_interp.kernels import set_backend
from molt_lens import LinearMap, Replacement, matched_map
from molt_lens.activations import ActivationStore, collect
from molt_lens.folder import load_replacement, save_replacement
from molt_lens.hosts import Host, Site
from molt_lens.opening import open_replacement
from molt_lens.packing import keep_mask
from molt_lens.penalties import starting_open_rate
from molt_lens.reference import reference_molt, set_reference_statistics
from training.checkpoint import checkpoints
from training.command import Command
from training.display import console, make_progress
from training.environment import peak_memory
from training.molt_data import train_sequences, val_sequences
from training.molt_loop import MoltTrainer
from training.molt_preflight import preflight_molt, preflight_size, preflight_text
from training.molt_recipes import MOLT_RECIPES, MoltRun, molt_run_from_dict
from training.preflight import resolve_device
from training.run_folder import start_folder
from training.threads import set_up_threads
from training.tracking import MetricsFile, start_tracker

MOMENTS_TOKENS = 100_000
"""Tokens that the standardisers' statistics are taken over; all there are in a shorter run."""
CALIBRATION_TOKENS = 4_096
"""Tokens that an untrained map's scales are set from."""


def train(config: MoltRun, run_dir: Path, resume: bool) -> Path:
    """Run the config in its folder, to the report; returns the folder."""
    set_up_threads(resolve_device(config.device))
    preflight_molt(config, run_dir, resume)
    set_backend(config.backend)
    config = replace(config, optim=replace(config.optim, lr=config.peak_lr))  # config.json leaves nothing open
    device = torch.device(resolve_device(config.device))
    console.print(f"host: {config.host}", markup=False)
    host = open_host(config.host, device, getattr(torch, config.host_dtype))
    site = Site(config.layer, config.input, config.target)
    host.modules(site)  # a layer or target that the host lacks is said before anything is written
    memory = preflight_size(config, host, run_dir)
    preflight_text(config, host)
    if not resume:
        start_folder(config, run_dir, device, processes=1)
    sequences = held_out_sequences(config, host, run_dir)
    console.print(
        f"{host.names(site).hf_input} -> {host.names(site).hf_target}; memory about {memory.needed / 1e9:.1f} GB of "
        f"{memory.available / 1e9:.1f} GB, the largest N that would fit: {memory.largest_n:,}",
        markup=False,
    )
    with make_progress("{task.fields[shown]}") as bar:
        store = make_store(config, host, site, ActivationDisplay(bar, config.tokens))
        replacement, ridge = make_replacements(config, run_dir, host, site, store, resume)
        trainer = MoltTrainer(config, replacement, store, run_dir)
        if resume:
            trainer.resume()
        metrics = MetricsFile(run_dir / "metrics.jsonl")
        metrics.truncate_after(trainer.step)
        tracker = start_tracker(config.track, run_dir, config.name, asdict(config))
        task = bar.add_task("training", total=config.steps, completed=trainer.step, shown="")

        def log(record: dict) -> None:
            metrics.append(record)
            tracker.log(record, record["step"])
            bar.console.print(describe(record, config), markup=False)

        def progress(step: int, mse: float, speed: float) -> None:
            bar.update(task, completed=step, shown=f"mse {mse:.3f}  {speed:,.0f} tokens/s")

        if config.kind != "linear":  # its solution is exact already
            trainer.run(log, progress)
    save_replacement(replacement, run_dir / "model", host=host, site=site)  # before anything that could fail
    evaluation = evaluate(config, host, site, replacement.eval(), ridge, sequences)
    final = evaluation.scalars() | {
        "n_parameters": sum(parameter.numel() for parameter in replacement.map.parameters()),
        "peak_memory_bytes": peak_memory(device),
        "tokens_per_second": metrics.median("tokens_per_second"),
    }
    tokens = min(MOMENTS_TOKENS, config.tokens) if config.kind == "linear" else config.steps * config.batch_size
    training = {"recipe": config.name, "training_tokens": tokens, **final}
    save_replacement(replacement, run_dir / "model", host=host, site=site, training=training)
    record = {"step": trainer.step, "final": final}
    metrics.append(record)
    tracker.log(record, trainer.step)
    tracker.finish()
    report = write_molt_report(run_dir, evaluation)
    print_summary(evaluation)
    print(f"run folder: {run_dir.resolve()}\nreport:     {report.resolve()}", flush=True)
    return run_dir


class ActivationDisplay:
    """The host's forward passes on the bar, and as a line now and then where no bar is drawn."""

    def __init__(self, bar: Progress, total: int):
        self.bar, self.task = bar, bar.add_task("activations", total=total, shown="")
        self.start = self.said = time.perf_counter()
        self.first: int | None = None

    def __call__(self, tokens: int, _: int | None) -> None:
        now = time.perf_counter()
        if self.first is None or tokens < self.first:  # a new pass over the text
            self.first, self.start = tokens, now
            return
        speed = (tokens - self.first) / (now - self.start)
        self.bar.update(self.task, completed=tokens, shown=f"{speed:,.0f} tokens/s")
        if now - self.said > 20:
            self.said = now
            self.bar.console.print(f"activations {tokens:>9,}  {speed:,.0f} tokens/s", markup=False)


def make_store(config: MoltRun, host: Host, site: Site, progress: ActivationDisplay) -> ActivationStore:
    return ActivationStore(
        host,
        site,
        lambda: train_sequences(config, host),
        tokens=config.tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        buffer_tokens=config.buffer_tokens,
        dtype=getattr(torch, config.store_dtype),
        epochs=config.epochs,
        cache=config.activation_cache,
        progress=progress,
    )


def make_replacements(
    config: MoltRun, run_dir: Path, host: Host, site: Site, store: ActivationStore, resume: bool
) -> tuple[Replacement, Replacement]:
    """The replacement to train, its scales set from data, and the ridge map that is its floor.

    The statistics and the floor come from the first tokens of the store; a run that goes on from a checkpoint finds
    them in its folder.
    """
    torch.manual_seed(config.seed)
    d = host.d_model
    is_reference = config.gate == "reference"
    made = (
        reference_molt(d, d, n=config.n)
        if is_reference
        else matched_map(config.kind, d, d, n=config.n, gate=config.gate)
    )
    replacement = Replacement(made).to(host.device)
    ridge_folder = run_dir / "ridge"
    if resume and (ridge_folder / "config.json").is_file():
        ridge = load_replacement(ridge_folder)[0].to(host.device)
        if config.kind == "linear":
            return ridge, ridge
        if checkpoints(run_dir):  # which brings the statistics; a run that was killed before has none yet
            return replacement, ridge
    n_tokens = min(MOMENTS_TOKENS, config.tokens)
    moments = store.moments(n_tokens)
    ridge = Replacement(LinearMap(d, d)).to(host.device)
    for made in (replacement, ridge):
        if config.standardize or made is ridge:
            made.input.set(moments.mean_in, moments.std_in)
            made.output.set(moments.mean_out, moments.std_out)
    assert isinstance(ridge.map, LinearMap)
    ridge.map.fit(*store.covariances(ridge.input, ridge.output, n_tokens))
    save_replacement(ridge, ridge_folder, host=host, site=site)
    if config.kind == "linear":
        return ridge, ridge
    if is_reference:
        set_reference_statistics(replacement, *next(store.first(config.batch_size)))
        return replacement, ridge
    sample = store.first_inputs(min(CALIBRATION_TOKENS, config.tokens))
    open_rate = starting_open_rate(config.penalty, replacement.map.n_units, config.open_rate)
    replacement.map.calibrate(replacement.input(sample), open_rate, config.initial_variance)
    return replacement, ridge


def held_out_sequences(config: MoltRun, host: Host, run_dir: Path) -> Int64[Tensor, "sequence pos"]:
    """The text that is measured on: the run's folder keeps it for whoever compares this run with others.

    Raises:
        ValueError: the folder's is of another host's tokenizer.
    """
    if not (run_dir / HELD_OUT).is_file():
        write_held_out(run_dir, HeldOut(val_sequences(config, host), host.name, host.fingerprint))
    held_out = read_held_out(run_dir)
    if held_out.host_fingerprint != host.fingerprint:
        raise ValueError(
            f"{run_dir / HELD_OUT} is of {held_out.host_name} (fingerprint {held_out.host_fingerprint[:12]}), and the "
            f"run of {host.name} (fingerprint {host.fingerprint[:12]}): resume with the host that it began with"
        )
    return held_out.input_ids


def evaluate(
    config: MoltRun,
    host: Host,
    site: Site,
    replacement: Replacement,
    ridge: Replacement,
    sequences: Int64[Tensor, "sequence pos"],
) -> ReplacementEvaluation:
    """Reconstruction, gates and behaviour on held-out text, with a bar."""
    with make_progress("") as bar:
        task = bar.add_task("held-out activations", total=1.0)
        n_tokens = min(config.val_tokens, sum(int(keep_mask(host, s).sum()) for s in sequences))
        sample = collect(host, site, lambda: iter(sequences), n_tokens, cache=config.activation_cache)
        mean = Replacement(LinearMap(host.d_model, host.d_model)).to(host.device)
        mean.output.load_state_dict(ridge.output.state_dict())
        return evaluate_replacement(
            replacement,
            host,
            site,
            sample.x,
            sample.y,
            sequences[: max(1, config.behaviour_tokens // config.n_ctx)],
            {"mean": mean, "ridge": ridge, **{name: open_baseline(name, host, site) for name in config.baseline}},
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )


def print_summary(evaluation: ReplacementEvaluation) -> None:
    floors = ", ".join(f"{name} {floor.nmse:.3f}" for name, floor in evaluation.floors.items())
    b = evaluation.behaviour
    console.print(
        f"held out, {evaluation.tokens:,} tokens: NMSE {evaluation.fit.nmse:.4f} ({floors}), "
        f"FVU {evaluation.fit.fvu:.4f}"
    )
    console.print(
        f"L0 {evaluation.l0:.2f}, active rank {evaluation.active_rank:.0f}, alive {evaluation.alive:.1%}, "
        f"most frequent unit open at {evaluation.max_frequency:.1%} of tokens"
    )
    for rank, group in evaluation.by_rank.items() if len(evaluation.by_rank) > 1 else ():
        console.print(
            f"rank {rank:>4}: {group['units']:>4.0f} units, L0 {group['l0']:.3f}, mean frequency "
            f"{group['mean_frequency']:.3f}, alive {group['alive']:.1%}"
        )
    console.print(
        f"spliced in, {b.tokens:,} tokens: loss {b.ce_spliced:.4f} for {b.ce_host:.4f} of the host (mean ablation "
        f"{b.ce_mean:.4f}, zero {b.ce_zero:.4f}), {b.recovered_mean:.1%} of mean ablation recovered, KL {b.kl:.4f}"
    )


def describe(record: dict, config: MoltRun) -> str:
    """A log record as a line to read; it stays when the output is not a terminal and the bar is not drawn."""
    left = (config.steps - record["step"]) * config.batch_size / record["tokens_per_second"]
    return (
        f"step {record['step']:>6,}/{config.steps:,}  mse {record['mse']:.4f}  L0 {record['l0']:.2f}  rank "
        f"{record['active_rank']:.0f}  opened {record['opened']:.0%}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"{int(left // 60)}:{int(left % 60):02d} left"
    )


def open_baseline(name: str, host: Host, site: Site) -> Replacement:
    """A replacement that was trained elsewhere, for this host and site.

    Raises:
        ValueError: it belongs to another host or site.
    """
    replacement, record = open_replacement(name, host)
    if record.site != site:
        raise ValueError(f"--baseline {name} is of {record.site}, and this run is of {site}")
    return replacement


COMMAND = Command(
    script="train_molt.py",
    what="Train a replacement for one MLP layer of a language model",
    recipes=MOLT_RECIPES,
    default="gemma-3-270m-L9-N1",
    from_dict=molt_run_from_dict,
    train=train,
)

if __name__ == "__main__":
    sys.exit(COMMAND.main())

"""Train a Cayley-GPT: the main job.

    python training/train_cayley.py                                  # recipe tiny: minutes on two CPU cores
    python training/train_cayley.py cayley-small-2L-mlp_in-20B --out /data/small
    accelerate launch training/train_cayley.py vanilla-small-20B     # several processes: the same steps, shared
    python training/train_cayley.py --resume runs/tiny-20260101-120000

The run folder holds config.json, environment.json, metrics.jsonl, checkpoints/, model/ and report.html.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import tyro
from accelerate.utils import broadcast_object_list

from analysis.evaluate import Evaluation, evaluate_run
from analysis.mlp_worth import worth_nothing
from analysis.report import write_report
from cayley_interp.folder import save_pretrained
from cayley_interp.kernels import set_backend
from training.command import Command
from training.data import Corpus, open_corpus
from training.display import console, make_progress
from training.environment import peak_memory
from training.flops import bottleneck_flops_per_token
from training.loop import Trainer, make_accelerator
from training.preflight import preflight, resolve_device
from training.recipes import RECIPES, RunConfig, config_from_dict
from training.run_folder import start_folder
from training.threads import set_up_threads
from training.tracking import MetricsFile, start_tracker

NGRAM_TOKENS = 20_000_000
"""Training tokens that the count models beside the validation loss are made from."""


def train(config: RunConfig, run_dir: Path, resume: bool) -> Path:
    """Run the config in its folder, to the report; returns the folder."""
    set_up_threads(resolve_device(config.device))
    accelerator = make_accelerator(config)
    run_dir = Path(broadcast_object_list([str(run_dir)])[0])  # the default name holds the time: one for all
    preflight(config, run_dir, accelerator.num_processes, resume)
    set_backend(config.backend)
    accelerator.wait_for_everyone()  # every process has looked at the folder before one of them fills it
    if accelerator.is_main_process and not resume:
        start_folder(config, run_dir, accelerator.device, accelerator.num_processes)
    with accelerator.main_process_first():
        corpus = open_corpus(
            config.data,
            config.model.d_vocab,
            config.model.n_ctx,
            config.seed,
            run_dir / "data",
            progress=accelerator.is_main_process,
        )
    trainer = Trainer(config, corpus, run_dir, accelerator)
    if resume:
        trainer.resume()
    if accelerator.is_main_process:
        run_main(config, trainer, corpus, run_dir)
    else:
        trainer.run()
    accelerator.wait_for_everyone()
    return run_dir


def run_main(config: RunConfig, trainer: Trainer, corpus: Corpus, run_dir: Path) -> None:
    """The main process's part: train with a display, save the model, then evaluate and report."""
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    metrics.truncate_after(trainer.step)
    tracker = start_tracker(config.track, run_dir, config.name, asdict(config))
    console.print(
        f"{config.name}: {trainer.model.num_parameters():,} parameters, "
        f"{'at most ' if config.target_val_loss else ''}{trainer.schedule.end:,} steps of "
        f"{config.tokens_per_step:,} tokens on {trainer.accelerator.device} x {trainer.accelerator.num_processes}, "
        f"from step {trainer.step:,}; peak {trainer.peak.flops / 1e12:,.2f} TFLOP/s each ({trainer.peak.source})"
    )
    with make_progress("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s") as bar:
        task = bar.add_task("training", total=trainer.schedule.end, completed=trainer.step, loss=0.0, speed=0.0)

        def log(record: dict) -> None:
            metrics.append(record)
            tracker.log(record, record["step"])
            bar.console.print(describe(record, config, trainer.schedule.end), markup=False)

        def progress(step: int, loss: float, speed: float) -> None:
            bar.update(task, completed=step, total=trainer.schedule.end, loss=loss, speed=speed)

        trainer.run(log, progress)
    trainer.model.tokenizer = corpus.tokenizer
    save_pretrained(trainer.model, run_dir / "model")  # before anything that could fail
    evaluation = evaluate(config, trainer, corpus)
    save_pretrained(
        trainer.model, run_dir / "model", training=training_record(config, trainer.step, evaluation, run_dir)
    )
    final = evaluation.scalars() | {
        "n_parameters": trainer.model.num_parameters(),
        "peak_memory_bytes": peak_memory(trainer.accelerator.device),
        "tokens_per_second": metrics.median("tokens_per_second"),
        "mfu": metrics.median("mfu"),
        "flops_per_token": trainer.flops_per_token,
        "bottleneck_flops_per_token": bottleneck_flops_per_token(config.model),
        "peak_flops": trainer.peak.flops,
        "peak_flops_source": trainer.peak.source,
    }
    record = {"step": trainer.step, "final": final}
    metrics.append(record)
    tracker.log(record, trainer.step)
    tracker.finish()
    report = write_report(run_dir, evaluation)
    print_summary(evaluation)
    print(f"run folder: {run_dir.resolve()}\nreport:     {report.resolve()}", flush=True)


def training_record(config: RunConfig, step: int, evaluation: Evaluation, run_dir: Path) -> dict:
    """What a model's training.json and card say of its making."""
    environment = json.loads((run_dir / "environment.json").read_text())
    shown = {name: environment[name] for name in ("started", "commit", "device", "platform", "processes")}
    versions = {name: environment["versions"][name] for name in ("python", "torch", "accelerate", "cayley-interp")}
    return {
        "recipe": config.name,
        "data": config.data.data,
        "steps": step,
        "tokens": step * config.tokens_per_step,
        **evaluation.scalars(),
        "environment": shown | versions,
    }


def evaluate(config: RunConfig, trainer: Trainer, corpus: Corpus) -> Evaluation:
    """Count models, features with their contexts and a sample of text, all on the validation windows."""
    with make_progress("") as bar, trainer.accelerator.autocast():
        task = bar.add_task("evaluating", total=1.0)
        return evaluate_run(
            trainer.model,
            corpus.tokenizer,
            corpus.train.first_tokens(NGRAM_TOKENS),
            trainer.validation_windows(),
            batch_size=config.batch_size,
            seed=config.seed,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )


def print_summary(evaluation: Evaluation) -> None:
    console.print(
        f"validation loss {evaluation.val_loss:.4f} nats a token over {evaluation.val_tokens:,} tokens "
        f"(bigram {evaluation.bigram_loss:.4f}, unigram {evaluation.unigram_loss:.4f})"
    )
    for layer, levels in enumerate(evaluation.levels):
        for level, s in enumerate(levels):
            console.print(
                f"layer {layer} level {level}: L0 {s.l0:.1f} of {s.n_features:,}; "
                f"{s.dead:,} dead, {s.zombie:,} zombie, {s.dense:,} dense"
            )
    for layer, worth in enumerate(evaluation.mlp_worths):
        note = ": it writes nothing that the loss notices" if worth_nothing(worth) else ""
        console.print(f"MLP of layer {layer} worth {worth.mean:.4f} ± {worth.standard_error:.4f} nats{note}")


def describe(record: dict, config: RunConfig, end: int) -> str:
    """A log record as a line to read; it stays when the output is not a terminal and the bar is not drawn."""
    step = f"step {record['step']:>6,}/{end:,}"
    if "val_loss" in record:
        line = f"{step}  validation loss {record['val_loss']:.4f}"
        return f"{line}\n{record['decision']}" if "decision" in record else line
    left = (end - record["step"]) * config.tokens_per_step / record["tokens_per_second"]
    return (
        f"{step}  loss {record['train_loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"MFU {record['mfu']:.1%}  {int(left // 60)}:{int(left % 60):02d} left"
    )


COMMAND = Command(
    script="train_cayley.py",
    what="Train a Cayley-GPT",
    recipes=RECIPES,
    default="tiny",
    from_dict=config_from_dict,
    train=train,
    markers=(tyro.conf.OmitArgPrefixes,),
)

if __name__ == "__main__":
    sys.exit(COMMAND.main())

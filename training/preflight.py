"""Preflight: everything about a run that would waste a day is found before any weight is made.

    preflight(config, run_dir, world_size, resume)     # PreflightError lists every problem and its way out

Each check is a function of plain values that returns a message or None, so that it can be tried on a GPU or a disk
that is not here; `preflight` looks up the values.
"""

import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from cayley_interp import CayleyGPTConfig
from cayley_interp.bottleneck import parse_levels
from cayley_interp.kernels import has_triton
from training.preflight_software import is_interpreted, missing_compiler, missing_tracker, unusable_backend
from training.recipes import OptimConfig, RunConfig
from training.text import READERS, is_shard_folder

TORCH_BUILD = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
CGROUP = Path("/sys/fs/cgroup")
GB = 1e9
AT_LEAST_ONE = (
    *("n_layers", "n_heads", "d_model", "n_ctx", "d_vocab", "max_steps", "batch_size", "grad_accum"),
    *("val_tokens", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"),
)
AT_LEAST_ZERO = ("warmup", "clip", "weight_decay")


class PreflightError(ValueError):
    """A run that cannot work or would be wasted; the message lists everything found, each with its way out."""


def preflight(config: RunConfig, run_dir: Path, world_size: int, resume: bool) -> None:
    """Check a run on this process's device, and the filesystem of its folder. Leaves nothing behind.

    Every process calls it before any of them writes to `run_dir`: a folder with files in it is a problem.

    Raises:
        PreflightError: listing all problems found.
    """
    device = resolve_device(config.device)
    absent = missing_device(device, torch.cuda.is_available())
    numbers = bad_numbers(config)
    problems = [
        *numbers,
        *bad_schedule(config.optim),
        *([] if numbers or config.target_val_loss is None else bad_cold_stop(config, config.target_val_loss)),
        indivisible(config.grad_accum, world_size),
        unusable_folder(run_dir, resume),
        missing_tracker(config.track),
        unusable_backend(config.backend, device, has_triton(), is_interpreted()),
        absent,
    ]
    if device == "cuda" and not absent:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        problems.append(unsupported_architecture(name, capability, torch.cuda.get_arch_list()))
        if config.precision in ("auto", "bf16") and not torch.version.hip:
            problems.append(without_bf16(name, capability))
    if device == "cpu" and config.compile:
        problems.append(missing_compiler(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")))
    if not numbers:  # the arithmetic below takes the config's numbers for sane
        if not absent:
            problems.append(too_little_memory(config, device, world_size, available_memory(device, world_size)))
        needed = disk_needed(config) - (folder_bytes(run_dir) if resume else 0)
        problems.append(too_little_disk(run_dir, needed, shutil.disk_usage(existing_parent(run_dir)).free))
    if found := [problem for problem in problems if problem]:
        raise PreflightError("\n".join(f"- {problem}" for problem in found))


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- Numbers ----


def bad_numbers(config: RunConfig) -> list[str]:
    """Counts below their least value and shares outside their range; NaN is outside every range."""
    values = {**vars(config.model), **vars(config.data), **vars(config.optim), **vars(config)}
    least = [(name, 1) for name in AT_LEAST_ONE] + [(name, 0) for name in AT_LEAST_ZERO]
    problems = [
        f"{_flag(name)} {values[name]}: expected at least {low}" for name, low in least if not values[name] >= low
    ]
    if not 0 < config.data.val_fraction < 1:
        problems.append(
            f"--val-fraction {config.data.val_fraction}: expected a share of the documents between 0 and 1, both "
            "excluded: both splits need text, for example --val-fraction 0.05"
        )
    return problems


def bad_schedule(optim: OptimConfig) -> list[str]:
    """Learning rates and their schedule."""
    problems = []
    if not 0 <= optim.warmdown_frac <= 1:
        problems.append(f"--warmdown-frac {optim.warmdown_frac}: expected a share of the run, from 0 to 1")
    rates = {"muon": (optim.muon_lr, optim.muon_min_lr), "adamw": (optim.adamw_lr, optim.adamw_min_lr)}
    for name, (peak, low) in rates.items():
        if not 0 <= low <= peak < math.inf or not peak > 0:
            problems.append(
                f"--{name}-lr {peak} and --{name}-min-lr {low}: expected 0 <= minimum <= peak and a peak above 0: "
                "the warm-down falls from the peak to the minimum"
            )
    betas = {"--muon-momentum": optim.muon_momentum, "--adamw-betas": optim.adamw_betas}
    for flag, value in betas.items():
        if not all(0 <= beta < 1 for beta in (value if isinstance(value, tuple) else (value,))):
            problems.append(f"{flag} {value}: expected from 0 to below 1")
    return problems


def bad_cold_stop(config: RunConfig, target: float) -> list[str]:
    """A target loss that cannot be one, or a schedule that could not end at it."""
    problems, frac = [], config.optim.warmdown_frac
    if not (0 < target < math.inf and 0 <= config.target_margin < math.inf):
        problems.append(
            f"--target-val-loss {target} and --target-margin {config.target_margin}: expected nats per token, a finite "
            "target above 0 and a margin of at least 0"
        )
    if frac in (0, 1):
        problems.append(
            f"--warmdown-frac {frac}: a cold stop (--target-val-loss) is a flat part and a warm-down: use 0.5, say"
        )
    first = -(-max(1, config.optim.warmup) // config.eval_every) * config.eval_every
    if first >= config.max_steps:
        problems.append(
            f"--eval-every {config.eval_every}: a cold stop (--target-val-loss) needs a validation loss after --warmup "
            f"{config.optim.warmup} and before --max-steps {config.max_steps}: validate more often"
        )
    return problems


def indivisible(grad_accum: int, world_size: int) -> str | None:
    """A step's micro-batches are shared out evenly, so that it is the same step on any number of processes."""
    if grad_accum < 1 or grad_accum % world_size == 0:
        return None
    down, up = grad_accum // world_size * world_size, -(-grad_accum // world_size) * world_size
    advice = " or ".join(f"--grad-accum {n}" for n in (down, up) if n)
    divisors = [n for n in range(1, world_size) if grad_accum % n == 0]
    return (
        f"--grad-accum {grad_accum} micro-batches cannot be shared evenly by {world_size} processes: use {advice}, "
        f"or run {divisors[-1]} process{'es' if divisors[-1] > 1 else ''}"
    )


# ---- The run's folder ----


def unusable_folder(run_dir: Path, resume: bool) -> str | None:
    """A run folder that cannot be written, or holds something else."""
    parent = existing_parent(run_dir)
    if not parent.is_dir():
        return f"--out {run_dir}: {parent} is a file, not a folder: give another --out"
    if resume and not run_dir.is_dir():
        return f"--resume {run_dir}: there is no such folder; start the run with --out {run_dir}"
    try:
        if not resume and run_dir.is_dir() and any(run_dir.iterdir()):
            return f"--out {run_dir} is not empty: continue it with --resume {run_dir}, or give another --out"
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        return f"--out {run_dir}: {parent} cannot be written ({error.strerror}): give another --out"
    return None


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    # os.path.exists, unlike Path.exists, is False rather than an error behind a folder that may not be read.
    return next(p for p in (path.absolute(), *path.absolute().parents) if os.path.exists(p))


def folder_bytes(folder: Path) -> int:
    """Size of the files below a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_needed(config: RunConfig) -> int:
    """Bytes a run writes: its checkpoints, one more while the oldest is still there, the model, and token shards."""
    model = config.model
    count, itemsize = count_parameters(model), 8 if config.precision == "fp64" else 4
    weights = itemsize * sum(count) + model.n_layers * d_sae(model) * (2 * itemsize + 8)
    optimizer = itemsize * (count.matrices + 2 * count.others)
    shards = text_bytes(config.data.data) // 4 * (2 if model.d_vocab <= 1 << 16 else 4)
    written = min(config.keep_checkpoints + 1, -(-config.max_steps // config.checkpoint_every))
    return written * (weights + optimizer) + weights + shards


def text_bytes(spec: str) -> int:
    """Bytes of text in a local source; 0 for what is streamed, or tokenised already. Parquet is taken as 2.5 : 1."""
    if spec.startswith("hf:") or is_shard_folder(spec):
        return 0
    files = Path(spec).rglob("*") if Path(spec).is_dir() else map(Path, glob(spec, recursive=True))
    sizes = (
        p.stat().st_size * (2.5 if p.suffix == ".parquet" else 1) for p in files if p.suffix in READERS and p.is_file()
    )
    return int(sum(sizes))


def too_little_disk(folder: Path, needed: int, free: int) -> str | None:
    """Args: bytes the run will still write, bytes free on the filesystem of its folder."""
    if needed <= free:
        return None
    return (
        f"the run writes about {needed / GB:.1f} GB (checkpoints and token shards), but the disk of {folder} has "
        f"{free / GB:.1f} GB free: put --out on a larger disk, keep fewer --keep-checkpoints, or stream the text "
        "(--data hf:ID) instead of storing its tokens"
    )


# ---- The device ----


def missing_device(device: str, has_cuda: bool) -> str | None:
    if device == "cuda" and not has_cuda:
        return (
            f"--device cuda: {TORCH_BUILD} finds no usable CUDA device: use --device cpu, or check `nvidia-smi` and "
            f"install a CUDA build, `{_install('cu130')}`"
        )
    return None


def unsupported_architecture(name: str, capability: tuple[int, int], arch_list: list[str]) -> str | None:
    """Whether this build of torch holds code for a GPU of this compute capability.

    `sm_XY` is machine code for X.Y and later minor versions; `compute_XY` is PTX, which the driver compiles for X.Y and
    anything later. Code marked `a` (sm_90a) runs on exactly X.Y, and `f` (sm_100f) within its own family.
    """
    built = [m for arch in arch_list if (m := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch))]
    if not built:  # ROCm has names such as gfx90a
        return None
    for kind, major, minor, suffix in (m.groups() for m in built):
        version = (int(major), int(minor))
        onward = (suffix != "a" and version[0] == capability[0]) or (kind == "compute" and not suffix)
        if version == capability or (version < capability and onward):
            return None
    newer = capability > max((int(m[2]), int(m[3])) for m in built)
    return (
        f"{name} is sm_{capability[0]}{capability[1]}, and {TORCH_BUILD} was built for {', '.join(arch_list)}: install "
        f"a build for {'newer' if newer else 'older'} cards, `{_install('cu130' if newer else 'cu126')}`, or use "
        "--device cpu"
    )


def without_bf16(name: str, capability: tuple[int, int]) -> str | None:
    """bf16 arithmetic came with compute capability 8.0; before it torch emulates it, at a fraction of fp32's speed."""
    if capability >= (8, 0):
        return None
    return (
        f"{name} (compute capability {capability[0]}.{capability[1]}) has no bf16, which needs 8.0 or later: "
        "use --precision fp32"
    )


def _install(build: str) -> str:
    version = torch.__version__.partition("+")[0]
    return f"pip install torch=={version} --index-url https://download.pytorch.org/whl/{build}"


# ---- Memory ----


class ParameterCount(NamedTuple):
    matrices: int
    """2-D hidden weights, trained by Muon."""
    others: int
    """Embeddings, norms and the bottlenecks' biases, trained by AdamW."""


def count_parameters(model: CayleyGPTConfig) -> ParameterCount:
    d = model.d_model
    vectors = model.n_layers * (2 * d + d_sae(model)) + d
    return ParameterCount(model.n_layers * 12 * d * d, (model.d_vocab + model.n_ctx) * d + vectors)


def d_sae(model: CayleyGPTConfig) -> int:
    """Features of one bottleneck, all levels together."""
    return sum(1 << level.n for level in parse_levels(model.levels)) if model.levels else 0


def estimate_memory(
    model: CayleyGPTConfig, batch_size: int, precision: str, device: str, world_size: int
) -> dict[str, int]:
    """Peak bytes of a training step on one process, by part; `precision` is fp32, bf16 or fp64.

    The peak is the start of the backward pass. By then autograd holds, per token and layer, in units of d_model
    numbers: of both RMSNorms the input, the normalised input and the output (6; under autocast the output is held as
    its bf16 casts, one for each of q, k, v and fc_in, and the rest in fp32), q, k, v and the attention output (4; no
    T x T matrix), and the MLP before and after the GELU (8). An active feature holds an int64 index and two numbers.
    The log-softmax of the logits and two gradients as large are in fp32 whatever the precision. Memory that is free
    again at the peak (candidate scores, Muon's iterations) is left out.

    Peak resident memory of the recipe `tiny` on a CPU grew with the batch by 1.01 times these parts where every tensor
    was mapped on its own, plus 105 MB of code and caches, and by 1.33 times in glibc's heap: hence `allocator`.
    """
    count, features = count_parameters(model), d_sae(model) * model.n_layers
    d, layers, tokens = model.d_model, model.n_layers, batch_size * model.n_ctx
    size = 8 if precision == "fp64" else 4
    low = 2 if precision == "bf16" else size
    levels = parse_levels(model.levels) if model.levels else ()
    active = sum(level.k for level in levels)
    casts = 4 if precision == "bf16" else 2
    per_layer = d * (4 * size + (casts + 12) * low) + 4 * model.n_heads + active * (8 + 2 * size)
    tables = layers * 4 * d * d + size * (d * d + (1 << levels[-1].n)) if levels else 0
    copies = low * (count.matrices + model.d_vocab * d) if precision == "bf16" else 0
    activations = tokens * (layers * per_layer + d * (2 * size + low))
    logits = tokens * model.d_vocab * 3 * size
    return {
        "weights": size * sum(count) + copies,
        "gradients": size * sum(count) * (2 if world_size > 1 else 1),  # DDP reduces them in buckets of its own
        "optimiser": size * (count.matrices + 2 * count.others),
        "statistics": features * (2 * size + 8 + 8) + tables,
        "activations": activations,
        "logits": logits,
        "allocator": (activations + logits) // 3 + 100_000_000 if device == "cpu" else 0,
    }


def too_little_memory(config: RunConfig, device: str, world_size: int, available: int) -> str | None:
    """Args: `available` bytes for this process. No margin: a run that hardly fits shows it in its first step."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"

    def parts_of(batch_size: int) -> dict[str, int]:
        return estimate_memory(config.model, batch_size, precision, device, world_size)

    parts = parts_of(config.batch_size)
    if sum(parts.values()) <= available:
        return None
    detail = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
    problem = (
        f"--batch-size {config.batch_size} needs about {sum(parts.values()) / GB:.2f} GB on {device}, where "
        f"{available / GB:.2f} GB are available (in GB: {detail})"
    )
    total = config.batch_size * config.grad_accum
    for batch_size in _smaller_batches(config.batch_size, total, world_size):
        if sum(parts_of(batch_size).values()) <= available:
            return (
                f"{problem}: use --batch-size {batch_size} --grad-accum {total // batch_size}, which keeps the "
                f"{config.tokens_per_step:,} tokens of a step"
            )
    return f"{problem}, and no smaller batch fits: lower --n-ctx, --n-layers or --d-model, or use a larger device"


def _smaller_batches(batch_size: int, total: int, world_size: int) -> Iterator[int]:
    """Micro-batches, largest first, that cut the same step of `total` sequences, evenly among the processes."""
    shares = 1 if total % world_size else world_size  # `indivisible` has its own message
    return (b for b in range(batch_size - 1, 0, -1) if total % (b * shares) == 0)


def available_memory(device: str, world_size: int) -> int:
    """Bytes that one process may still take on its device; the processes of a CPU run share its memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    return min(free, cgroup_memory(CGROUP, free)) // world_size


def cgroup_memory(cgroup: Path, unlimited: int) -> int:
    """Bytes left below the limit of a container (cgroup v2); `unlimited` where there is no limit."""
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return unlimited
    if limit == "max":
        return unlimited
    # Inactive file pages count as used, but are given back under pressure.
    return max(0, int(limit) - int(used) + int(statistics["inactive_file"]))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

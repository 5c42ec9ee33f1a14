"""MOLT steps and inference against the plain form that builds a vector for each token and transform: time and memory.

python -m tests.benchmarks.bench_molt
"""

import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from molt_lens import Molt
from molt_lens.penalties import Penalty, penalty_of
from molt_lens.transforms import dense_transforms
from tests.benchmarks.measure import interleaved, milliseconds, peak_memory_of, publish, resident_growth

D, TOKENS, N_TRAIN, N_EVAL, ACTIVE = 640, 1_024, 4, 50, 8
PENALTY = Penalty("tanh")


def plain_step(molt: Molt, x: Tensor, y: Tensor) -> None:
    """[tokens, T, d] outputs of all transforms, and [T, d, d] transforms for their norms, as public code has it."""
    acts = molt.encode(x)
    outputs, norms = [], []
    for u, v in zip(molt.U.split(molt.ranks), molt.V.split(molt.ranks), strict=True):
        outputs.append(x @ v.T @ u)
        norms.append(u.T @ v)
    recons = (acts[..., None] * torch.stack(outputs, dim=1)).sum(1) + molt.b_dec
    norm = torch.stack(norms).flatten(1).norm(dim=1)
    loss = (recons - y).square().mean() + 1e-3 * (PENALTY.scale * acts * norm).tanh().sum(-1).mean()
    loss.backward()


def our_step(molt: Molt, x: Tensor, y: Tensor) -> None:
    pre = molt.pre_acts(x)
    acts = molt.gate(pre)
    recons = molt.decode_reachable(acts, x, molt.gate.reachable(pre, acts))
    ((recons - y).square().mean() + 1e-3 * penalty_of(PENALTY, molt, pre, acts)).backward()


def training_case(step: Callable[[Molt, Tensor, Tensor], None], gate: str) -> Callable[[], None]:
    torch.manual_seed(0)
    molt = Molt(D, D, n=N_TRAIN, gate=gate).train()
    x, y = torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    molt.calibrate(x, open_rate=0.25, variance=0.01)

    def call() -> None:
        step(molt, x, y)
        molt.zero_grad(set_to_none=True)

    return call


def inference_case(way: str) -> Callable[[], None]:
    torch.manual_seed(0)
    molt = Molt(D, D, n=N_EVAL, gate=f"topk:{ACTIVE}").eval()
    x = torch.randn(TOKENS, D)

    @torch.no_grad()
    def call() -> None:
        if way == "dense":
            dense_transforms(molt.encode(x), x, molt.U, molt.V, molt.ranks)
        else:
            molt(x)

    return call


CASES: dict[str, Callable[[], Callable[[], None]]] = {
    f"training step, ReLU gates open at 25 %, N={N_TRAIN}: plain": lambda: training_case(plain_step, "relu"),
    f"training step, ReLU gates open at 25 %, N={N_TRAIN}: ours": lambda: training_case(our_step, "relu"),
    f"training step, BatchTopK {ACTIVE}, N={N_TRAIN}: plain": lambda: training_case(plain_step, f"batchtopk:{ACTIVE}"),
    f"training step, BatchTopK {ACTIVE}, N={N_TRAIN}: ours": lambda: training_case(our_step, f"batchtopk:{ACTIVE}"),
    f"inference, TopK {ACTIVE}, N={N_EVAL}: gated latents, all transforms": lambda: inference_case("dense"),
    f"inference, TopK {ACTIVE}, N={N_EVAL}: open transforms only": lambda: inference_case("active"),
}


def main() -> None:
    names = list(CASES)
    rows = []
    for baseline, ours in zip(names[::2], names[1::2], strict=True):
        times = interleaved({name: CASES[name]() for name in (baseline, ours)}, rounds=7)
        memory = {name: peak_memory_of("tests.benchmarks.bench_molt", name) for name in (baseline, ours)}
        rows += [
            {
                "what": name,
                "ms, median (range)": milliseconds(times[name]),
                "faster": f"{statistics.median(times[baseline]) / statistics.median(times[name]):.1f}x",
                "peak memory, MB": f"{memory[name] / 1e6:.0f}",
                "share of memory": f"1/{memory[baseline] / memory[name]:.1f}",
            }
            for name in (baseline, ours)
        ]
    square = torch.randn(2_048, 2_048)
    gemm = statistics.median(interleaved({"gemm": lambda: square @ square}, rounds=20)["gemm"])
    publish(
        "bench_molt",
        f"MOLT, d={D}, {TOKENS:,} tokens, fp32, tanh penalty with exact norms included in training steps",
        rows,
        [
            "`plain` builds [tokens, T, d] and [T, d, d], as public implementations do; the second of each pair is "
            "measured against the first.",
            f"The measured rate of a matrix product is {2 * 2_048**3 / gemm / 1e9:.0f} GFLOP/s. Gated latents for all "
            f"transforms at N={N_EVAL} are {4 * TOKENS * D * 2_560 * N_EVAL / 1e9:.0f} GFLOP, "
            f"{4 * TOKENS * D * 2_560 * N_EVAL / (2 * 2_048**3 / gemm) * 1e3:.0f} ms at that rate.",
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(resident_growth(CASES[sys.argv[2]]))
    else:
        main()

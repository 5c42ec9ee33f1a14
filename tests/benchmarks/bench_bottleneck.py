"""CayleySAE forward + backward against a dense TopK layer of the same width, dictionary size and k: time and memory.

python -m tests.benchmarks.bench_bottleneck
"""

import statistics
import sys
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cayley_interp import CayleySAE, CayleySAEConfig
from tests.benchmarks.measure import interleaved, milliseconds, peak_memory_of, publish, resident_growth

D, LEVELS, TOKENS, K = 1024, "10,16,0;15,32,256", 1024, 48
FEATURES = 2**10 + 2**15


class DenseTopK(nn.Module):
    """A plain TopK SAE layer with learned encoder and decoder, as anyone would write it."""

    def __init__(self, sparse_decoder: bool = False):
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(D, FEATURES) / D**0.5)
        self.b_enc = nn.Parameter(torch.zeros(FEATURES))
        self.W_dec = nn.Parameter(torch.randn(FEATURES, D) / D**0.5)
        self.sparse_decoder = sparse_decoder

    def forward(self, x: Tensor) -> Tensor:
        values, indices = (x @ self.W_enc + self.b_enc).topk(K, dim=-1)
        values = values.relu()
        if self.sparse_decoder:
            return F.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return values.new_zeros(len(x), FEATURES).scatter(-1, indices, values) @ self.W_dec


def cayley(routing: Literal["per_parent", "parents"]) -> CayleySAE:
    return CayleySAE(CayleySAEConfig(d_model=D, levels=LEVELS, routing=routing))


CASES: dict[str, Callable[[], nn.Module]] = {
    "dense TopK": DenseTopK,
    "dense TopK, sparse decoder": lambda: DenseTopK(sparse_decoder=True),
    "CayleySAE per_parent": lambda: cayley("per_parent"),
    "CayleySAE parents": lambda: cayley("parents"),
}


def step_of(case: str) -> Callable[[], None]:
    """Forward and backward of 1,024 tokens, statistics included, as in training."""
    torch.manual_seed(0)
    layer = CASES[case]().train()
    x = torch.randn(TOKENS, D, requires_grad=True)
    grad = torch.randn(TOKENS, D)

    def step() -> None:
        layer(x).backward(grad)
        if isinstance(layer, CayleySAE):
            layer.update_statistics()
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def main() -> None:
    times = interleaved({case: step_of(case) for case in CASES}, rounds=7)
    memory = {case: peak_memory_of("tests.benchmarks.bench_bottleneck", case) for case in CASES}
    base = statistics.median(times["dense TopK"])
    x = torch.randn(TOKENS, D)
    copy = statistics.median(interleaved({"copy": lambda: x.clone()}, rounds=50)["copy"])
    rows = [
        {
            "layer": case,
            "ms, median (range)": milliseconds(times[case]),
            "faster than dense TopK": f"{base / statistics.median(times[case]):.1f}x",
            "peak memory, MB": f"{memory[case] / 1e6:.0f}",
            "share of dense TopK's memory": f"1/{memory['dense TopK'] / memory[case]:.1f}",
            "bound: copies of the input": f"{statistics.median(times[case]) / copy:,.0f}",
        }
        for case in CASES
    ]
    publish(
        "bench_bottleneck",
        f"CayleySAE forward + backward, d={D}, {LEVELS}, {TOKENS:,} tokens, fp32",
        rows,
        [
            "`dense TopK` multiplies by a dense code; its `sparse decoder` variant sums the active rows only.",
            "CayleySAE's time includes the running statistics (one d x d moment product and one transform of 2^15).",
            f"A copy of the input takes {1e6 * copy:.0f} microseconds.",
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(resident_growth(lambda: step_of(sys.argv[2])))
    else:
        main()

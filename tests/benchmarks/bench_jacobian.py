"""Exact Jacobian faithfulness in closed form against both Jacobians by batched jacrev, at Gemma 3 270M's layer 9.

python -m tests.benchmarks.bench_jacobian
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from analysis.jacobian import JacobianMeter
from molt_lens import Molt, Replacement
from molt_lens.hosts import Host, Site, load_host
from molt_lens.transforms import dense_transforms
from tests.benchmarks.measure import interleaved, peak_memory_of, publish, resident_growth
from tests.molt_lens.host_models import shake_vectors

D, HIDDEN, ACTIVE = 640, 2_048, 4
TOKENS, JACREV_TOKENS, ROUNDS = 1_024, 4, 7
SITE = Site(0, target="post_norm_out")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def host_and_replacement() -> tuple[Host, Replacement, Tensor]:
    """One block of Gemma's layer-9 size with random weights, and a MOLT of N = 1 whose gate has seen its tokens."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=D,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=64,
        pad_token_id=0,
    )
    model = Gemma3ForCausalLM(config)
    shake_vectors(model)
    x = torch.randn(TOKENS, D)
    replacement = Replacement(Molt(D, D, n=1, gate=f"batchtopk:{ACTIVE}"))
    replacement.train()(x)
    return load_host(model), replacement.eval().requires_grad_(False), x


def closed_form_case(dtype: torch.dtype) -> Callable[[], None]:
    host, replacement, x = host_and_replacement()
    meter = JacobianMeter(host, SITE, replacement, dtype=dtype)
    return lambda: meter.add(x)


def jacrev_case(dtype: torch.dtype) -> Callable[[], Tensor]:
    """Cosines from both Jacobians of a few tokens at a time, as vmap(jacrev) gives them."""
    host, replacement, x = host_and_replacement()
    modules = host.modules(SITE)
    mlp, gain, x = modules.mlp.to(dtype), 1 + modules.target_module.weight.to(dtype), x.to(dtype)
    map = replacement.to(dtype).folded()

    def true(x: Tensor) -> Tensor:
        y = mlp(x)
        return y * (y.square().mean() + modules.target_module.eps).rsqrt() * gain

    def molt(x: Tensor) -> Tensor:
        acts = map.gate((x - map.centre) @ map.W_enc.T + map.b_enc)
        return dense_transforms(acts, x - map.centre, map.U, map.V, map.ranks)

    both = torch.func.vmap(torch.func.jacrev(lambda x: (true(x), molt(x))))

    def call() -> Tensor:
        J, other = (J.flatten(1) for J in both(x[:JACREV_TOKENS]))
        return (J * other).sum(1) / (J.norm(dim=1) * other.norm(dim=1))

    return call


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    f"{name}: {way}": lambda case=case, dtype=dtype: case(dtype)
    for name, dtype in DTYPES.items()
    for way, case in (("jacrev of both maps", jacrev_case), ("closed form", closed_form_case))
}


def static_seconds(dtype: torch.dtype) -> tuple[float, int]:
    """What making the static matrices takes, and their bytes: all but the comparison of one token."""
    host, replacement, x = host_and_replacement()
    start = time.perf_counter()
    meter = JacobianMeter(host, SITE, replacement, dtype=dtype)
    meter.add(x[:1])
    return time.perf_counter() - start, meter.static_bytes()


def _milliseconds(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.3f} ({1e3 * min(times):.3f}-{1e3 * max(times):.3f})"


def main() -> None:
    rows, notes = [], []
    for name, dtype in DTYPES.items():
        baseline, ours = (f"{name}: {way}" for way in ("jacrev of both maps", "closed form"))
        times = interleaved({case: CASES[case]() for case in (baseline, ours)}, ROUNDS)
        tokens = {baseline: JACREV_TOKENS, ours: TOKENS}
        per_token = {case: [seconds / tokens[case] for seconds in times[case]] for case in times}
        medians = {case: statistics.median(seconds) for case, seconds in per_token.items()}
        rows += [
            {
                "what": case,
                "ms a token, median (range)": _milliseconds(per_token[case]),
                "tokens/s": f"{1 / medians[case]:,.0f}",
                "faster": f"{medians[baseline] / medians[case]:.0f}x",
                "peak memory, MB": f"{peak_memory_of('tests.benchmarks.bench_jacobian', case) / 1e6:.0f}",
            }
            for case in (baseline, ours)
        ]
        seconds, nbytes = static_seconds(dtype)
        notes.append(f"Static matrices in {name}: {seconds:.1f} s once, {nbytes / 1e6:.0f} MB.")
    publish(
        "bench_jacobian",
        f"Jacobian faithfulness, gated MLP (d={D}, m={HIDDEN}, post-norm) and a MOLT of N=1, BatchTopK {ACTIVE}",
        rows,
        [*notes, f"jacrev takes {JACREV_TOKENS} tokens at a time, the closed form {TOKENS:,} in blocks of 256."],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(resident_growth(CASES[sys.argv[2]]))
    else:
        main()

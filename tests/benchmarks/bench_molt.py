"""MOLT steps and inference against gated latents of all transforms, and against the plain form of public code."""

from collections.abc import Callable

import torch
from torch import Tensor

from molt_lens import Molt
from molt_lens.molt import LADDER, ladder_ranks
from molt_lens.penalties import Penalty
from molt_lens.transforms import dense_transforms, frobenius_norms
from tests.benchmarks.measure import DTYPES, Bound, Call, Group

NOTES = [
    "MOLT: `plain` builds [tokens, T, d] and [T, d, d], as public implementations do; `gated latents` computes V x for "
    "all transforms, gates it, and multiplies by U; `open transforms` is what is used. The bound is the arithmetic of "
    "the open transforms alone (twice that for a backward pass) at the rate of a plain GEMM.",
]

D, N, ACTIVE = 768, 50, 8
TOKENS = 4_096
PLAIN_D, PLAIN_N, PLAIN_TOKENS = 640, 4, 1_024
PENALTY = Penalty("tanh")
DTYPE = {"cpu": "fp32", "cuda": "bf16"}


def molt_of(device: str, dtype: torch.dtype, d: int, n: int, tokens: int, gate: str) -> tuple[Molt, Tensor, Tensor]:
    torch.manual_seed(0)
    molt = Molt(d, d, n=n, gate=gate)
    x = torch.randn(tokens, d)
    if gate == "relu":
        molt.calibrate(x, open_rate=0.25, variance=0.01)
    return molt.to(device, dtype).train(), x.to(device, dtype), torch.randn_like(x).to(device, dtype)


Forward = Callable[[Molt, Tensor], Tensor]


def gated_latents(molt: Molt, x: Tensor) -> Tensor:
    return dense_transforms(molt.encode(x), x, molt.U, molt.V, molt.ranks) + molt.b_dec


def plain(molt: Molt, x: Tensor) -> Tensor:
    outputs = [x @ v.T @ u for u, v in zip(molt.U.split(molt.ranks), molt.V.split(molt.ranks), strict=True)]
    return (molt.encode(x)[..., None] * torch.stack(outputs, dim=1)).sum(1) + molt.b_dec


def open_transforms(molt: Molt, x: Tensor) -> Tensor:
    return molt(x)


def training(device: str, forward: Forward) -> Call:
    molt, x, y = molt_of(device, DTYPES[DTYPE[device]], D, N, TOKENS, f"topk:{ACTIVE}")

    def call() -> None:
        (forward(molt, x) - y).square().mean().backward()
        molt.zero_grad(set_to_none=True)

    return call


def inference(device: str, forward: Forward) -> Call:
    molt, x, _ = molt_of(device, DTYPES[DTYPE[device]], D, N, TOKENS, f"topk:{ACTIVE}")
    molt.eval()

    def call() -> None:
        with torch.no_grad():
            forward(molt, x)

    return call


def plain_norms(molt: Molt) -> Tensor:
    """From the [T, d, d] transforms themselves."""
    pairs = zip(molt.U.split(molt.ranks), molt.V.split(molt.ranks), strict=True)
    return torch.stack([u.T @ v for u, v in pairs]).flatten(1).norm(dim=1)


def penalised(device: str, gate: str, forward: Forward, norms: Callable[[Molt], Tensor]) -> Call:
    molt, x, y = molt_of(device, torch.float32, PLAIN_D, PLAIN_N, PLAIN_TOKENS, gate)

    def call() -> None:
        penalty = (PENALTY.scale * molt.encode(x) * norms(molt)).tanh().sum(-1).mean()
        ((forward(molt, x) - y).square().mean() + PENALTY.weight * penalty).backward()
        molt.zero_grad(set_to_none=True)

    return call


def flops(d: int, n: int, tokens: int) -> float:
    """Of the open transforms' forward pass: two products of the mean rank, for each of the open ones."""
    ranks = ladder_ranks(n, d, LADDER)
    return tokens * ACTIVE * 4 * d * sum(ranks) / len(ranks)


def groups(device: str) -> list[Group]:
    ways: dict[str, Forward] = {"gated latents": gated_latents, "open transforms": open_transforms}
    shape = f"{TOKENS:,} tokens, d={D}, N={N}, TopK {ACTIVE}"
    made = [
        Group(
            f"MOLT {what}",
            shape,
            DTYPE[device],
            {name: lambda forward=forward, setup=setup: setup(device, forward) for name, forward in ways.items()},
            Bound(flops=times * flops(D, N, TOKENS)),
            tokens=TOKENS,
            rounds=3 if device == "cpu" else 7,
            memory=True,
        )
        for what, setup, times in (("inference", inference, 1), ("forward + backward", training, 3))
    ]
    plain_shape = f"{PLAIN_TOKENS:,} tokens, d={PLAIN_D}, N={PLAIN_N}"
    for gate, opened in (("relu", "ReLU open at 25 %"), (f"batchtopk:{ACTIVE}", f"BatchTopK {ACTIVE}")):
        cases: dict[str, Callable[[], Call]] = {
            "plain": lambda gate=gate: penalised(device, gate, plain, plain_norms),
            "gated latents": lambda gate=gate: penalised(device, gate, gated_latents, lambda molt: molt.norms()),
            "open transforms": lambda gate=gate: penalised(device, gate, open_transforms, lambda molt: molt.norms()),
        }
        made.append(
            Group(
                "MOLT forward + backward with a tanh penalty on exact norms",
                f"{plain_shape}, {opened}",
                "fp32",
                cases,
                tokens=PLAIN_TOKENS,
                memory=True,
            )
        )
    return [*made, norms_group(device)]


def norms_group(device: str) -> Group:
    """What exact norms cost beside one open step: by the matrices, and by Gram matrices of each rank."""

    def of(norms: Callable[[Molt], Tensor]) -> Call:
        molt, _, _ = molt_of(device, torch.float32, PLAIN_D, PLAIN_N, 1, f"topk:{ACTIVE}")

        def call() -> None:
            norms(molt).sum().backward()
            molt.zero_grad(set_to_none=True)

        return call

    return Group(
        "Frobenius norms of all transforms, forward + backward",
        f"d={PLAIN_D}, N={PLAIN_N}",
        "fp32",
        {
            "[T, d, d]": lambda: of(plain_norms),
            "Gram matrices": lambda: of(lambda molt: frobenius_norms(molt.U, molt.V, molt.ranks)),
        },
        Bound(flops=8 * PLAIN_D * sum(rank**2 for rank in ladder_ranks(PLAIN_N, PLAIN_D, LADDER))),
    )

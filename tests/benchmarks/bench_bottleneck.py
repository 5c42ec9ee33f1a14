"""CayleySAE against TopK layers of the same width, dictionary size and k, and its parts against what they replace."""

import os
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cayley_interp import CayleyDictionary, CayleySAE, CayleySAEConfig
from cayley_interp.atoms import analyse, synthesise
from cayley_interp.kernels import set_backend
from cayley_interp.routing import child_scores_by_bucket, child_scores_by_transform
from cayley_interp.sign_tables import child_tables, sign_tables
from tests.benchmarks.measure import DTYPES, Bound, Call, Group

NOTES = [
    "TopK layers: `dense decoder` multiplies by a dense code, `sparse decoder` sums the 48 active rows; SAELens is its "
    "TopKTrainingSAE, sparsify EleutherAI's encode and decode. CayleySAE's time has the running statistics in it. The "
    "bound is a copy of x, the output and their gradients.",
    "Children: the bound is the products of all children of the open parents, at a plain GEMM's rate; sums of buckets "
    "do a sixth of that arithmetic.",
]

D, LEVELS, K = 1024, "10,16,0;15,32,256", 48
FEATURES = 2**10 + 2**15
TOKENS = {"cpu": 1_024, "cuda": 16_384}
DTYPE = {"cpu": "fp32", "cuda": "bf16"}


class TopK(nn.Module):
    """A plain TopK SAE layer with learned encoder and decoder, as anyone would write it."""

    def __init__(self, sparse_decoder: bool):
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


class Sparsify(nn.Module):
    """EleutherAI's SparseCoder without its loss: its fused encoder and, on a GPU, its Triton decoder."""

    def __init__(self, device: str):
        super().__init__()
        if device == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify import SparseCoder, SparseCoderConfig

        self.coder = SparseCoder(D, SparseCoderConfig(num_latents=FEATURES, k=K))

    def forward(self, x: Tensor) -> Tensor:
        code = self.coder.encode(x)
        return self.coder.decode(code.top_acts, code.top_indices)


def saelens(device: str, dtype: str) -> nn.Module:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    names = {"fp32": "float32", "bf16": "bfloat16"}
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=FEATURES, k=K, device=device, dtype=names[dtype]))


def cayley(routing: Literal["per_parent", "parents"]) -> CayleySAE:
    return CayleySAE(CayleySAEConfig(d_model=D, levels=LEVELS, routing=routing))


def step_of(make: Callable[[], nn.Module], device: str) -> Call:
    """Forward and backward of a batch, statistics included, as in training."""
    torch.manual_seed(0)
    dtype = DTYPES[DTYPE[device]]
    layer = make().to(device).train()
    if not isinstance(layer, CayleySAE):
        layer.to(dtype)
    x = torch.randn(TOKENS[device], D, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> None:
        layer(x).backward(grad)
        if isinstance(layer, CayleySAE):
            layer.update_statistics()
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def layers(device: str) -> Group:
    makes: dict[str, Callable[[], nn.Module]] = {
        "TopK, dense decoder": lambda: TopK(sparse_decoder=False),
        "TopK, sparse decoder": lambda: TopK(sparse_decoder=True),
        "SAELens TopK": lambda: saelens(device, DTYPE[device]),
        "sparsify TopK": lambda: Sparsify(device),
        "CayleySAE per_parent": lambda: cayley("per_parent"),
        "CayleySAE parents": lambda: cayley("parents"),
    }
    return Group(
        "Sparse layer, forward + backward",
        f"{TOKENS[device]:,} tokens, d={D}, {LEVELS}",
        DTYPE[device],
        {name: lambda make=make: step_of(make, device) for name, make in makes.items()},
        Bound(bytes=4 * TOKENS[device] * D * DTYPES[DTYPE[device]].itemsize),
        tokens=TOKENS[device],
        memory=True,
    )


# ---- Parts ----

SHAPES = ((7, 12, 8, 16), (10, 15, 16, 32))
"""log2 d, log2 leaves, open parents, active leaves: of the bundled model and of the published small ones."""
CHUNK = {"cpu": 128, "cuda": 16_384}
"""Tokens at d = 1,024 where a whole level's scores are built: on a processor no more than its cache holds."""


def inputs(device: str, t: int, of_token: int, below: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens and, for each, some features below a bound."""
    torch.manual_seed(0)
    return torch.randn(tokens, 2**t, device=device), torch.randint(below, (tokens, of_token), device=device)


def children(device: str, t: int, n: int, p: int) -> Group:
    tokens, dictionary = CHUNK[device] << 10 - t, CayleyDictionary(t, n)
    where = torch.device(device), torch.float32

    def by_transform() -> Call:
        x, parents = inputs(device, t, p, 2**t, tokens)
        level = sign_tables(dictionary, n, *where)
        return lambda: child_scores_by_transform(x, parents, t, level)

    def by_product() -> Call:
        x, parents = inputs(device, t, p, 2**t, tokens)
        level = sign_tables(dictionary, n, *where)
        patterns = level.patterns.T / 2 ** (t / 2)
        return lambda: (level.walsh[parents] * x[:, None]) @ patterns

    def by_bucket() -> Call:
        x, parents = inputs(device, t, p, 2**t, tokens)
        tables = child_tables(dictionary, t, n, *where)
        return lambda: child_scores_by_bucket(x, parents, tables)

    n_children = 2 ** (n - t)
    return Group(
        "Scores of the children of open parents",
        f"{tokens:,} tokens, d={2**t:,}, {p} parents of {n_children} children",
        "fp32",
        {"whole level by transforms": by_transform, "row products": by_product, "bucketed sums": by_bucket},
        Bound(flops=tokens * p * 2**t * (1 + 2 * n_children)),
        tokens=tokens,
    )


def atom_products(device: str, t: int, n: int, k: int) -> list[Group]:
    """Both products with the active atoms, by rows of signs in torch and, on a GPU, by Triton's parities."""
    tokens, dictionary = TOKENS[device], CayleyDictionary(t, n)

    def setup(product: str, backend: str) -> Call:
        x, u = inputs(device, t, k, 2**n, tokens)
        values = torch.randn(tokens, k, device=device)
        tables = sign_tables(dictionary, n, x.device, x.dtype)
        if backend == "atoms as a matrix":
            atoms = dictionary.atoms(torch.arange(2**n)).to(device)
            if product == "analyse":
                return lambda: (x @ atoms.T).gather(-1, u)
            return lambda: values.new_zeros(tokens, 2**n).scatter_(-1, u, values) @ atoms

        def call() -> None:
            set_backend(backend)
            with torch.no_grad():
                analyse(x, u, tables) if product == "analyse" else synthesise(u, values, tables)
            set_backend("auto")

        return call

    backends = ("atoms as a matrix", "torch", *(("triton",) if device == "cuda" else ()))
    return [
        Group(
            f"Products with {k} active atoms: {product}",
            f"{tokens:,} tokens, d={2**t:,}, {2**n:,} atoms",
            "fp32",
            {backend: lambda own=(product, backend): setup(*own) for backend in backends},
            Bound(bytes=tokens * (4 * 2**t + 12 * k)),
            tokens=tokens,
        )
        for product in ("analyse", "synthesise")
    ]


def groups(device: str) -> list[Group]:
    parts = [group for t, n, _, k in SHAPES for group in atom_products(device, t, n, k)]
    return [layers(device), *(children(device, t, n, p) for t, n, p, _ in SHAPES), *parts]

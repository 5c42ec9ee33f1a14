"""Compiled models beside eager ones: `python -m tests.cayley_interp.compiled BACKEND VARIANT...` prints what differs.

In a process of its own: torch.compile cannot trace the run-time checks of shapes that tests are run with.
"""

import copy
import json
import sys
import traceback

import torch
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

from cayley_interp import CayleyGPT, CayleyGPTConfig
from cayley_interp.kernels import set_backend

LEVELS = "4,3,0;6,4,4"
VARIANTS = {
    "vanilla": {"levels": None},
    "per_parent": {"levels": LEVELS},
    "one pattern": {"levels": "4,3,0"},
    "parents": {"levels": "4,3,0;7,5,6", "routing": "parents"},
    "signed": {"levels": LEVELS, "signed": True},
    "token": {"levels": LEVELS, "score_standardize": "token"},
    "raw": {"levels": LEVELS, "score_standardize": "none", "forward_standardized": False},
    "three levels": {"levels": "4,3,0;6,4,3;7,5,9"},
    "three levels, parents": {"levels": "4,3,0;6,4,4;7,5,9", "routing": "parents"},
}


def make(dtype: torch.dtype = torch.float64, **options) -> CayleyGPT:
    torch.manual_seed(0)
    model = CayleyGPT(CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=16, d_vocab=50, **options)).to(dtype)
    return model.train()


def graphs_of_same_steps(compiled_by: str, options: dict, dtype: torch.dtype, atol: float) -> int:
    """Two steps of two micro-batches each, then an evaluation, by both; returns the number of graphs compiled."""
    eager = make(dtype, **options)
    twin = copy.deepcopy(eager).train()
    graphs = CompileCounterWithBackend(compiled_by)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend=graphs)
    tokens = torch.randint(50, (4, 3, 16), generator=torch.Generator().manual_seed(1))
    for i, batch in enumerate(tokens):
        expected, got = eager(batch), compiled(batch)
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)
        for logits in (expected, got):
            logits.logsumexp(-1).sum().backward()
        for (name, p), q in zip(eager.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=atol, msg=name)
        if i % 2:
            for bottleneck in (*eager.bottlenecks(), *twin.bottlenecks()):
                bottleneck.update_statistics()
    for (name, a), b in zip(eager.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=atol, msg=name)
    assert all(bottleneck.n_updates == 2 or options.get("score_standardize") for bottleneck in twin.bottlenecks())
    trained = graphs.frame_count
    torch.testing.assert_close(compiled.eval()(tokens[0]), eager.eval()(tokens[0]), rtol=0, atol=atol)
    return trained


def largest_graph() -> int:
    """Operations of a forward pass: its tables, were they made in it, would be hundreds of them."""
    graphs = EagerAndRecordGraphs()
    torch.compiler.reset()
    torch.compile(make(levels=LEVELS).eval(), fullgraph=True, backend=graphs)(torch.zeros(1, 16, dtype=torch.int64))
    names = [str(node.target) for node in graphs.graphs[0].graph.nodes]
    assert not any("kron" in name or "bitwise_xor" in name for name in names), names
    return len(names)


def graphs_with_kernels(compiled_by: str) -> int:
    """The same with the Triton kernels in both, which take float32 at most."""
    set_backend("triton")
    try:
        return graphs_of_same_steps(compiled_by, VARIANTS["per_parent"], torch.float32, atol=1e-4)
    finally:
        set_backend("auto")


def outcome(backend: str, name: str) -> int | str:
    try:
        if name == "tables":
            return largest_graph()
        if name == "kernels":
            return graphs_with_kernels(backend)
        return graphs_of_same_steps(backend, VARIANTS[name], torch.float64, atol=1e-10)
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    print(json.dumps({name: outcome(sys.argv[1], name) for name in sys.argv[2:]}))

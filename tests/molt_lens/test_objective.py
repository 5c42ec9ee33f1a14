"""A step of training: what it must never build, and what brings silent units back."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from molt_lens import Molt, Replacement
from molt_lens.objective import REVIVAL, fit_of, revive_
from molt_lens.penalties import Penalty, penalty_of

TOKENS, D, LADDER = 50, 64, ((8, 1), (4, 2), (2, 4))
TRANSFORMS = 7
GATES = ("relu", "jumprelu", "topk:2", "batchtopk:2")


class LargestTensor(TorchDispatchMode):
    """Size of the largest tensor that any operation gives, forward or backward."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return given


@pytest.mark.parametrize(
    ("gate", "penalty"),
    [
        *(
            (gate, penalty)
            for gate in ("relu", "jumprelu", "topk:2", "batchtopk:2")
            for penalty in ("none", "tanh", "l1")
        ),
        ("jumprelu", "l0"),
    ],
)
def test_no_vector_per_token_and_transform_and_no_matrix_per_transform(gate, penalty):
    torch.manual_seed(0)
    replacement = Replacement(Molt(D, D, gate=gate, skip=True, ladder=LADDER))
    x, y = torch.randn(TOKENS, D), torch.randn(TOKENS, D)
    replacement.map.calibrate(replacement.input(x), 0.25, 0.01)
    with LargestTensor() as largest:
        fit = fit_of(replacement, x, y)
        (fit.mse + penalty_of(Penalty(penalty), replacement.map, fit.pre, fit.acts)).backward()
    assert largest.numbers >= TOKENS * D  # what a batch itself has was seen
    assert largest.numbers <= max(TOKENS * D, D * D)
    assert largest.numbers < min(TOKENS * TRANSFORMS * D, TRANSFORMS * D * D)


def test_revival_raises_the_silent_alone():
    molt = Molt(D, D, gate="relu", ladder=LADDER)
    silent = torch.tensor([True, False] * 3 + [False])
    revive_(molt, silent)
    assert molt.b_enc.tolist() == pytest.approx([REVIVAL if s else 0.0 for s in silent.tolist()])

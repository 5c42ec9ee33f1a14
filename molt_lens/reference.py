"""Reference mode: a MOLT that starts and learns as crosslayer-transcoder's do, to lay curves over those of its runs.

    molt = reference_molt(768, 768, n=50)
    loss = mse + penalty_weight(REFERENCE_PENALTY, step, steps) * penalty_of(REFERENCE_PENALTY, molt, pre, acts)

https://github.com/Goreg12345/crosslayer-transcoder at 548561a, model/molt.py and MoltModule in model/clt_lightning.py.
Its run: layer 8 of GPT-2 small, from `pre_norm_in` to `mlp_out`; 20,000 steps of 1,000 tokens; Adam at a constant 2e-4
with betas 0.9 and 0.999, no clipping; no revival; nothing calibrated. The squared error is a mean over tokens and
dimensions, in standardised coordinates.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from molt_lens.crosslayer import molt_of_groups
from molt_lens.molt import LADDER, Ladder, Molt
from molt_lens.penalties import Penalty
from molt_lens.standardize import Replacement

REFERENCE_PENALTY = Penalty(kind="tanh", weight=5e-4, warmup=1.0, scale=100.0)
"""sum_t tanh(100 ||U_t V_t||_F g_t), mean over tokens, its weight rising over the whole run; 1e-4 and 1e-5 were run
as well."""

THETA, BANDWIDTH = 0.03, 1.0
SMALLEST_STD = 1e-8


@torch.no_grad()
def reference_molt(d_in: int, d_out: int, *, n: int, ladder: Ladder = LADDER) -> Molt:
    """An untrained MOLT with that project's gates and start, without an output bias to learn.

    Its initial rule reads [transforms, rank, d] as a convolution's kernel: U_t is uniform in +-sqrt(6 / (d (r + n_r))),
    V_t in +-sqrt(6 / (r (d + n_r))), for n_r transforms of rank r. Drawn in its order: the same seed gives its weights.

    Args:
        n: multiplies the ladder; 50 in its run.
    """
    detectors = nn.Linear(d_in, n * sum(count for _, count in ladder))
    sizes = [(n * count, min(rank, d_in, d_out)) for rank, count in ladder]
    Us = [nn.init.xavier_uniform_(torch.empty(count, rank, d_out)) for count, rank in sizes]
    Vs = [nn.init.xavier_uniform_(torch.empty(count, d_in, rank)) for count, rank in sizes]
    theta = torch.full_like(detectors.bias, THETA)
    molt = molt_of_groups(Us, Vs, detectors.weight, detectors.bias, theta, torch.tensor(BANDWIDTH))
    molt.b_dec.requires_grad_(False)
    return molt


@torch.no_grad()
def set_reference_statistics(
    replacement: Replacement, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]
) -> None:
    """Standardise as that project does: by its first batch, 1,000 tokens, which is trained on as well.

    A dimension without variance is divided by 1e-8, which is no guard: at another value than that batch's its input is
    enormous.
    """
    for standardizer, batch in ((replacement.input, x), (replacement.output, y)):
        standardizer.mean.copy_(batch.mean(0))
        standardizer.std.copy_(batch.std(0).clamp(min=SMALLEST_STD))

"""sum_t g_t U_t V_t x over the transforms that are open: the active-only path, its dense reference, and their norms."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cayley_interp.kernels import takes_triton


def dense_transforms(
    acts: Float[Tensor, "token unit"],
    x: Float[Tensor, "token d_in"],
    U: Float[Tensor, "latent d_out"],
    V: Float[Tensor, "latent d_in"],
    ranks: list[int],
) -> Float[Tensor, "token d_out"]:
    """All latents V x, each gated by its transform, through U: two matrix products."""
    repeats = torch.tensor(ranks, device=x.device)
    gates = acts.repeat_interleave(repeats, dim=-1, output_size=len(U))
    return (x @ V.T * gates) @ U


def active_transforms(
    acts: Float[Tensor, "token unit"],
    x: Float[Tensor, "token d_in"],
    U: Float[Tensor, "latent d_out"],
    V: Float[Tensor, "latent d_in"],
    ranks: list[int],
    reachable: Bool[Tensor, "token unit"],
) -> Float[Tensor, "token d_out"]:
    """The same sum, computed forward and backward for the reachable (token, transform) pairs only.

    Acts that are not reachable must be 0; their gradient is taken to be 0. Under autocast the products are in its dtype
    and their sum in float32.
    """
    device = x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    acts, x, U, V = acts.to(low), x.to(low), U.to(low), V.to(low)
    with torch.autocast(device, enabled=False):
        if takes_triton(x):
            from molt_lens.kernels.grouped import grouped_transforms

            return grouped_transforms(acts, x, U, V, ranks, reachable)
        return _ActiveTransforms.apply(acts, x, U, V, ranks, reachable)


class _ActiveTransforms(torch.autograd.Function):
    """Transform by transform, the tokens at which it is open are gathered, mapped and added back."""

    @staticmethod
    def forward(ctx, acts, x, U, V, ranks, reachable):
        groups = _tokens_of(reachable)
        y = x.new_zeros(len(x), U.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        latents = []
        for t, (tokens, u, v) in enumerate(zip(groups, U.split(ranks), V.split(ranks), strict=True)):
            latents.append(x[tokens] @ v.T)
            if len(tokens):
                y.index_add_(0, tokens, ((latents[t] * acts[tokens, t, None]) @ u).to(y.dtype))
        ctx.save_for_backward(acts, x, U, V, *groups, *latents)
        ctx.ranks = ranks
        return y

    @staticmethod
    def backward(ctx, *grads):
        (grad_y,) = grads
        acts, x, U, V, *rest = ctx.saved_tensors
        groups, latents = rest[: len(ctx.ranks)], rest[len(ctx.ranks) :]
        grad_acts, grad_U, grad_V = torch.zeros_like(acts), torch.zeros_like(U), torch.zeros_like(V)
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        rows = zip(*(tensor.split(ctx.ranks) for tensor in (U, V, grad_U, grad_V)), strict=True)
        for t, (u, v, grad_u, grad_v) in enumerate(rows):
            tokens, h = groups[t], latents[t]
            if not len(tokens):
                continue
            gate, grad_out = acts[tokens, t, None], grad_y[tokens].to(x.dtype)
            grad_gated = grad_out @ u.T
            grad_acts[tokens, t] = (grad_gated * h).sum(-1)
            torch.mm((h * gate).T, grad_out, out=grad_u)
            grad_h = grad_gated * gate
            torch.mm(grad_h.T, x[tokens], out=grad_v)
            if grad_x is not None:
                grad_x.index_add_(0, tokens, grad_h @ v)
        return grad_acts, grad_x, grad_U, grad_V, None, None


def _tokens_of(reachable: Bool[Tensor, "token unit"]) -> list[Tensor]:
    """For each unit the tokens that reach it."""
    units, tokens = reachable.T.nonzero(as_tuple=True)
    return list(tokens.split(torch.bincount(units, minlength=reachable.shape[1]).tolist()))


def frobenius_norms(
    U: Float[Tensor, "latent d_out"], V: Float[Tensor, "latent d_in"], ranks: list[int]
) -> Float[Tensor, " unit"]:
    """||U_t V_t||_F of each transform from Gram matrices of its rank: sqrt(sum (U_t^T U_t) * (V_t V_t^T)).

    In the dtype of the weights under autocast too: squares of squares leave no room for less.
    """
    with torch.autocast(U.device.type, enabled=False):
        return _SquaredNorms.apply(U, V, ranks).sqrt()


class _SquaredNorms(torch.autograd.Function):
    """Gram matrices serve twice: their product is the norm, and each times the other factor is half a gradient."""

    @staticmethod
    def forward(ctx, U, V, ranks):
        grams = [(u @ u.T, v @ v.T) for u, v in zip(U.split(ranks), V.split(ranks), strict=True)]
        ctx.save_for_backward(U, V, *(gram for pair in grams for gram in pair))
        ctx.ranks = ranks
        return torch.stack([(of_u * of_v).sum() for of_u, of_v in grams])

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        U, V, *grams = ctx.saved_tensors
        grad_U, grad_V = torch.empty_like(U), torch.empty_like(V)
        rows = zip(*(tensor.split(ctx.ranks) for tensor in (U, V, grad_U, grad_V)), strict=True)
        for t, (u, v, grad_u, grad_v) in enumerate(rows):
            torch.mm(2 * grad[t] * grams[2 * t + 1], u, out=grad_u)
            torch.mm(2 * grad[t] * grams[2 * t], v, out=grad_v)
        return grad_U, grad_V, None

"""From the residual stream to the logits by the direct path: the final norm, its scale held, and the unembedding."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analysis.dashboards.sources import centred
from analysis.true_mlp import read_norm
from molt_lens.hosts import Host

FINAL_NORMS = ("model.norm", "model.language_model.norm", "transformer.ln_f", "norm_f")
"""Where it is in the families of `molt_lens.families`."""


class Readout:
    """The last two steps of a model.

    Attributes:
        module: is called with the residual stream that the final norm reads.
        norm: its weights, in float32.
        W_U: [d_vocab, d_model].
    """

    def __init__(self, norm: nn.Module, W_U: Float[Tensor, "d_vocab d_model"], called: nn.Module | None = None):
        """
        Args:
            norm: the final norm, with its weights.
            called: what stands about it in the model; by default nothing.

        Raises:
            ValueError: a norm that is not known.
        """
        self.module = norm if called is None else called
        self.norm, self.W_U = read_norm(norm, torch.float32), W_U.detach()

    @torch.no_grad()
    def scale(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """What the norm divides by at each token."""
        return self.norm.normalise(residual.float().flatten(0, -2))[1].view(*residual.shape[:-1], 1)

    @torch.no_grad()
    def logits(self, written: Float[Tensor, "event d_model"]) -> Float[Tensor, "event d_vocab"]:
        """Changes of the logits about their mean, before any cap on logits, by what has passed the norm."""
        return centred((written.to(self.W_U) @ self.W_U.T).float())


def readout_of(host: Host) -> Readout:
    """
    Raises:
        ValueError: the final norm of the host is not where those of the known families are.
    """
    names = {name for name, _ in host.model.named_modules()}
    found = next((name for name in FINAL_NORMS if name in names), None)
    if found is None:
        raise ValueError(
            f"{host.name} has none of {', '.join(FINAL_NORMS)}: where its final norm is, is not known here"
        )
    return Readout(host.model.get_submodule(found), unembedding(host))


def unembedding(host: Host) -> Float[Tensor, "d_vocab d_model"]:
    model: Any = host.model
    return (model.head if hasattr(model, "head") else model.get_output_embeddings()).weight


def embedding(host: Host) -> Float[Tensor, "d_vocab d_model"]:
    model: Any = host.model
    return (model.tok if hasattr(model, "tok") else model.get_input_embeddings()).weight


class NormReached(Exception):
    """Ends a forward pass at the final norm: what is behind it, most of all the unembedding, nobody needs."""


def residual_of(readout: Readout, forward: Callable[[], Any]) -> Float[Tensor, "window pos d_model"]:
    """What the final norm reads in a forward pass, which ends there."""
    seen: list[Tensor] = []

    def read(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise NormReached

    handle = readout.module.register_forward_pre_hook(read)
    try:
        forward()
    except NormReached:
        pass
    finally:
        handle.remove()
    return seen[0]

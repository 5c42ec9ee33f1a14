"""What a host makes of whole texts: its activations and sparse codes at one layer, pooled over each text's tokens."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cayley_interp import CayleyGPT
from cayley_interp.bottleneck import CayleySAE
from molt_lens.hosts import Host, Site
from molt_lens.packing import keep_mask

Source = Literal["codes", "random_codes", "mlp_in", "resid"]
"""What is pooled.

- codes: all levels of the layer's CayleySAE, side by side.
- random_codes: the same bottleneck over a dictionary of random signs on the same input: its levels, its routing, its
  standardisation measured on these texts, no bias. The control for what training with the algebra brings.
- mlp_in: what the MLP's norm gives, which is the bottleneck's input.
- resid: the residual stream before that norm.
"""

Pooling = Literal["mean", "max"]

TEXTS_AT_A_TIME = 16


@torch.no_grad()
def pooled_activations(
    host: Host, texts: list[str], layer: int, source: Source
) -> dict[Pooling, Float[np.ndarray, "text feature"]]:
    """One row a text, float32: the mean and the maximum over its tokens of every dimension or feature.

    Special tokens and the first position are left out, as in every measurement of a host; what does not fit in n_ctx is
    cut off.

    Raises:
        ValueError: no texts, codes of a host without a bottleneck, a text without two tokens, or what `Host.capture`
            raises.
    """
    if not texts:
        raise ValueError(f"0 texts to pool {source} of layer {layer} of {host.name} over: give at least one")
    site = Site(layer, input="pre_norm_in" if source == "resid" else "pre_norm_out")
    sae = None
    if source in ("codes", "random_codes"):
        sae = bottleneck_of(host, layer)
        if source == "random_codes":
            sae = random_control(sae, _inputs(host, texts, site))
    means, maxima = [], []
    for x, keep in _inputs(host, texts, site):
        for text_x, text_keep in zip(x, keep, strict=True):
            acts = text_x[text_keep]
            if sae is not None:
                acts = torch.cat(sae.to_dense(sae.encode(acts)), dim=-1)
            means.append(acts.mean(0).float().cpu())
            maxima.append(acts.amax(0).float().cpu())
    return {"mean": torch.stack(means).numpy(), "max": torch.stack(maxima).numpy()}


def sources_of(host: Host) -> list[Source]:
    """What can be pooled of a host."""
    has_codes = isinstance(host.model, CayleyGPT) and bool(host.model.bottlenecks())
    return ["codes", "random_codes", "mlp_in", "resid"] if has_codes else ["mlp_in", "resid"]


def bottleneck_of(host: Host, layer: int) -> CayleySAE:
    """The CayleySAE of a layer.

    Raises:
        ValueError: the host has none, or no such layer.
    """
    bottleneck: Any = host.modules(Site(layer)).bottleneck
    if bottleneck is None:
        raise ValueError(f"{host.name} has no CayleySAE, so it has no codes: ask for mlp_in or resid")
    return bottleneck


def random_control(sae: CayleySAE, inputs: Iterator[tuple[Tensor, Tensor]]) -> CayleySAE:
    """A bottleneck of the same config over random signs, its scores standardised over these inputs."""
    control = CayleySAE(replace(sae.config, dictionary="random", revive_after=None)).to(sae.mean)
    control.train().requires_grad_(False)
    for x, keep in inputs:
        control(x[keep])
    control.update_statistics()  # once: the moments of all tokens together
    return control.eval()


def _inputs(
    host: Host, texts: list[str], site: Site
) -> Iterator[tuple[Float[Tensor, "text pos d_model"], Bool[Tensor, "text pos"]]]:
    """The site's input for a few texts at a time, and which of its positions count."""
    bos = [] if host.bos_id is None else [host.bos_id]
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        batch = [(bos + host.tokenize(text))[: host.n_ctx] for text in texts[start : start + TEXTS_AT_A_TIME]]
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        keep = torch.zeros_like(ids, dtype=torch.bool)
        for row, kept, tokens in zip(ids, keep, batch, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
            kept[: len(tokens)] = True
        # Padding is on the right, where no token of a text sees it.
        keep &= keep_mask(host, ids)
        if not keep.any(1).all():
            short = texts[start + int((~keep.any(1)).nonzero()[0])]
            raise ValueError(f"the text {short[:60]!r} has no token after its first: leave it out")
        yield host.capture(site, ids)[0], keep.to(host.device)

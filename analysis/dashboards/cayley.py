"""A Cayley-GPT's features as a source of dashboards: every level of every block's bottleneck is a group."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from analysis.dashboards.readout import Readout
from analysis.dashboards.sources import Codes, Group
from cayley_interp import CayleyGPT, LevelCodes


class CayleySource:
    def __init__(self, model: CayleyGPT, name: str, batch_size: int = 8, layers: Sequence[int] | None = None):
        """
        Args:
            layers: whose units are the groups; by default all.

        Raises:
            ValueError: a vanilla model, or layers that the model does not have.
        """
        if not model.bottlenecks():
            raise ValueError(f"{name} has levels=None: a vanilla model has no features of its own to show")
        n_layers = len(model.bottlenecks())
        self.layers = sorted(set(range(n_layers) if layers is None else layers))
        if not self.layers or not set(self.layers) <= set(range(n_layers)):
            raise ValueError(f"layers {list(layers or [])} of {name}: expected some of 0 to {n_layers - 1}")
        self.model, self.name, self.batch_size = model.eval(), name, batch_size
        self.readout = Readout(model.norm_f, model.head.weight)
        self.groups: Sequence[Group] = [
            Group(f"L{layer}.{i}", layer, i, "cayley", [1] * 2**level.n, affine=True)
            for layer in self.layers
            for i, level in enumerate(model.bottlenecks()[layer].levels)
        ]

    @torch.no_grad()
    def run(self, windows: Int64[Tensor, "window pos"], counted: Bool[Tensor, "window pos"]) -> "CayleyPass":
        device = self.model.tok.weight.device
        codes: list[tuple[LevelCodes, ...]] = []
        inputs: list[Tensor] = []
        handles = [
            block.norm2.register_forward_hook(lambda *of_call: inputs.append(of_call[-1]))
            for block in self.model.blocks()
        ]
        try:
            residual = self.model.residual(windows.to(device), codes)
        finally:
            for handle in handles:
                handle.remove()
        return CayleyPass(self, codes, inputs, residual, counted.to(device))

    @torch.no_grad()
    def logits(self, written: Float[Tensor, "event d_model"]) -> Float[Tensor, "event d_vocab"]:
        return self.readout.logits(written)


class CayleyPass:
    def __init__(
        self,
        source: CayleySource,
        codes: list[tuple[LevelCodes, ...]],
        inputs: list[Float[Tensor, "window pos d_model"]],
        residual: Float[Tensor, "window pos d_model"],
        counted: Bool[Tensor, "window pos"],
    ):
        self._source, self._of_layer, self._inputs = source, codes, inputs
        self.codes: list[Codes] = [(c.indices, c.values * counted[..., None]) for i in source.layers for c in codes[i]]
        self._residual_dtype, self._scale = residual.dtype, source.readout.scale(residual)

    @torch.no_grad()
    def reconstruction(
        self, group: int
    ) -> tuple[Float[Tensor, "window pos d_model"], Float[Tensor, "window pos d_model"]]:
        """What the bottleneck reads, and what it hands to the MLP of it with this level and those above."""
        place = self._source.groups[group]
        sparse = self._source.model.bottlenecks()[place.layer]
        assert place.level is not None
        return self._inputs[place.layer], sparse.decode(self._of_layer[place.layer][: place.level + 1])

    @torch.no_grad()
    def writes(
        self, group: int, window: Int64[Tensor, " event"], pos: Int64[Tensor, " event"], unit: Int64[Tensor, " event"]
    ) -> Float[Tensor, "event d_model"]:
        """MLP(h) - MLP(h - f D_u): the bottleneck's output with the feature and without it, through the layer's MLP."""
        place = self._source.groups[group]
        block = self._source.model.blocks()[place.layer]
        assert block.sparse is not None
        assert place.level is not None
        device = self._scale.device
        window, pos, unit = window.to(device), pos.to(device), unit.to(device)
        own = tuple(LevelCodes(c.indices[window, pos], c.values[window, pos]) for c in self._of_layer[place.layer])
        level = own[place.level]
        without = LevelCodes(level.indices, level.values.masked_fill(level.indices == unit[:, None], 0))
        changed = tuple(without if i == place.level else codes for i, codes in enumerate(own))
        with_it, without_it = (block.mlp(block.sparse.decode(c).to(self._residual_dtype)) for c in (own, changed))
        return self._source.readout.norm.carry((with_it - without_it).float(), self._scale[window, pos])

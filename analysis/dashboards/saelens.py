"""A SAELens SAE's features as a source of dashboards, on a model in TransformerLens' bridge.

The model runs as it is, the SAE only looks on: nothing is attached, so that a model with a bottleneck of its own is not
encoded twice, and none of SAELens' traps of attaching is met. A hook that does not fire is an error here.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from analysis.dashboards.readout import Readout, residual_of
from analysis.dashboards.sources import Codes, Group

MAX_WINDOWS = 4
ACTS_AT_A_TIME = 2**26
"""Dense acts of a batch at most, unless one window has more."""

RESIDUAL = ("hook_in", "hook_out", "ln1.hook_in", "ln2.hook_in", "ln1_post.hook_out", "ln2_post.hook_out")
"""Canonical names in a block of what is the residual stream, or is added to it as it stands."""
UNLESS_NORMED = {"attn.hook_out": "ln1_post", "mlp.hook_out": "ln2_post"}
"""Added as it stands where no norm comes behind."""


class SaelensSource:
    """
    Attributes:
        hook_name, hook_name_out: canonical names of what is encoded, and of what the decoder writes to.
        has_direct_path: whether that is the residual stream, or is added to it as it stands.
    """

    def __init__(self, bridge: Any, sae: Any, name: str):
        """
        Args:
            bridge: a TransformerBridge, on the SAE's device.
            sae: a `sae_lens.SAE` whose metadata name its hook.

        Raises:
            ValueError: no hook is named, or one that the model does not have; a hook on single heads; an SAE without
                W_dec, whose units do not write a vector each; activations of a model whose norms were folded.
        """
        metadata = sae.cfg.metadata
        self.bridge, self.sae, self.name = bridge, sae.eval(), name
        if getattr(sae, "W_dec", None) is None:
            raise ValueError(f"{name} is a {type(sae).__name__} without W_dec: its units do not write a vector each")
        if not metadata.hook_name or metadata.hook_head_index is not None:
            raise ValueError(
                f"the metadata of {name} name the hook {metadata.hook_name!r} and head {metadata.hook_head_index!r}: "
                "expected a hook on all of a layer"
            )
        self.hook_name = self._canonical(mended(metadata, "hook_name"))
        self.hook_name_out = self._canonical(metadata.hook_name_out or self.hook_name)
        layer = re.match(r"blocks\.(\d+)\.(.*)", self.hook_name_out)
        if layer is None:
            raise ValueError(f"{name} writes to {self.hook_name_out}: expected a hook of a block, blocks.N. ...")
        block, place = bridge.blocks[int(layer[1])], layer[2]
        has_vectors = sae.cfg.reshape_activations == "none"
        behind = UNLESS_NORMED.get(place)
        self.has_direct_path = has_vectors and (
            place in RESIDUAL or (behind is not None and not hasattr(block, behind))
        )
        processing = metadata.model_from_pretrained_kwargs or {}
        if processing.get("fold_ln") and not self.has_direct_path:
            raise ValueError(
                f"{name} was trained behind a norm, {self.hook_name}, of a model whose norms were folded into its "
                "weights: a bridge has other activations there"
            )
        # Centred writing weights take the mean away from all that is written to the residual stream.
        self.centres = bool(processing.get("center_writing_weights")) and self.has_direct_path
        norms = sae.W_dec.detach().float().norm(dim=-1)
        self.groups: Sequence[Group] = [Group(f"L{layer[1]}", int(layer[1]), None, "feature", [1] * len(norms), norms)]
        self.batch_size = max(1, min(MAX_WINDOWS, ACTS_AT_A_TIME // (256 * len(norms))))
        final = bridge.ln_final
        self.readout = Readout(final.original_component, bridge.W_U.T, called=final)

    @torch.no_grad()
    def run(self, windows: Int64[Tensor, "window pos"], counted: Bool[Tensor, "window pos"]) -> "SaelensPass":
        """
        Raises:
            ValueError: the hook did not fire.
        """
        seen: dict[str, Tensor] = {}

        def reader(name: str) -> tuple[str, Any]:
            return name, lambda tensor, hook: seen.update({name: tensor})  # noqa: ARG005  (the names are TransformerLens')

        windows, names = windows.to(self.readout.W_U.device), {self.hook_name, self.hook_name_out}
        residual = residual_of(
            self.readout,
            lambda: self.bridge.run_with_hooks(windows, fwd_hooks=[*map(reader, names)], return_type=None),
        )
        if silent := names - seen.keys():
            raise ValueError(f"the hook {min(silent)} did not fire: it is switched off, or the model skips it")
        x, y = (self._as_trained(seen[name]) for name in (self.hook_name, self.hook_name_out))
        return SaelensPass(self, x, y, residual, counted.to(x.device))

    def _as_trained(self, activations: Tensor) -> Tensor:
        return activations - activations.mean(-1, keepdim=True) if self.centres else activations

    def logits(self, written: Float[Tensor, "event d_model"]) -> Float[Tensor, "event d_vocab"]:
        return self.readout.logits(written)

    def _canonical(self, hook_name: str) -> str:
        """An alias and what it stands for are the same hook point."""
        hooks = self.bridge.hook_dict
        if hook_name not in hooks:
            raise ValueError(
                f"the model of {self.name} has no hook {hook_name}: is it the model that it was trained on?"
            )
        return hooks[hook_name].name


class SaelensPass:
    def __init__(
        self,
        source: SaelensSource,
        x: Float[Tensor, "window pos *d_in"],
        y: Float[Tensor, "window pos *d_out"],
        residual: Float[Tensor, "window pos d_model"],
        counted: Bool[Tensor, "window pos"],
    ):
        self._source, self._x, self._y = source, x, y
        sae = source.sae
        self.acts: Float[Tensor, "window pos unit"] = sae.encode(x) * counted[..., None]
        self.codes: list[Codes] = [self.acts]
        self._scale = source.readout.scale(residual)
        self._decoded_by: Tensor | None = None
        """What the decoder's output is multiplied by at each token; SAELens keeps it from encode to decode."""
        if sae.cfg.normalize_activations == "layer_norm":
            self._decoded_by = sae.ln_std
        elif sae.cfg.normalize_activations == "constant_norm_rescale":
            self._decoded_by = 1 / sae.x_norm_coeff

    @torch.no_grad()
    def reconstruction(
        self,
        group: int,  # noqa: ARG002  (there is one)
    ) -> tuple[Float[Tensor, "window pos d_out"], Float[Tensor, "window pos d_out"]]:
        """The skip connection of a skip transcoder too, which decode leaves out."""
        return self._y.flatten(2), self._source.sae(self._x).flatten(2)

    @torch.no_grad()
    def writes(
        self,
        group: int,  # noqa: ARG002  (there is one)
        window: Int64[Tensor, " event"],
        pos: Int64[Tensor, " event"],
        unit: Int64[Tensor, " event"],
    ) -> Float[Tensor, "event d_model"] | None:
        if not self._source.has_direct_path:
            return None
        window, pos, unit = (t.to(self.acts.device) for t in (window, pos, unit))
        added = self.acts[window, pos, unit, None] * self._source.sae.W_dec[unit]
        if self._decoded_by is not None:
            added = added * self._decoded_by[window, pos]
        return self._source.readout.norm.carry(added.float(), self._scale[window, pos])


def mended(metadata: Any, key: str) -> str:
    """A hook's name; of Gemma Scope 2 what SAELens 6.54 has wrong.

    It says `hook_mlp_in`, the residual before the norm, which by default does not even fire; the name in transformers,
    kept beside it, is that of the norm's output.
    """
    hook_name, hf_name = metadata[key], str(metadata[f"hf_{key}"])
    if hook_name.endswith("hook_mlp_in") and hf_name.endswith("pre_feedforward_layernorm.output"):
        return hook_name.replace("hook_mlp_in", "mlp.hook_in")
    return hook_name

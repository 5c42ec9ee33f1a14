"""Replacements spliced into a host: what they write takes part in the host's own forward pass.

    with spliced(host, {site: replacement}, "replace"):
        logits = host.logits(input_ids)

    with spliced(host, {site: replacement}, "observe") as record:
        host.logits(input_ids)
    record[site].acts

One `with` per batch costs nothing: entering it registers two hooks a layer, leaving it takes them off.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from molt_lens.hosts import Host, Site, SiteModules
from molt_lens.standardize import Replacement

Mode = Literal["replace", "add_error", "observe"]
"""What becomes of a site's target y, with decode the replacement's and x the site's input.

- replace: decode(acts, x) takes its place.
- add_error: decode(acts, x) + e, with e = y - decode(acts as encoded, x) a constant. Without an edit the host says what
  it would have said, to rounding; with one, y moves by what the edit moves the replacement. Gradients reach x through
  the replacement alone, never through the true MLP.
- observe: it stays, and the record is filled.
"""

Edit = Callable[[Site, Tensor], Tensor]
"""From the acts [batch, pos, unit] of a site to those that are decoded. It may change what it is given in place."""


@dataclass(frozen=True)
class SiteActivations:
    """What was at a site in the last forward pass: x and y in the host's dtype, the others in the replacement's."""

    x: Float[Tensor, "batch pos d_in"]
    y: Float[Tensor, "batch pos d_out"]
    acts: Float[Tensor, "batch pos unit"] | None
    """None of what is a plain function."""
    recons: Float[Tensor, "batch pos d_out"]


@contextmanager
def spliced(
    host: Host,
    replacements: Mapping[Site, Callable[[Tensor], Tensor]],
    mode: Mode,
    *,
    keep: Bool[Tensor, "batch pos"] | None = None,
    edit: Edit | None = None,
) -> Iterator[dict[Site, SiteActivations]]:
    """Within it every forward pass of the host has the replacements, at one layer or at all.

    A Replacement computes in its own dtype and the host goes on in the host's; a plain function from x to y is called
    with x as the host has it. The true MLPs are computed all the same.

    Args:
        replacements: what stands for the MLP at each site, at most one a layer, in eval mode.
        mode: see `Mode`. Only "observe" fills the record: at all layers at once acts add up.
        keep: True where the true output stays, whatever the mode: no map is trained on BOS and special tokens, and of
            Gemma Scope's instruction-tuned ones not on the first four positions. Holds for forward passes of its shape.
        edit: a change of the acts before they are decoded.

    Raises:
        ValueError: an unknown mode; a layer given twice, spliced already, or that the host lacks; a Replacement of
            another width than the host, on another device, or in training mode; an edit of a plain function, or in a
            mode where nothing comes of it. In a forward pass: `keep`, edited acts or an output of another shape.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if mode == "observe" and edit is not None:
        raise ValueError('nothing comes of an edit in mode "observe": use "replace" or "add_error"')
    _check_layers(list(replacements))
    record: dict[Site, SiteActivations] = {}
    handles = []
    try:
        for site, replacement in replacements.items():
            _check_replacement(host, site, replacement, edit)
            modules = host.modules(site)
            _check_free(site, modules)
            splice = _Splice(site, replacement, mode, keep, edit, record)
            if modules.input_side == "in":
                handles.append(modules.input_module.register_forward_pre_hook(splice.read_argument))
            else:
                handles.append(modules.input_module.register_forward_hook(splice.read_output))
            handles.append(modules.target_module.register_forward_hook(splice))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def true_mlp(host: Host, site: Site) -> Callable[[Tensor], Tensor]:
    """What the host itself computes from a site's input to its target, as a function to splice in.

    Its modules are called past their hooks: it may run inside one of them.

    Raises:
        ValueError: what `Host.modules` raises.
    """
    modules = host.modules(site)
    chain = [modules.bottleneck, modules.mlp]
    if site.input == "pre_norm_in":
        chain.insert(0, modules.input_module)
    if site.target == "post_norm_out":
        chain.append(modules.post_norm)

    def compute(x: Tensor) -> Tensor:
        for module in chain:
            x = x if module is None else module.forward(x)
        return x

    return compute


class _Splice:
    """The hook on a site's target: takes x from the hook on its input, and gives what the host goes on with."""

    def __init__(
        self,
        site: Site,
        replacement: Callable[[Tensor], Tensor],
        mode: Mode,
        keep: Tensor | None,
        edit: Edit | None,
        record: dict[Site, SiteActivations],
    ):
        self.site, self.replacement, self.mode = site, replacement, mode
        self.keep, self.edit, self.record = keep, edit, record
        self.x: Tensor | None = None

    def read_argument(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.x = args[0]

    def read_output(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        self.x = output

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        x, self.x = self.x, None
        assert x is not None
        if self.mode == "observe":
            acts, recons = self._encode_and_decode(x)
            self.record[self.site] = SiteActivations(x, y, acts, self._checked(recons, y))
            return None
        recons, clean = self._recons(x)
        recons = self._checked(recons, y)
        if self.mode == "add_error":
            # Both promote to the wider of the two dtypes, so that y comes back to the host's last bits.
            recons = recons + (y - clean).detach()
        return self._where_kept(y, recons.to(y.dtype))

    def _encode_and_decode(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if not isinstance(self.replacement, Replacement):
            return None, self.replacement(x)
        x = x.to(self.replacement.map.b_dec.dtype)
        acts = self.replacement.encode(x)
        return acts, self.replacement.decode(acts, x)

    def _recons(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the replacement writes, and what it would write unedited."""
        if isinstance(self.replacement, Replacement):
            x = x.to(self.replacement.map.b_dec.dtype)
            if self.edit is not None:
                acts = self.replacement.encode(x)
                edited = self.edit(self.site, acts.clone())
                if not isinstance(edited, Tensor) or edited.shape != acts.shape:
                    raise ValueError(
                        f"edit must return the acts of {self.site}, of shape {tuple(acts.shape)}, "
                        f"got {tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__}"
                    )
                recons = self.replacement.decode(edited, x)
                with torch.no_grad():
                    return recons, self.replacement.decode(acts, x) if self.mode == "add_error" else recons
        recons = self.replacement(x)
        return recons, recons

    def _checked(self, recons: Tensor, y: Tensor) -> Tensor:
        if recons.shape != y.shape:
            raise ValueError(
                f"what replaces {self.site} gave shape {tuple(recons.shape)}, and its target has {tuple(y.shape)}"
            )
        return recons

    def _where_kept(self, y: Tensor, recons: Tensor) -> Tensor:
        if self.keep is None:
            return recons
        if self.keep.shape != y.shape[:-1]:
            raise ValueError(
                f"keep must be [batch, pos] = {tuple(y.shape[:-1])} in this forward pass, got {tuple(self.keep.shape)}"
            )
        return torch.where(self.keep.to(y.device)[..., None], y, recons)


def _check_layers(sites: list[Site]) -> None:
    layers = [site.layer for site in sites]
    if doubled := sorted({layer for layer in layers if layers.count(layer) > 1}):
        raise ValueError(f"layer {doubled[0]} is given two replacements: give one a layer, the MLP is one")


def _check_replacement(host: Host, site: Site, replacement: Callable[[Tensor], Tensor], edit: Edit | None) -> None:
    if not isinstance(replacement, Replacement):
        if edit is not None:
            raise ValueError(f"what replaces {site} is a plain function, and has no acts to edit: give a Replacement")
        return
    if (replacement.d_in, replacement.d_out) != (host.d_model, host.d_model):
        raise ValueError(
            f"the replacement at {site} maps {replacement.d_in} to {replacement.d_out} dimensions, and {host.name} has "
            f"d_model={host.d_model}: was it made for another host?"
        )
    if (device := replacement.map.b_dec.device) != host.device:
        raise ValueError(f"the replacement at {site} is on {device}, and {host.name} on {host.device}: move it there")
    if replacement.training:
        # A BatchTopK gate would look at the whole batch, and move its threshold.
        raise ValueError(f"the replacement at {site} is in training mode: call replacement.eval() first")


def _check_free(site: Site, modules: SiteModules) -> None:
    for module in (modules.mlp, modules.post_norm):
        if module is not None and any(isinstance(hook, _Splice) for hook in module._forward_hooks.values()):
            raise ValueError(f"layer {site.layer} has a replacement already: leave that `with` before this one")

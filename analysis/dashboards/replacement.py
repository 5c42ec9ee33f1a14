"""A replacement's units as a source of dashboards: a MOLT's transforms, a transcoder's features, an MxD's experts."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from analysis.dashboards.readout import readout_of, residual_of
from analysis.dashboards.sources import Codes, Group
from analysis.true_mlp import read_norm
from molt_lens import Molt, Replacement, Transcoder
from molt_lens.hosts import Host, Site
from molt_lens.replacement import spliced

MAX_WINDOWS = 4
ACTS_AT_A_TIME = 2**26
"""Dense acts of a batch at most, unless one window has more."""
EVENTS_AT_A_TIME = 1_024


class ReplacementSource:
    """The host runs as it is, nothing is spliced in: the replacement only looks on.

    A unit is seen where the replacement would have written at the site's target. Behind an `mlp_out` of a Gemma stands
    another norm; what is written passes it at the scale that it has at that token.
    """

    def __init__(self, host: Host, site: Site, replacement: Replacement, name: str):
        """
        Raises:
            ValueError: no such site, a map without units or of another width than the host, or a final norm that is not
                where it is known to be.
        """
        map = replacement.map
        if not map.n_units:
            raise ValueError(f"{name} is a map of kind {map.kind!r}, which has no units: there is nothing to look at")
        if (map.d_in, map.d_out) != (host.d_model, host.d_model):
            raise ValueError(
                f"{name} maps {map.d_in} to {map.d_out} dimensions, and {host.name} has d_model={host.d_model}"
            )
        modules = host.modules(site)
        self.host, self.site, self.replacement, self.name = host, site, replacement.eval(), name
        self.folded = replacement.folded()
        kind = "transform" if isinstance(map, Molt) else "feature"
        self.groups: Sequence[Group] = [
            Group(f"L{site.layer}", site.layer, None, kind, map.ranks, map.norms().detach())
        ]
        self.batch_size = max(1, min(MAX_WINDOWS, ACTS_AT_A_TIME // (256 * map.n_units)))
        self.readout = readout_of(host)
        behind = modules.post_norm is not None and site.target == "mlp_out"
        self.post_norm = read_norm(modules.post_norm, torch.float32) if behind else None

    @torch.no_grad()
    def run(self, windows: Int64[Tensor, "window pos"], counted: Bool[Tensor, "window pos"]) -> "ReplacementPass":
        # Observed is a function that costs nothing: only x and y are wanted.
        with spliced(self.host, {self.site: lambda x: x}, "observe") as record:
            residual = residual_of(self.readout, lambda: self.host.logits(windows))
        x, y = record[self.site].x, record[self.site].y
        return ReplacementPass(self, x, y, residual, counted.to(x.device))

    def logits(self, written: Float[Tensor, "event d_model"]) -> Float[Tensor, "event d_vocab"]:
        return self.readout.logits(written)

    @torch.no_grad()
    def written(
        self, x: Float[Tensor, "event d_in"], unit: Int64[Tensor, " event"], act: Float[Tensor, " event"]
    ) -> Float[Tensor, "event d_out"]:
        """What units write at the site's target, one at each x, in raw coordinates; exact, all maps being linear in
        their acts."""
        map = self.folded
        if isinstance(map, Transcoder):
            return act[:, None] * map.W_dec[unit]
        parts = []
        for some_x, some_unit, some_act in zip(
            *(t.split(EVENTS_AT_A_TIME) for t in (x - map.centre, unit, act)), strict=True
        ):
            acts = some_x.new_zeros(len(some_x), map.n_units)
            acts[torch.arange(len(acts), device=acts.device), some_unit] = some_act.to(acts)
            parts.append(map.write(acts, some_x, acts != 0))
        return torch.cat(parts)


class ReplacementPass:
    """
    Attributes:
        x, y: [window, pos, d], the site's input in the replacement's dtype, and its target.
        acts: [window, pos, unit], 0 at tokens that do not count.
    """

    def __init__(
        self,
        source: ReplacementSource,
        x: Float[Tensor, "window pos d_in"],
        y: Float[Tensor, "window pos d_out"],
        residual: Float[Tensor, "window pos d_model"],
        counted: Bool[Tensor, "window pos"],
    ):
        self._source = source
        self.y = y
        self.x = x.to(source.folded.b_dec.dtype)
        self.acts = source.replacement.encode(self.x) * counted[..., None]
        self.codes: list[Codes] = [self.acts]
        self._scale = source.readout.scale(residual)
        post = source.post_norm
        self._post_scale = None if post is None else post.normalise(y.float().flatten(0, 1))[1].view(*y.shape[:2], 1)

    @torch.no_grad()
    def reconstruction(
        self,
        group: int,  # noqa: ARG002  (there is one)
    ) -> tuple[Float[Tensor, "window pos d_out"], Float[Tensor, "window pos d_out"]]:
        return self.y, self._source.replacement(self.x)

    @torch.no_grad()
    def added(
        self, window: Int64[Tensor, " event"], pos: Int64[Tensor, " event"], unit: Int64[Tensor, " event"]
    ) -> Float[Tensor, "event d_model"]:
        """What units add to the residual stream."""
        window, pos, unit = (t.to(self.x.device) for t in (window, pos, unit))
        written = self._source.written(self.x[window, pos], unit, self.acts[window, pos, unit])
        return self._behind_post_norm(written, window, pos)

    @torch.no_grad()
    def added_by_all(
        self, window: Int64[Tensor, " event"], pos: Int64[Tensor, " event"]
    ) -> Float[Tensor, "event d_model"]:
        """The sum of `added` over all units; no bias and no skip connection."""
        window, pos = window.to(self.x.device), pos.to(self.x.device)
        acts, map = self.acts[window, pos], self._source.folded
        written = map.write(acts, self.x[window, pos] - map.centre, acts != 0)
        return self._behind_post_norm(written, window, pos)

    def seen_by_unembedding(
        self, added: Float[Tensor, "event d_model"], window: Int64[Tensor, " event"], pos: Int64[Tensor, " event"]
    ) -> Float[Tensor, "event d_model"]:
        """What is added to the residual stream, through the final norm at the scale that it has there."""
        window, pos = window.to(added.device), pos.to(added.device)
        return self._source.readout.norm.carry(added.float(), self._scale[window, pos])

    def writes(
        self,
        group: int,  # noqa: ARG002  (there is one)
        window: Int64[Tensor, " event"],
        pos: Int64[Tensor, " event"],
        unit: Int64[Tensor, " event"],
    ) -> Float[Tensor, "event d_model"]:
        return self.seen_by_unembedding(self.added(window, pos, unit), window, pos)

    def _behind_post_norm(self, written: Tensor, window: Tensor, pos: Tensor) -> Tensor:
        post = self._source.post_norm
        if post is None or self._post_scale is None:
            return written
        return post.carry(written.float(), self._post_scale[window, pos])

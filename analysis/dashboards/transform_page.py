"""What the page of a transform shows besides: its matrix read by singular vectors, its worth, and what it adds where.

    A = sum_i s_i u_i v_i^T         of U_t V_t, exact from its two factors

In raw coordinates A maps what the layer's MLP reads to what is added to the residual stream. A left vector u_i goes
through the gain of the final norm and the unembedding: what it writes. A right vector v_i takes the gain of the norm
before the MLP and is compared with the embeddings: what it reads. Signs come in pairs, and are chosen so that
v_i . (x - centre) is mostly positive where the gate is open.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from analysis.dashboards.details import Details
from analysis.dashboards.opening import StringIndex
from analysis.dashboards.readout import embedding
from analysis.dashboards.replacement import ReplacementPass, ReplacementSource
from analysis.dashboards.sources import Text
from analysis.dashboards.survey import Progress
from analysis.true_mlp import read_norm
from analysis.unit_worth import MapWorth, transform_worth
from molt_lens import Molt

WORTH_TOKENS = 8_192
PAIRS = 4
"""Singular pairs that are read."""
READ_TOKENS = 8
"""Tokens of each list."""
SERVED = 12
"""Tokens that it serves."""
PLACES = 4
"""Of the strongest contexts, those at which it is shown what the transform adds."""


class SVD(NamedTuple):
    """A = left diag(singular) right^T, singular values falling."""

    left: Float[Tensor, "d_out rank"]
    singular: Float[Tensor, " rank"]
    right: Float[Tensor, "d_in rank"]

    @property
    def frobenius(self) -> float:
        return self.singular.square().sum().sqrt().item()

    @property
    def stable_rank(self) -> float:
        """|A|_F^2 / |A|_2^2: how many directions matter, weighed by the square of their gain; 0 of A = 0."""
        largest = self.singular[0].item()
        return (self.frobenius / largest) ** 2 if largest else 0.0


@torch.no_grad()
def transform_svd(U: Float[Tensor, "rank d_out"], V: Float[Tensor, "rank d_in"]) -> SVD:
    """The SVD of U^T V in float64: QR of both factors leaves a core of the transform's rank."""
    left, core_left = torch.linalg.qr(U.detach().double().T)
    right, core_right = torch.linalg.qr(V.detach().double().T)
    u, singular, vh = torch.linalg.svd(core_left @ core_right.T)
    return SVD(left @ u, singular, right @ vh.T)


@dataclass(frozen=True, eq=False)
class _Measured:
    """On at most WORTH_TOKENS of the text.

    Attributes:
        towards: mean of x - centre where each transform is open, raw; 0 of one that is not.
        share_written: mean square of what each transform writes over that of all together, standardised coordinates;
            together they are not 1, since transforms may work against each other.
    """

    tokens: Int64[Tensor, " token"]
    is_open: Bool[Tensor, "token unit"]
    worth: MapWorth
    towards: Float[Tensor, "unit d_in"]
    share_written: list[float]


class TransformExtras:
    """Pages of a MOLT's transforms; measured on the text when the first is asked for."""

    def __init__(self, source: ReplacementSource, text: Text):
        """
        Raises:
            ValueError: the source is of another kind of map.
        """
        map, folded = source.replacement.map, source.folded
        if not isinstance(map, Molt) or not isinstance(folded, Molt):
            raise ValueError(f"{source.name} is a {map.kind}: only a MOLT has transforms")
        self.source, self.text = source, text
        self.standardised = list(zip(map.U.split(map.ranks), map.V.split(map.ranks), strict=True))
        self.raw = list(zip(folded.U.split(map.ranks), folded.V.split(map.ranks), strict=True))
        self.ranks, self.centre = map.ranks, folded.centre

    def __call__(
        self,
        group: int,  # noqa: ARG002  (there is one)
        details: Sequence[Details],
        string: StringIndex,
        progress: Progress = lambda *_: None,
    ) -> list[dict[str, Any]]:
        places = self._places(details, string, progress)
        pages = []
        for own, at in zip(details, places, strict=True):
            pages.append(self._of(own.unit, string) | {"at": at})
            progress("reading transforms", len(pages) / len(details))
        return pages

    def _of(self, unit: int, string: StringIndex) -> dict[str, Any]:
        raw, standardised = transform_svd(*self.raw[unit]), transform_svd(*self.standardised[unit])
        worth = self._measured.worth.transforms[unit]
        return {
            "rank": self.ranks[unit],
            "singular": {"raw": raw.singular.tolist(), "standardised": standardised.singular.tolist()},
            "stable_rank": standardised.stable_rank,
            "frobenius": standardised.frobenius,
            "stable_rank_raw": raw.stable_rank,
            "frobenius_raw": raw.frobenius,
            "nmse": self._measured.worth.nmse,
            "nmse_without": worth.nmse_without,
            "nmse_always": worth.nmse_always,
            "gate_share": worth.gate_share,
            "share_written": self._measured.share_written[unit],
            "pairs": self._pairs(raw, self._measured.towards[unit], string),
            "measured_on": len(self._measured.tokens),
            "serves": self._serves(unit, string),
        }

    # ---- Its matrix ----

    def _pairs(self, svd: SVD, towards: Tensor, string: StringIndex) -> list[dict[str, Any]]:
        left, right = oriented(svd, towards)
        n = min(PAIRS, len(svd.singular))
        writes = self.source.readout.logits(self._behind_norms(left.T[:n].float()))
        reads = self._read(right.T[:n].float())
        listed = {"reads": reads, "reads_against": -reads, "writes": writes, "writes_against": -writes}
        tops = {name: s.topk(min(READ_TOKENS, s.shape[1])).indices.tolist() for name, s in listed.items()}
        return [
            {"gain": svd.singular[i].item()} | {name: [*map(string, rows[i])] for name, rows in tops.items()}
            for i in range(n)
        ]

    def _behind_norms(self, left: Float[Tensor, "pair d_out"]) -> Float[Tensor, "pair d_model"]:
        """Directions only: a norm's scale at a token moves no token of a list."""
        post = self.source.post_norm
        return self.source.readout.norm.carry(left if post is None else post.carry(left, 1.0), 1.0)

    def _read(self, right: Float[Tensor, "pair d_in"]) -> Float[Tensor, "pair d_vocab"]:
        if self.source.site.input == "pre_norm_out":
            norm = read_norm(self.source.host.modules(self.source.site).input_module, torch.float32)
            right = norm.fold(right)
        W_E = embedding(self.source.host)
        return (right.to(W_E) @ W_E.T).float()

    # ---- On the text ----

    @cached_property
    @torch.no_grad()
    def _measured(self) -> _Measured:
        tokens, x, y = self._sample()
        replacement, map = self.source.replacement, self.source.replacement.map
        acts, z = replacement.encode(x), replacement.input(x) - map.centre
        is_open = acts != 0
        towards = is_open.T.to(x) @ (x - self.centre) / is_open.sum(0).clamp_min(1)[:, None]
        power = []
        for unit, (U, V) in enumerate(self.standardised):
            at = is_open[:, unit]
            power.append((acts[at, unit, None] * (z[at] @ V.T) @ U).double().square().sum().item())
        total = map.write(acts, z, is_open).double().square().sum().item()
        shares = [p / total if total else 0.0 for p in power]
        return _Measured(tokens, is_open.cpu(), transform_worth(replacement, x, y), towards.double(), shares)

    def _sample(self) -> tuple[Int64[Tensor, " token"], Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]:
        """Ids, x and y at the first tokens that count of windows spread over the text."""
        ids, xs, ys = [], [], []
        for rows in self.text.spread(WORTH_TOKENS).split(self.source.batch_size):
            windows, keep = self.text.windows[rows], self.text.counted[rows]
            x, y = self.source.host.capture(self.source.site, windows)
            ids.append(windows[keep])
            xs.append(x[keep.to(x.device)].to(self.centre))
            ys.append(y[keep.to(y.device)])
        return torch.cat(ids)[:WORTH_TOKENS], torch.cat(xs)[:WORTH_TOKENS], torch.cat(ys)[:WORTH_TOKENS]

    def _serves(self, unit: int, string: StringIndex) -> list[tuple[int, int, float, float]]:
        """Token, times it is open there, their share of all of these, and share of the token's occurrences.

        First the tokens that say most of whether it is open: by p(token | open) log(p(open | token) / p(open)).
        """
        is_open = self._measured.is_open[:, unit]
        ids, place = self._measured.tokens.unique(return_inverse=True)
        occurs, opened = (at.bincount(minlength=len(ids)) for at in (place, place[is_open]))
        share, rate = opened / opened.sum().clamp_min(1), opened / occurs
        weight = torch.special.xlogy(share, rate / is_open.double().mean())
        order = weight.argsort(descending=True, stable=True)[:SERVED]
        return [
            (string(int(ids[i])), int(opened[i]), share[i].item(), rate[i].item()) for i in order.tolist() if opened[i]
        ]

    @torch.no_grad()
    def _places(
        self, details: Sequence[Details], string: StringIndex, progress: Progress
    ) -> list[list[dict[str, Any]]]:
        """What each adds at its strongest contexts, the windows run once for all."""
        wanted = [
            (context.window, row, i)
            for row, own in enumerate(details)
            for i, context in enumerate([c for c in own.contexts if c.which == "strongest"][:PLACES])
        ]
        found: list[list[dict[str, Any]]] = [[] for _ in details]
        batches = torch.tensor(sorted({window for window, *_ in wanted})).split(self.source.batch_size)
        for n, rows in enumerate(batches, 1):
            run = self.source.run(self.text.windows[rows], self.text.counted[rows])
            here = [(rows.tolist().index(window), row, i) for window, row, i in wanted if window in rows]
            window, row, i = (torch.tensor(column) for column in zip(*here, strict=True))
            unit = torch.tensor([details[r].unit for r in row.tolist()])
            pos = run.acts.cpu()[window, :, unit].abs().argmax(1)  # the context is of the strongest of its window
            for r, place in zip(row.tolist(), self._added(run, window, pos, unit, i, string), strict=True):
                found[r].append(place)
            progress("what transforms add in their contexts", n / len(batches))
        return [sorted(own, key=lambda place: place["context"]) for own in found]

    def _added(
        self, run: ReplacementPass, window: Tensor, pos: Tensor, unit: Tensor, context: Tensor, string: StringIndex
    ) -> Iterator[dict[str, Any]]:
        added = run.added(window, pos, unit)
        norms, of_all = added.norm(dim=-1), run.added_by_all(window, pos).norm(dim=-1)
        logits = self.source.readout.logits(run.seen_by_unembedding(added, window, pos))
        shares = (norms / of_all).tolist()
        k = min(READ_TOKENS, logits.shape[1])
        for which, norm, share, own in zip(context.tolist(), norms.tolist(), shares, logits, strict=True):
            moved = {"promoted": own.topk(k), "suppressed": own.topk(k, largest=False)}
            yield {"context": which, "added_norm": norm, "share_of_written": share} | {
                name: [[string(t), v] for t, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
                for name, top in moved.items()
            }


def oriented(
    svd: SVD, towards: Float[Tensor, " d_in"]
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "d_in rank"]]:
    """Left and right vectors with the signs for which v . towards is not negative."""
    signs = torch.where(towards.to(svd.right) @ svd.right < 0, -1.0, 1.0).to(svd.right)
    return svd.left * signs, svd.right * signs

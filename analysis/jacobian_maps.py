"""The Jacobian of each kind of map, in the form of jacobian_terms.py: true MLPs, CayleyGPT blocks, replacements.

Derivatives are those almost everywhere: of a gate the derivative of its value, 1 where a unit is open and 0 where it is
closed, never the surrogate that trains it; of a top-k none, its choice is constant almost everywhere.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import gelu

from analysis.jacobian_terms import Dyads, Factors, Jacobians, OpenGroup, OpenRows, Term, open_units
from analysis.true_mlp import Norm, Trace, TrueMLP, with_slope
from cayley_interp.bottleneck import CayleySAE
from molt_lens import LinearMap, MixtureOfDecoders, Molt, Replacement, SparseMap, Transcoder
from molt_lens.gates import BatchTopKGate

STATIC_FEATURES = 8_192
"""A transcoder of more features is taken feature by open feature: its kernels would have that many rows."""

STATIC_LATENTS = 16_384
"""A MOLT of more, in all transforms, is taken transform by open transform: a kernel would have that many columns."""


@dataclass(frozen=True, eq=False)
class Frame:
    """Coordinates in which Jacobians are compared: J becomes diag(out) J R, with R = diag(into) or R = into."""

    out: Float[Tensor, " d_out"]
    into: Float[Tensor, " d_in"] | Float[Tensor, "d_in d_in"]

    def reads(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """rows R."""
        return rows * self.into if self.into.ndim == 1 else rows @ self.into


JacobianMap = Callable[[Float[Tensor, "token d_in"]], Jacobians]
"""From inputs to the Jacobians there."""


def jacobians_of_mlp(mlp: TrueMLP, frame: Frame) -> JacobianMap:
    """Of a true MLP, W_out diag(slopes) W_in, with the norms and the bottleneck that belong to its site.

    A norm is diag + rank 1, hence one dyad for each. Through a bottleneck the Jacobian is one dyad for each active
    feature u, (J_mlp D_u) (df_u/dx)^T.
    """
    folded = mlp.reads if mlp.pre_norm is None else mlp.pre_norm.fold(mlp.reads)
    gain = frame.out if mlp.post_norm is None else frame.out * mlp.post_norm.gain
    bare = Factors(mlp.writes, mlp.reads)
    scaled = Factors(mlp.writes * gain, frame.reads(folded))
    halves = Factors(mlp.writes, scaled.reads)

    def at(x: Tensor) -> Jacobians:
        trace = mlp.trace(x)
        c, dyads = trace.slopes, []
        if mlp.bottleneck is not None:
            dyads.append(_through_bottleneck(mlp, mlp.bottleneck, bare, trace, x, frame))
        elif trace.pre is not None and mlp.pre_norm is not None:
            n, r = trace.pre
            into = n * mlp.pre_norm.gain
            c = c / r
            writes = bare.apply(c, into) / -mlp.d_in
            dyads.append(_one_dyad(writes, frame.reads(n)))
        if trace.post is None:
            dyads = [Dyads(d.writes * gain, d.reads, d.present) for d in dyads]
        else:
            dyads = [_behind_norm(d, trace.post, gain) for d in dyads]
            n, r = trace.post
            c = c / r
            if mlp.bottleneck is None:
                dyads.append(_one_dyad(n * gain / -mlp.d_out, halves.read_back(c, n)))
        return Jacobians(len(x), [] if mlp.bottleneck is not None else [Term(scaled, c)], dyads)

    return at


def jacobians_of_replacement(replacement: Replacement, frame: Frame) -> JacobianMap:
    """Of a replacement of any kind, from raw input to raw output, in the frame's dtype on its device.

    Raises:
        TypeError: a map of a kind that is not known here.
        ValueError: a BatchTopK gate that has seen no training batch: its acts would depend on the block of tokens.
    """
    gate = replacement.map.gate
    if isinstance(gate, BatchTopKGate) and gate.threshold < 0:
        raise ValueError(
            f"the {gate.spec} gate has no threshold yet, so that what it opens depends on a token's company: train the "
            "replacement, or pass it a batch in training mode"
        )
    map = copy.deepcopy(replacement).to(frame.out).eval().requires_grad_(False).folded()
    always = [] if map.W_skip is None else [constant_factors(map.W_skip, frame)]
    if isinstance(map, Molt):
        units = _of_molt(map, frame)
    elif isinstance(map, Transcoder):
        units = _of_transcoder(map, frame)
    elif isinstance(map, MixtureOfDecoders):
        units = _of_mixture(map, frame)
    elif isinstance(map, LinearMap):
        units = None
    else:
        raise TypeError(f"no Jacobian is known of a {type(map).__name__}: estimate it, see jacobian_probes.py")

    def at(x: Tensor) -> Jacobians:
        x = x - map.centre
        terms, dyads = ([], []) if units is None else units(x)
        return Jacobians(len(x), terms + [Term(factors, x.new_ones(len(x), 1)) for factors in always], dyads)

    return at


def jacobians_of_constant(matrix: Float[Tensor, "d_out d_in"], frame: Frame) -> JacobianMap:
    """Of the linear map x -> matrix x."""
    factors = constant_factors(matrix, frame)
    return lambda x: Jacobians(len(x), [Term(factors, x.new_ones(len(x), 1))])


def constant_factors(matrix: Float[Tensor, "d_out d_in"], frame: Frame) -> Factors:
    """A matrix as one unit of full rank."""
    reads = frame.reads(matrix) * frame.out[:, None]
    return Factors(torch.eye(len(matrix)).to(matrix), reads, (len(matrix),))


_Parts = Callable[[Tensor], tuple[list[Term], list[Dyads]]]


def _of_molt(map: Molt, frame: Frame) -> _Parts:
    """sum over open t of g_t U_t V_t + (U_t V_t x) e_t^T; the second has the coefficients V_t x on rows of U."""
    static = Factors(map.U * frame.out, frame.reads(map.V), tuple(map.ranks))
    detectors = frame.reads(map.W_enc)
    shared = detectors.repeat_interleave(torch.tensor(map.ranks, device=detectors.device), dim=0)
    spread = Factors(static.writes, shared) if len(shared) <= STATIC_LATENTS else None
    ends = list(itertools.accumulate(map.ranks))

    def at(x: Tensor) -> tuple[list[Term], list[Dyads]]:
        acts = _acts(map, x)
        unit, present = open_units(acts)
        writes = x.new_zeros(*unit.shape, map.d_out)
        groups = []
        for t, (token, column) in enumerate(_places_of_units(unit, present, map.n_units)):
            if len(token):
                rows = slice(ends[t] - map.ranks[t], ends[t])
                latents = x[token] @ map.V[rows].T
                writes[token, column] = latents @ static.writes[rows]
                groups.append(OpenGroup(token, rows, latents))
        reads = detectors[unit] * present[..., None]
        return [Term(static, acts)], [Dyads(writes, reads, present, spread and OpenRows(spread, groups))]

    return at


def _of_transcoder(map: Transcoder, frame: Frame) -> _Parts:
    """sum over open f of d_f e_f^T."""
    factors = Factors(map.W_dec * frame.out, frame.reads(map.W_enc))

    def at(x: Tensor) -> tuple[list[Term], list[Dyads]]:
        acts = _acts(map, x)
        if map.n_units <= STATIC_FEATURES:
            return [Term(factors, (acts != 0).to(x))], []
        unit, present = open_units(acts)
        there = present[..., None]
        return [], [Dyads(factors.writes[unit] * there, factors.reads[unit] * there, present)]

    return at


def _of_mixture(map: MixtureOfDecoders, frame: Frame) -> _Parts:
    """diag(C^T a) D^T diag(gelu') E + sum over open n of (c_n * D^T gelu(E x)) e_n^T."""
    factors = Factors(map.D * frame.out, frame.reads(map.E))
    detectors = frame.reads(map.W_enc)

    def at(x: Tensor) -> tuple[list[Term], list[Dyads]]:
        acts = _acts(map, x)
        hidden, slopes = with_slope(gelu, x @ map.E.T)
        unit, present = open_units(acts)
        there = present[..., None]
        writes = (hidden @ factors.writes)[:, None] * map.C[unit] * there
        return [Term(factors, slopes, acts @ map.C)], [Dyads(writes, detectors[unit] * there, present)]

    return at


def _acts(map: SparseMap, x: Tensor) -> Float[Tensor, "token unit"]:
    """Of x about the centre; open units have acts above 0, and there every gate's value is its argument."""
    return map.gate(x @ map.W_enc.T + map.b_enc)


def _places_of_units(
    unit: Int64[Tensor, "token dyad"], present: Bool[Tensor, "token dyad"], n_units: int
) -> Iterator[tuple[Int64[Tensor, " pair"], Int64[Tensor, " pair"]]]:
    """Of each unit, the tokens and the columns at which it is open."""
    token, column = present.nonzero(as_tuple=True)
    of_place = unit[present]
    order = of_place.argsort(stable=True)
    counts = of_place.bincount(minlength=n_units).tolist()
    return zip(token[order].split(counts), column[order].split(counts), strict=True)


def _one_dyad(writes: Float[Tensor, "token d_out"], reads: Float[Tensor, "token d_in"]) -> Dyads:
    present = torch.ones(len(writes), 1, dtype=torch.bool, device=writes.device)
    return Dyads(writes[:, None], reads[:, None], present)


def _behind_norm(dyads: Dyads, post: tuple[Tensor, Tensor], gain: Float[Tensor, " d_out"]) -> Dyads:
    n, r = (t[:, None] for t in post)
    along = (dyads.writes * n).sum(-1, keepdim=True) / n.shape[-1]
    return Dyads((dyads.writes - along * n) * gain / r, dyads.reads, dyads.present)


def _through_bottleneck(
    mlp: TrueMLP, bottleneck: CayleySAE, bare: Factors, trace: Trace, x: Tensor, frame: Frame
) -> Dyads:
    read = x if trace.pre is None or mlp.pre_norm is None else mlp.pre_norm.output(trace.pre[0])
    atoms, gradients, present = bottleneck_dyads(bottleneck, read)
    if trace.pre is not None and mlp.pre_norm is not None:
        gradients = _before_norm(gradients, mlp.pre_norm, trace.pre)
    token = present.nonzero()[:, 0]
    writes = torch.zeros_like(atoms)
    writes[present] = bare.apply(trace.slopes[token], atoms[present])
    return Dyads(writes, frame.reads(gradients), present)


def _before_norm(reads: Float[Tensor, "token dyad d_in"], norm: Norm, pre: tuple[Tensor, Tensor]) -> Tensor:
    n, r = (t[:, None] for t in pre)
    reads = norm.fold(reads)
    along = (reads * n).sum(-1, keepdim=True) / n.shape[-1]
    return (reads - along * n) / r


def bottleneck_dyads(
    bottleneck: CayleySAE, x: Float[Tensor, "token d"]
) -> tuple[Float[Tensor, "token dyad d"], Float[Tensor, "token dyad d"], Bool[Tensor, "token dyad"]]:
    """Atoms D_u and gradients df_u/dx of the active features, level after level: its Jacobian is their sum of dyads.

    With scores standardised by each feature's statistics df_u/dx = D_u / std_u; over a token's level the level's mean
    and deviation depend on x too; without, or where raw scores go forward, it is D_u.
    """
    dictionary, d = bottleneck.dictionary, x.shape[-1]
    atoms, gradients, present = [], [], []
    codes = bottleneck.encode(x.to(bottleneck.bias.dtype))
    for level, offset, (indices, values) in zip(bottleneck.levels, bottleneck.offsets, codes, strict=True):
        D = dictionary.atoms(indices.flatten(), x.dtype).view(*indices.shape, d)
        gradient = D
        if bottleneck.config.forward_standardized and bottleneck.config.score_standardize == "feature":
            gradient = D / bottleneck.std.to(x.dtype)[offset + indices][..., None]
        elif bottleneck.config.forward_standardized and bottleneck.config.score_standardize == "token":
            gradient = _over_tokens_level(x, D, (dictionary.generators.to(x.device) & ((1 << level.n) - 1)) == 0)
        is_active = values != 0
        atoms.append(D * is_active[..., None])
        gradients.append(gradient * is_active[..., None])
        present.append(is_active)
    return torch.cat(atoms, 1), torch.cat(gradients, 1), torch.cat(present, 1)


def _over_tokens_level(
    x: Float[Tensor, "token d"], D: Float[Tensor, "token k d"], zero: Bool[Tensor, " d"]
) -> Float[Tensor, "token k d"]:
    """Gradient of (<x, D_u> - mean) / std, mean and std over all scores of the level, as closed forms in x."""
    d = x.shape[-1]
    direction = zero.to(x) / d**0.5
    mean = x @ direction
    std = (x.square().mean(-1) - mean.square()).clamp(min=1e-12).sqrt()[:, None, None]
    z = ((D @ x[..., None]) - mean[:, None, None]) / std
    std_gradient = (x / d - mean[:, None] * direction)[:, None] / std
    return (D - direction - z * std_gradient) / std

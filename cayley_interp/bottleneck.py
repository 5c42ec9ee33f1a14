"""CayleySAE: a sparse hierarchical bottleneck over a dictionary that has no parameters.

For each level of 2^n features: scores s_u = <x, D_u>; standardised z_u = (s_u - mean_u) / std_u + bias_u; the k largest
z among the candidates are active with f_u = z_u (or s_u); the output is the sum over levels of sum f_u D_u. Candidates
are all features of the first level, and at a deeper one the children of the open parents.

    sae = CayleySAE(CayleySAEConfig(d_model=128, levels="7,8,0;11,16,32"))
    codes = sae.encode(x)       # one (indices, values) per level
    y = sae.decode(codes)       # [..., d_model]

Published as the bottleneck of the `cayley-*-mlp_in` models (arXiv:2607.20652); docs/design.md says which conventions
are documented and which are read between the lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cayley_interp.atoms import attach_scores, synthesise
from cayley_interp.dictionary import CayleyDictionary, DictionaryMap, max_bits
from cayley_interp.routing import Selection, Standardiser, select_children, select_root
from cayley_interp.sign_tables import SignTables, sign_tables

REVIVE_STEP = 0.1
"""By how much a step raises the bias of a silent feature, in standard deviations of its score."""

MIN_STD = 1e-6
"""Least standard deviation of a score: a batch of one token has none."""


class Level(NamedTuple):
    n: int
    """The level has 2^n features."""
    k: int
    """Active features per token."""
    budget: int
    """Routing `parents`: parents opened. Routing `per_parent`: most children per open parent. 0 at the first level."""


class LevelCodes(NamedTuple):
    """The sparse code of one level: which features a token selected, and with what value (0 where clipped)."""

    indices: Int64[Tensor, "*batch k"]
    values: Float[Tensor, "*batch k"]


@dataclass(frozen=True, kw_only=True)
class BottleneckOptions:
    """The conventions of a bottleneck; the defaults are the flags of the published 20B runs."""

    dictionary: DictionaryMap = "gold"
    """Map of the dictionary: gold, bent (even log2 d_model), or random, the control."""
    dictionary_seed: int = 0
    """Seed of the random dictionary."""
    routing: Literal["per_parent", "parents"] = "per_parent"
    """`per_parent`: active parents are open, to at most `budget` children each; `parents`: the `budget` best are."""
    score_standardize: Literal["feature", "token", "none"] = "feature"
    """Scores are standardised by each feature's running statistics, over each token's level, or not at all."""
    forward_standardized: bool = True
    """The active value is the standardised z (the "zombie fix"), not the raw score."""
    signed: bool = False
    """Select by |z| and let values be negative; else select by z and clip values at 0."""
    momentum: float = 0.05
    """Weight of a step in the running statistics, once 1 / momentum steps have been averaged plainly."""
    revive_after: int | None = None
    """Tokens of silence after which a feature's bias rises at every step until it is active again; None: never."""


@dataclass(frozen=True, kw_only=True)
class CayleySAEConfig(BottleneckOptions):
    d_model: int
    """Width of the input and output, a power of two."""
    levels: str
    """"n,k,budget;..." from the coarsest level, as published: "10,16,0;15,32,256"."""

    def __post_init__(self):
        check_levels(self.d_model, parse_levels(self.levels), self)


class CayleySAE(nn.Module):
    """The bottleneck: `encode`, `decode`, and `forward` = decode(encode(x)).

    Learned: one bias per feature (with `forward_standardized`). Kept as buffers: each feature's running mean and
    standard deviation, and the tokens since it was last active. In training mode `forward` only adds a batch to the
    moments; `update_statistics`, called once an optimiser step, moves the buffers, so that a step does not depend on
    how its batch was cut or spread.
    """

    bias: Tensor
    mean: Tensor
    std: Tensor
    n_updates: Tensor
    tokens_since_active: Tensor

    def __init__(self, config: CayleySAEConfig):
        super().__init__()
        self.config = config
        self.levels = parse_levels(config.levels)
        sizes = [1 << level.n for level in self.levels]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.d_sae = sum(sizes)
        self.dictionary = CayleyDictionary(
            config.d_model.bit_length() - 1, self.levels[-1].n, config.dictionary, config.dictionary_seed
        )
        # Where raw scores go forward the bias takes part in selection only, which has no gradient.
        self.bias = nn.Parameter(torch.zeros(self.d_sae), requires_grad=config.forward_standardized)
        self.register_buffer("mean", torch.zeros(self.d_sae))
        self.register_buffer("std", torch.ones(self.d_sae))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tokens_since_active", torch.zeros(self.d_sae, dtype=torch.int64))
        self._batch: _BatchMoments | None = None

    def extra_repr(self) -> str:
        return f"levels={self.config.levels!r}, d_sae={self.d_sae}, {self.dictionary!r}"

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        codes = self.encode(x)
        if self.training:
            self._record(_at_least_float32(_rows(x.detach())), codes)
        return self.decode(codes).to(x.dtype)

    def train(self, mode: bool = True) -> "CayleySAE":
        # Not on the first forward pass: torch.compile would make one graph for it and another for those that follow.
        if mode and self._batch is None:
            self._batch = self._new_batch(_at_least_float32(self.mean))
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "CayleySAE":
        self._batch = None  # of the device and dtype that the module leaves
        return super()._apply(*args, **kwargs)

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> tuple[LevelCodes, ...]:
        """Sparse codes, one (indices, values) per level; indices run from 0 to 2^n - 1 within their level.

        Raises:
            ValueError: the last dimension of x is not d_model.
        """
        if x.shape[-1] != self.config.d_model:
            raise ValueError(f"CayleySAE has d_model={self.config.d_model}, got an input of shape {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):  # selection by bf16 scores would be mostly ties
            flat = _at_least_float32(_rows(x))
            with torch.no_grad():
                selections = self._select(flat)
            codes = []
            for i, chosen in enumerate(selections):
                scores = attach_scores(flat, chosen.indices, chosen.scores, self._tables(i, flat))
                values = scores
                if self.config.forward_standardized:
                    values = self._standardiser(i, flat).z(scores, chosen.indices)
                if not self.config.signed:
                    values = values.relu()
                shape = (*x.shape[:-1], chosen.indices.shape[-1])
                codes.append(LevelCodes(chosen.indices.view(shape), values.view(shape)))
        return tuple(codes)

    def decode(self, codes: tuple[LevelCodes, ...]) -> Float[Tensor, "*batch d_model"]:
        """Sum over levels of sum over active u of f_u D_u."""
        d = self.config.d_model
        batch = codes[0].indices.shape[:-1]
        with torch.autocast(codes[0].values.device.type, enabled=False):
            parts = [
                synthesise(_rows(c.indices), _rows(c.values), self._tables(i, c.values)) for i, c in enumerate(codes)
            ]
            return sum(parts[1:], parts[0]).view(*batch, d)

    def to_dense(self, codes: tuple[LevelCodes, ...]) -> tuple[Float[Tensor, "*batch _"], ...]:
        """The same code as one [*batch, 2^n] tensor per level, 0 where a feature is not active."""
        sizes = (1 << level.n for level in self.levels)
        return tuple(
            c.values.new_zeros(*c.values.shape[:-1], size).scatter(-1, c.indices, c.values)
            for c, size in zip(codes, sizes, strict=True)
        )

    def decode_dense(self, acts: Sequence[Float[Tensor, "*batch _"]]) -> Float[Tensor, "*batch d_model"]:
        """`decode` of dense codes, whatever their number of active features: one transform per level."""
        parts = [self.dictionary.combine(level) for level in acts]
        return sum(parts[1:], parts[0])

    @torch.no_grad()
    def update_statistics(self) -> None:
        """Move the running statistics by the batches seen since the last call, over all processes together.

        With `revive_after`, raise the biases of features that have been silent for so long: a bias gets a gradient only
        where its feature is active, so nothing else would (as in auxiliary-loss-free balancing, arXiv:2408.15664).
        """
        if self._batch is None:
            return
        batch = self._batch
        batch.reduce()
        if not int(batch.tokens):
            return
        active = batch.firings > 0
        self.tokens_since_active += int(batch.tokens)
        self.tokens_since_active[active] = 0
        if self.config.revive_after is not None:
            raised = REVIVE_STEP * (self.tokens_since_active >= self.config.revive_after).to(self.bias.dtype)
            # Selection compares biases of one level: taking the mean away changes none, and keeps values from drifting.
            for level in raised.split([1 << level.n for level in self.levels]):
                level -= level.mean()
            self.bias += raised
        if self.config.score_standardize == "feature":
            self._move_standardiser(*batch.mean_and_covariance())
        batch.clear()

    def _move_standardiser(self, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]) -> None:
        means, variances = self.dictionary.moments(mean, covariance)
        weight = max(self.config.momentum, 1 / (int(self.n_updates) + 1))
        for level, offset in zip(self.levels, self.offsets, strict=True):
            size = 1 << level.n
            old_mean, old_std = self.mean[offset : offset + size], self.std[offset : offset + size]
            variance = old_std.double().square().lerp(variances[:size].clamp(min=0), weight)
            old_mean.lerp_(means[:size].to(old_mean.dtype), weight)
            old_std.copy_(variance.sqrt().clamp(min=MIN_STD))
        self.n_updates += 1

    def _select(self, x: Tensor) -> list[Selection]:
        c = self.config
        by_budget = c.routing == "parents"
        selections: list[Selection] = []
        for i, level in enumerate(self.levels):
            open_next = self.levels[i + 1].budget if by_budget and i + 1 < len(self.levels) else None
            standardiser = self._standardiser(i, x)
            if i == 0:
                selections.append(select_root(x, standardiser, level.k, open_next, c.signed))
            else:
                selections.append(
                    select_children(
                        x,
                        selections[-1].open,
                        self.levels[i - 1].n,
                        level.n,
                        self.dictionary,
                        standardiser,
                        k=level.k,
                        per_parent=None if by_budget else level.budget,
                        open_next=open_next,
                        signed=c.signed,
                    )
                )
        return selections

    def _standardiser(self, i: int, x: Float[Tensor, "n d"]) -> Standardiser:
        """How scores of level i become z.

        Over a token's level the mean and size of the scores are closed forms: the sum of all atoms is zero except where
        s(x) = 0, and the atoms are a tight frame, sum D_u D_u' = 2^n / d.
        """
        size, offset = 1 << self.levels[i].n, self.offsets[i]
        bias = self.bias[None, offset : offset + size].to(x.dtype)
        if self.config.score_standardize == "none":
            return Standardiser(x.new_ones(1, 1), bias)
        if self.config.score_standardize == "feature":
            scale = 1 / self.std[None, offset : offset + size].to(x.dtype).clamp(min=MIN_STD)
            return Standardiser(scale, bias - self.mean[None, offset : offset + size].to(x.dtype) * scale)
        zero = (self.dictionary.generators.to(x.device) & (size - 1) == 0).to(x.dtype)
        mean = (x @ zero)[:, None] / x.shape[-1] ** 0.5
        std = (x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=1e-12).sqrt()
        return Standardiser(1 / std, bias, -mean / std)

    def _tables(self, i: int, like: Tensor) -> SignTables:
        return sign_tables(self.dictionary, self.levels[i].n, like.device, like.dtype)

    @torch.no_grad()
    def _record(self, x: Float[Tensor, "n d"], codes: tuple[LevelCodes, ...]) -> None:
        if self._batch is None or self._batch.sum_x.dtype != x.dtype:
            self._batch = self._new_batch(x)
        self._batch.add(x, codes, self.offsets)

    def _new_batch(self, like: Tensor) -> "_BatchMoments":
        return _BatchMoments(like, self.config.d_model, self.d_sae, self.config.score_standardize == "feature")


class _BatchMoments:
    """What the batches of one optimiser step add up to: tokens, first and second moments of x, firings per feature."""

    def __init__(self, like: Tensor, d_model: int, d_sae: int, with_moments: bool):
        self.tokens = torch.zeros((), dtype=torch.int64, device=like.device)
        self.firings = torch.zeros(d_sae, dtype=torch.int64, device=like.device)
        self.with_moments = with_moments
        self.sum_x = like.new_zeros(d_model)
        self.sum_xx = like.new_zeros(d_model, d_model)

    def add(self, x: Tensor, codes: tuple[LevelCodes, ...], offsets: list[int]) -> None:
        self.tokens += len(x)
        for (indices, values), offset in zip(codes, offsets, strict=True):
            self.firings.index_add_(0, indices.flatten() + offset, (values != 0).flatten().long())
        if self.with_moments:
            with torch.autocast(x.device.type, enabled=False):
                self.sum_x += x.sum(0)
                self.sum_xx.addmm_(x.T, x)

    def clear(self) -> None:
        for total in (self.tokens, self.firings, self.sum_x, self.sum_xx):
            total.zero_()

    def reduce(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in (self.tokens, self.firings, self.sum_x, self.sum_xx):
                torch.distributed.all_reduce(total)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """In float64: a variance is a difference of moments."""
        mean = self.sum_x.double() / self.tokens
        return mean, self.sum_xx.double().div_(self.tokens).addr_(mean, mean, alpha=-1)


def parse_levels(levels: str) -> tuple[Level, ...]:
    """ "10,16,0;15,32,256" -> (Level(10, 16, 0), Level(15, 32, 256)).

    Raises:
        ValueError: the string does not have that form.
    """
    try:
        return tuple(Level(*(int(number) for number in part.split(","))) for part in levels.split(";"))
    except (TypeError, ValueError):
        raise ValueError(
            f'levels are written "n,k,budget;n,k,budget;...", for example "10,16,0;15,32,256"; got {levels!r}'
        ) from None


def check_levels(d_model: int, levels: tuple[Level, ...], options: BottleneckOptions) -> None:
    """Whether these levels can be built on this width.

    Raises:
        ValueError: naming the first thing that cannot, and the way out.
    """
    t = d_model.bit_length() - 1
    if d_model < 4 or d_model != 1 << t or t > 16:
        near = [1 << min(max(t, 2), 15), 1 << min(max(t, 2), 15) + 1]
        raise ValueError(f"d_model must be a power of two from 4 to 65536, got {d_model}: try {near[0]} or {near[1]}")
    if options.dictionary not in get_args(DictionaryMap):
        raise ValueError(f"no dictionary is called {options.dictionary!r}: use one of {get_args(DictionaryMap)}")
    if not 0 < options.momentum <= 1:
        raise ValueError(f"momentum must be above 0 and at most 1, got {options.momentum}")
    if options.dictionary == "bent" and t % 2:
        raise ValueError(
            f"the bent dictionary needs an even log2(d_model), got {t} (d_model={d_model}): "
            f"use dictionary gold, or d_model {d_model // 2} or {d_model * 2}"
        )
    if levels[0].n != t:
        raise ValueError(
            f"the first level is the Walsh basis, so its n must be log2(d_model) = {t}, got n = {levels[0].n}"
        )
    if levels[0].budget:
        raise ValueError(f"the first level has no parents, so its budget must be 0, got {levels[0].budget}")
    for i, level in enumerate(levels):
        where = f"level {i} ({level.n},{level.k},{level.budget})"
        top = max_bits(t, options.dictionary)
        if level.n > top:
            raise ValueError(f"{where}: the {options.dictionary} dictionary at d_model={d_model} has n up to {top}")
        candidates = _candidates(levels, i, options, where)
        if not 1 <= level.k <= candidates:
            raise ValueError(
                f"{where}: k must be from 1 to the {candidates} candidates a token has there: lower k, or open more"
            )


def _candidates(levels: tuple[Level, ...], i: int, options: BottleneckOptions, where: str) -> int:
    """Features a token chooses from at level i."""
    level = levels[i]
    if i == 0:
        return 1 << level.n
    parent = levels[i - 1]
    if level.n <= parent.n:
        raise ValueError(f"{where}: each level must have a larger n than the one above it, which has {parent.n}")
    if level.budget < 1:
        raise ValueError(f"{where}: the budget of a deeper level must be at least 1")
    children = 1 << (level.n - parent.n)
    if options.routing == "per_parent":
        return parent.k * min(level.budget, children)
    available = _candidates(levels, i - 1, options, where)
    if level.budget > available:
        raise ValueError(f"{where}: a budget of {level.budget} parents, but only {available} can be opened")
    return level.budget * children


def _rows(x: Tensor) -> Tensor:
    """All leading dimensions as one; a lone vector is one row."""
    return x.reshape(-1, x.shape[-1])


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

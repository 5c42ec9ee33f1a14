"""Which units get a page: the most frequent, a random draw, or those that are asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from analysis.dashboards.sources import Group
from analysis.dashboards.survey import Survey
from analysis.dead_features import dead, dense, zombie

DEAD, ZOMBIE, DENSE = 1, 2, 4
"""Bits of a unit's flags."""


def flags_of(survey: Survey) -> list[int]:
    """Of each unit, its bits."""
    c = survey.counter
    return (DEAD * dead(c).long() + ZOMBIE * zombie(c).long() + DENSE * dense(c).long()).tolist()


@dataclass(frozen=True)
class Draw:
    """N units of every group."""

    how: str
    n: int


@dataclass(frozen=True)
class Listed:
    """Units of some groups, by their numbers."""

    part: str
    where: list[int]
    units: list[int]


def read_features(groups: Sequence[Group], features: Sequence[str]) -> list[Draw | Listed]:
    """What is asked for, before anything is computed.

    Args:
        features: `top:N`, in each group the N that open most often of those that are neither dense nor zombie;
            `random:N`, N of those that open; numbers, `17,42`, in every group where they open; `GROUP:17,42`. Of a
            group with at most N units that open, top:N and random:N give all.

    Raises:
        ValueError: another form, or no such group or unit.
    """
    names, found = [group.name for group in groups], list[Draw | Listed]()
    for part in features:
        if drawn := re.fullmatch(r"(top|random):(\d+)", part):
            found.append(Draw(drawn[1], int(drawn[2])))
            continue
        listed = re.fullmatch(r"(?:(?P<group>.+):)?(?P<units>\d+(,\d+)*)", part)
        if not listed:
            raise ValueError(f"--features {part}: expected top:N, random:N, 17,42,1003 or {names[-1]}:17,42")
        if listed["group"] is not None and listed["group"] not in names:
            raise ValueError(f"--features {part}: there is no group {listed['group']}; there are {', '.join(names)}")
        where = list(range(len(groups))) if listed["group"] is None else [names.index(listed["group"])]
        units = [int(unit) for unit in listed["units"].split(",")]
        largest = max(groups[i].n_units for i in where)
        if max(units) >= largest:
            raise ValueError(f"--features {part}: there is no unit {max(units)}; they are 0 to {largest - 1}")
        found.append(Listed(part, where, units))
    return found


def choose(
    groups: Sequence[Group], surveys: Sequence[Survey], features: Sequence[Draw | Listed], seed: int
) -> list[list[int]]:
    """Units of each group that get a page, rising; never one that does not open on the text.

    Raises:
        ValueError: a unit that never opens.
    """
    chosen: list[set[int]] = [set() for _ in groups]
    for part in features:
        if isinstance(part, Draw):
            for i, own in enumerate(surveys):
                chosen[i].update(_drawn(own, part.how, part.n, seed + i))
            continue
        for unit in part.units:
            found = [i for i in part.where if unit < groups[i].n_units and surveys[i].counter.opened[unit] > 0]
            if not found:
                raise ValueError(
                    f"--features {part.part}: unit {unit} never opens on this text: choose others, or more --tokens"
                )
            for i in found:
                chosen[i].add(unit)
    return [sorted(units) for units in chosen]


def _drawn(survey: Survey, how: str, n: int, seed: int) -> list[int]:
    counter = survey.counter
    alive: Bool[Tensor, " unit"] = ~dead(counter)
    if int(alive.sum()) <= n:
        return alive.nonzero().flatten().tolist()
    if how == "random":
        units = alive.nonzero().flatten()
        return units[torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))[:n]].tolist()
    eligible = alive & ~dense(counter) & ~zombie(counter)
    order = counter.opened.masked_fill(~eligible, -1).argsort(descending=True, stable=True)
    return order[: min(n, int(eligible.sum()))].tolist()

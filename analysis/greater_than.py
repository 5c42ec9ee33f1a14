"""The Greater-Than task: does a host know that a war which began in 1732 ends later in its century?

"The war lasted from the year 1732 to the year 17" should be followed by 33 ... 99. The figure is the probability
difference of Hanna, Liu and Variengien 2023 (arXiv:2305.00586): P(years > YY) - P(years <= YY), averaged over prompts.

    result = greater_than(host)                            # or greater_than(host, {site: replacement})
    print(result.difference, result.standard_error)
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from molt_lens.hosts import Host, Site
from molt_lens.packing import keep_mask
from molt_lens.replacement import spliced

TEMPLATE = "The {noun} lasted from the year {century}{year:02d} to the year {century}"

NOUNS = (
    *("campaign", "conflict", "construction", "consultation", "crisis", "dispute", "dynasty", "empire", "epidemic"),
    *("expedition", "famine", "investigation", "journey", "negotiation", "occupation", "pilgrimage", "plague", "reign"),
    *("siege", "struggle", "trial", "voyage", "war"),
)
"""Things that last for years, in the spirit of the paper's list."""

CENTURIES = range(11, 18)
FIRST_YEAR, LAST_YEAR = 2, 98
"""Each start leaves years on either side, and the century's first and last are no special tokens (as in the paper)."""


@dataclass(frozen=True)
class Prompt:
    text: str
    year: int
    """The two digits the end must exceed."""


@dataclass(frozen=True)
class GreaterThan:
    """Means over prompts."""

    difference: float
    """P(later years) - P(earlier years and the same): -1 to 1, and 0 of a host that gives years no order."""
    standard_error: float
    """Of `difference`, over prompts."""
    mass: float
    """P(any two digits): what of the host's probability the difference is made of."""
    n_prompts: int


def make_prompts(n: int, seed: int = 0) -> list[Prompt]:
    """Distinct prompts, drawn from all nouns, centuries 11 to 17 and years 02 to 98.

    Raises:
        ValueError: n below 2, or above the number of prompts there are.
    """
    every = [(noun, c, year) for noun in NOUNS for c in CENTURIES for year in range(FIRST_YEAR, LAST_YEAR + 1)]
    if not 2 <= n <= len(every):
        raise ValueError(f"n must be from 2 to {len(every)}, got {n}")
    drawn = random.Random(seed).sample(every, n)
    return [Prompt(TEMPLATE.format(noun=noun, century=c, year=year), year) for noun, c, year in drawn]


def greater_than(
    host: Host,
    replacements: Mapping[Site, Callable[[Tensor], Tensor]] | None = None,
    prompts: list[Prompt] | None = None,
) -> GreaterThan:
    """The probability difference of a host, as it is or with replacements spliced in; by default over 100 prompts.

    With replacements, special tokens and the first keep the host's own output, as in `measure_behaviour`.

    Raises:
        ValueError: fewer than two prompts, a host without a tokenizer, or one that has no token for a digit.
    """
    prompts = make_prompts(100) if prompts is None else prompts
    if len(prompts) < 2:
        raise ValueError(f"a standard error needs two prompts or more, got {len(prompts)}")
    tokens = DigitTokens(host)
    differences, masses = [], []
    for prompt in prompts:
        p = year_probabilities(host, prompt.text, tokens, replacements or {})
        differences.append(p[prompt.year + 1 :].sum() - p[: prompt.year + 1].sum())
        masses.append(p.sum())
    difference, mass = torch.stack(differences), torch.stack(masses)
    error = difference.std() / len(prompts) ** 0.5
    return GreaterThan(difference.mean().item(), error.item(), mass.mean().item(), len(prompts))


class DigitTokens:
    """A tokenizer's tokens for one digit and for two, as they continue a number.

    Attributes:
        single: id of the token "0" ... "9".
        double: id of the token "00" ... "99", or None where there is none.
    """

    def __init__(self, host: Host):
        self._host = host
        self._anchor = host.tokenize(".")  # in front, lest a tokenizer add the space of a word's beginning
        single = [self._token(str(digit)) for digit in range(10)]
        self.double = [self._token(f"{year:02d}") for year in range(100)]
        if None in single:
            raise ValueError(f"the tokenizer of {host.name} has no token for the digit {single.index(None)} alone")
        self.single = [token for token in single if token is not None]

    def _token(self, digits: str) -> int | None:
        ids = self._host.tokenize("." + digits)
        if len(ids) != len(self._anchor) + 1 or ids[:-1] != self._anchor:
            return None
        tokenizer: Any = self._host.tokenizer
        return ids[-1] if tokenizer.decode(ids[-1:]).strip() == digits else None


@torch.no_grad()
def year_probabilities(
    host: Host, text: str, tokens: DigitTokens, replacements: Mapping[Site, Callable[[Tensor], Tensor]]
) -> Float[Tensor, "100"]:
    """P(the text goes on with "00") ... P("99"), float64, on the CPU.

    Exact in any tokenizer: the probability of the two digits as one token, where there is such a token, plus that of
    the first digit times that of the second after it. GPT-2 has tokens for both ways, Gemma for the second only.

    Raises:
        ValueError: what `Host.logits` raises.
    """
    bos = [] if host.bos_id is None else [host.bos_id]
    ids = torch.tensor([[*bos, *host.tokenize(text), digit] for digit in tokens.single])
    with spliced(host, replacements, "replace", keep=~keep_mask(host, ids)):
        logits = host.logits(ids)
    # The last two positions: what follows the text, the same in every row, and what follows each first digit.
    first = logits[0, -2].double().softmax(-1).cpu()
    second = logits[:, -1].double().softmax(-1).cpu()
    by_digits = first[tokens.single][:, None] * second[:, tokens.single]
    whole = [0.0 if token is None else first[token].item() for token in tokens.double]
    return by_digits.flatten() + torch.tensor(whole, dtype=torch.float64)

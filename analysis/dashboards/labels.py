"""Names for units by a language model, and how well each name tells where the unit opens. Optional; off by default.

A provider completes prompts: any OpenAI-compatible endpoint, or a local Hugging Face model. It is shown the strongest
contexts and proposes a name; the name is then scored by detection (as in Paulo et al. 2024, arXiv:2410.13928): shown
other contexts of the unit, weak and strong, among contexts all through which it is closed, the provider says which fit.
A name without its score is decoration: both are kept together.
"""

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from analysis.dashboards.details import Context, Details

MAX_FREQUENCY = 0.2
"""Units open at a larger share of tokens are not named: contexts do not say what so many tokens have in common."""
SHOWN, HELD_OUT = 8, 6
"""Contexts that the name is made from, and at most so many with and as many without the unit that it is scored on."""
NAME_LENGTH = 120


@runtime_checkable
class Provider(Protocol):
    """Something that completes a prompt."""

    name: str

    def complete(self, prompt: str, max_tokens: int) -> str: ...


@dataclass(frozen=True)
class Label:
    """A name and its balanced accuracy in telling held-out contexts with the unit from those without; 0.5 by chance."""

    name: str
    score: float
    contexts: int
    """That it was scored on."""
    provider: str


class UnusableAnswer(ValueError):
    """A completion without what was asked for: the next unit may fare better."""


def label_unit(
    provider: Provider,
    details: Details,
    strings: Sequence[str],
    *,
    frequency: float,
    evidence: str = "",
    seed: int = 0,
) -> Label | None:
    """A name for a unit, or None where it is open too often or has too few contexts to hold any out.

    Args:
        details: with contexts in which the unit is closed.
        strings: how each token is shown.
        evidence: what else the provider is told, such as the tokens that a transform reads and writes.

    Raises:
        UnusableAnswer: no name, or it does not say which contexts fit.
        ValueError: what the provider raises.
    """
    strongest = [c for c in details.contexts if c.which == "strongest"]
    positives = [c for c in details.contexts if c.which != "strongest"][:HELD_OUT]
    negatives = details.closed[: len(positives)]
    if frequency > MAX_FREQUENCY or len(strongest) < 2 or len(positives) < 2 or len(negatives) < len(positives):
        return None
    name = _name(provider.complete(naming_prompt(strongest[:SHOWN], strings, evidence), 60))
    mixed = [(c, True) for c in positives] + [(c, False) for c in negatives]
    random.Random(f"{seed} {details.unit}").shuffle(mixed)
    prompt = detection_prompt(name, [c for c, _ in mixed], strings)
    fits = _fits(provider.complete(prompt, 4 * len(mixed) + 20), len(mixed))
    hits = [fit == is_open for fit, (_, is_open) in zip(fits, mixed, strict=True)]
    by_class = [[h for h, (_, o) in zip(hits, mixed, strict=True) if o == wanted] for wanted in (True, False)]
    return Label(name, sum(sum(h) / len(h) for h in by_class) / 2, len(mixed), provider.name)


# ---- What is asked ----


def naming_prompt(contexts: Sequence[Context], strings: Sequence[str], evidence: str) -> str:
    listed = "\n".join(f"{i}. {marked(c, strings)}" for i, c in enumerate(contexts, 1))
    return (
        "A unit inside a language model opens at the tokens marked <<like this>>. Say in a few words what they have in "
        "common: the token, its meaning, or its place in the text. Answer with one line that starts with 'Name:'.\n\n"
        f"{listed}\n{evidence and evidence + chr(10)}\nName:"
    )


def detection_prompt(name: str, contexts: Sequence[Context], strings: Sequence[str]) -> str:
    listed = "\n".join(f"{i}. {plain(c, strings)}" for i, c in enumerate(contexts, 1))
    return (
        f"A unit inside a language model was described as: {name}\n\n"
        f"For each of the following {len(contexts)} passages say whether the description fits one of its tokens. "
        "Answer with one line of the numbers of those that fit, "
        f"separated by commas, or 'none'.\n\n{listed}\n\nFits:"
    )


def marked(context: Context, strings: Sequence[str]) -> str:
    """The context with the tokens at which the unit is open in << >>."""
    return "".join(
        f"<<{strings[token]}>>" if act else strings[token]
        for token, act in zip(context.tokens, context.acts, strict=True)
    )


def plain(context: Context, strings: Sequence[str]) -> str:
    return "".join(strings[token] for token in context.tokens)


def _name(answer: str) -> str:
    line = next((line for line in answer.strip().splitlines() if line.strip()), "")
    name = re.sub(r"^\s*name\s*:\s*", "", line, flags=re.IGNORECASE).strip().strip("\"'*")
    if not name:
        raise UnusableAnswer(f"the provider's answer has no name: {answer[:200]!r}")
    return name[:NAME_LENGTH]


def _fits(answer: str, n: int) -> list[bool]:
    line = next((line for line in answer.strip().splitlines() if line.strip()), "")
    line = re.sub(r"^\s*fits\s*:\s*", "", line, flags=re.IGNORECASE)
    numbers = {int(number) for number in re.findall(r"\d+", line)}
    if not numbers and "none" not in line.lower():
        raise UnusableAnswer(f"the provider does not say which passages fit: {answer[:200]!r}")
    return [i + 1 in numbers for i in range(n)]


# ---- Who answers ----


class OpenAICompatible:
    """A /chat/completions endpoint; the key is read from an environment variable and never written anywhere."""

    def __init__(self, base_url: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout: float = 60):
        import httpx

        key = os.environ.get(key_variable)
        self.name, self._model = f"{model} at {base_url}", model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.HTTPTransport(retries=3)
        self._client = httpx.Client(base_url=base_url, headers=headers, timeout=timeout, transport=transport)

    def complete(self, prompt: str, max_tokens: int) -> str:
        """
        Raises:
            ValueError: the endpoint cannot be reached, refuses, or answers in another form.
        """
        import httpx

        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        try:
            answer = self._client.post("chat/completions", json=body)
            answer.raise_for_status()
            content = answer.json()["choices"][0]["message"]["content"]
        except httpx.HTTPStatusError as error:
            said = error.response.text[:200]
            raise ValueError(f"{self.name} answers {error.response.status_code}: {said!r}") from error
        except (httpx.HTTPError, KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.name} gives no completion: {error!r}") from error
        if not isinstance(content, str):
            raise ValueError(f"{self.name} gives no completion: its content is {content!r} and not text")
        return content


class LocalModel:
    """A causal language model of transformers: a Hub id, a folder, or the packaged gemma-3-270m."""

    def __init__(self, name: str, device: str = "cpu"):
        from molt_lens.hosts import load_host

        self._host, self.name = load_host(name, device=device), name

    def complete(self, prompt: str, max_tokens: int) -> str:
        tokenizer = self._host.tokenizer
        if self._host.is_chat:
            message = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        ids = inputs["input_ids"].to(self._host.device)
        model: Any = self._host.model
        made = model.generate(ids, max_new_tokens=max_tokens, do_sample=False)
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def open_provider(name: str) -> Provider:
    """`openai:MODEL@URL` for an endpoint, `hf:NAME` for a local model.

    Raises:
        ValueError: neither of the two.
    """
    kind, _, rest = name.partition(":")
    model, _, url = rest.partition("@")
    if kind == "openai" and model and url:
        return OpenAICompatible(url, model)
    if kind == "hf" and rest:
        return LocalModel(rest)
    raise ValueError(
        f"--labels {name!r}: expected openai:MODEL@URL, such as openai:gpt@http://localhost:8000/v1, or hf:NAME"
    )

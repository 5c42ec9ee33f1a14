"""A host, with replacements spliced in or not, as a model of EleutherAI's LM Evaluation Harness (lm-eval).

    lm = HostLM(load_host("gemma-3-270m"), {site: replacement})
    lm_eval.simple_evaluate(lm, tasks=["hellaswag"])

A CayleyGPT is a host too: HostLM(load_host(load_pretrained("cayley-tiny-2L-sotu", wrap=None))).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from analysis.features import Progress
from analysis.splicing import LOGITS_AT_A_TIME
from cayley_interp.model import token_losses
from molt_lens.hosts import Host, Site
from molt_lens.packing import keep_mask
from molt_lens.replacement import spliced

MAX_LENGTH = 1024
"""Longest input by default, where the host's n_ctx is longer: the logits of a batch are held whole."""

MAX_NEW_TOKENS = 256
"""Of a task that names no number, as in lm-eval's own models; at most half the context here."""


class HostLM(TemplateLM):
    """What lm-eval asks of a model, answered by a host's forward passes.

    Figures are those of lm-eval's `HFLM` with the same tokenizer: a context gets the special tokens its tokenizer puts
    in front, a text without context is scored after BOS, or EOS where there is none, and what is too long loses its
    left end. One thing differs: perplexity tokenises without special tokens, as lm-eval's interface defines it, where
    HFLM also predicts the BOS that some tokenizers add (its `add_bos_token=False` agrees).

    With replacements, special tokens and the first token of an input keep the host's own output, since no map is
    trained on them, as in `measure_behaviour`.
    """

    def __init__(
        self,
        host: Host,
        replacements: Mapping[Site, Callable[[Tensor], Tensor]] | None = None,
        *,
        max_length: int | None = None,
        progress: Progress = lambda _what, _share: None,
    ):
        """
        Args:
            max_length: longest input in tokens, which perplexities depend on; by default the smaller of n_ctx and 1024.

        Raises:
            ValueError: a host without a tokenizer, or whose tokenizer has neither BOS nor EOS; a max_length below 2 or
                above n_ctx.
        """
        super().__init__()
        self.max_length = min(host.n_ctx, MAX_LENGTH) if max_length is None else max_length
        if not 2 <= self.max_length <= host.n_ctx:
            raise ValueError(
                f"max_length must be from 2 to the n_ctx={host.n_ctx} of {host.name}, got {self.max_length}"
            )
        host.tokenize("")  # raises where there is no tokenizer
        ends = [token for token in (host.tokenizer.eos_token_id, host.bos_id) if token is not None]
        if not ends:
            raise ValueError(f"the tokenizer of {host.name} has neither BOS nor EOS to score a first token after")
        self._eos_or_bos, self._bos_or_eos = ends[0], ends[-1]
        self.host, self.replacements, self.progress = host, dict(replacements or {}), progress
        self.tokenizer = host.tokenizer
        self._device = host.device

    @property
    def eot_token_id(self) -> int:
        return self._eos_or_bos

    @property
    def prefix_token_id(self) -> int:
        return self._bos_or_eos

    @property
    def tokenizer_name(self) -> str:
        return self.host.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests], "scoring")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Log-likelihood of each text, in nats, by windows of max_length in which every token is predicted once.

        Windows are disjoint, but for the last: it is filled up on the left with tokens already predicted.
        """
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(owners, self._score(windows, "perplexity"), strict=True):
            totals[i] += log_likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Greedy continuations, each cut before the first of its stop strings.

        Every token is a forward pass of the whole text: a replacement may sit in any layer, and no cache knows of it.

        Raises:
            ValueError: a task that samples, or that wants as many tokens as fit the context or more.
        """
        texts = [self._start(*request.args) for request in requests]
        order = sorted(range(len(texts)), key=lambda i: -texts[i].longest)
        done = 0
        for batch in self._batches(order, lambda i: texts[i].longest):
            unfinished = [texts[i] for i in batch]
            while unfinished:
                for text, logits in zip(unfinished, self._logits([text.ids for text in unfinished]), strict=True):
                    text.ids.append(int(logits[len(text.ids) - 1].argmax()))
                unfinished = [text for text in unfinished if not self._is_finished(text)]
            done += len(batch)
            self.progress("generating", done / len(texts))
        return [postprocess_generated_text(self._decoded(text), text.until, None) for text in texts]

    def _start(self, context: str, gen_kwargs: dict[str, Any]) -> "_Text":
        """A text to go on with, its left end cut so that what is asked for fits."""
        asked: Any = normalize_gen_kwargs(gen_kwargs, min(MAX_NEW_TOKENS, self.max_length // 2))
        if asked["do_sample"]:
            raise ValueError(f"only greedy generation is offered, and this task samples: {gen_kwargs}")
        n_new = asked["max_gen_toks"]
        if not 0 < n_new < self.max_length:
            raise ValueError(
                f"the task wants {n_new} new tokens, and inputs have at most max_length={self.max_length}: raise "
                "max_length, or lower the task's max_gen_toks"
            )
        ids = self.tok_encode(context) if context else [self.prefix_token_id]
        ids = ids[-(self.max_length - n_new) :]
        until = handle_stop_sequences(list(asked["until"]), self.tokenizer.decode([self.eot_token_id]))
        return _Text(list(ids), len(ids), n_new, [stop for stop in until if stop])

    def _is_finished(self, text: "_Text") -> bool:
        if text.ids[-1] == self.eot_token_id or len(text.ids) == text.longest:
            return True
        decoded = self._decoded(text)
        return any(stop in decoded for stop in text.until)

    def _decoded(self, text: "_Text") -> str:
        return self.tokenizer.decode(text.ids[text.n_prompt :], skip_special_tokens=True)

    def _score(self, pairs: list[tuple[list[int], list[int]]], what: str) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each second part after its first, and whether it is the likeliest token by token.

        Pairs whose input is the same, such as the one-token answers to a question, share a forward pass.

        Raises:
            ValueError: a second part that is empty, or longer than max_length.
        """
        by_input: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation to score has {len(continuation)} tokens, expected 1 to max_length="
                    f"{self.max_length}: {self.tokenizer.decode(continuation[:20])!r} ..."
                )
            by_input.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(i)
        results: dict[int, tuple[float, bool]] = {}
        for inputs in self._batches(sorted(by_input, key=len, reverse=True), len):
            for ids, logits in zip(inputs, self._logits([list(ids) for ids in inputs]), strict=True):
                for i in by_input[ids]:
                    targets = torch.tensor(pairs[i][1], device=logits.device)
                    rows = logits[len(ids) - len(targets) : len(ids)]
                    loss = token_losses(rows[None], targets[None]).double().sum().item()
                    results[i] = -loss, rows.argmax(-1).equal(targets)
            self.progress(what, len(results) / len(pairs))
        return [results[i] for i in range(len(pairs))]

    def _batches(self, items: list[Any], length: Callable[[Any], int]) -> Iterator[list[Any]]:
        """Items, longest first, in batches whose logits fit in memory."""
        start = 0
        while start < len(items):
            n = max(1, LOGITS_AT_A_TIME // (length(items[start]) * self.host.d_vocab))
            yield items[start : start + n]
            start += n

    def _logits(self, inputs: list[list[int]]) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits, valid up to each input's length: what pads it on the right is seen by no token of it."""
        ids = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.int64)
        for row, tokens in zip(ids, inputs, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        with spliced(self.host, self.replacements, "replace", keep=~keep_mask(self.host, ids)):
            return self.host.logits(ids)


@dataclass
class _Text:
    """A text that is being generated."""

    ids: list[int]
    n_prompt: int
    n_new: int
    until: list[str]

    @property
    def longest(self) -> int:
        return self.n_prompt + self.n_new

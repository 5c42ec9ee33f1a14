"""Answers of HostLM against hand-computed sums and against lm-eval's own model of the same weights and tokenizer."""

import json
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from analysis.evaluate_lm import evaluate_lm, load_task, to_sheet
from analysis.lm_eval_adapter import HostLM
from cayley_interp import CayleyGPT, CayleyGPTConfig
from molt_lens.hosts import Host, Site, load_host
from molt_lens.replacement import true_mlp
from tests.analysis.fabricated import make_tokenizer
from tests.analysis.local_tasks import write_tasks
from tests.molt_lens.host_models import BOS_ID, N_CTX, tiny_host, tiny_model, tiny_text, tiny_tokenizer

PAIRS = [
    ("the war lasted", " long"),
    ("the war lasted ", "long"),  # the space moves over
    ("", "a text without context"),
    ("yes or no:", "y"),
    ("yes or no:", "n"),  # the same input as the line before
    (tiny_text(3 * N_CTX), " far too long"),
]


@pytest.fixture(scope="module")
def host() -> Host:
    return tiny_host("gemma3", dtype=torch.float64)


@pytest.fixture(scope="module")
def cayley() -> Host:
    torch.manual_seed(0)
    model = CayleyGPT(CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=32, d_vocab=280, levels="4,3,0;6,4,4"))
    model.tokenizer = make_tokenizer()
    return load_host(model, dtype=torch.float64)


def requests(kind: Any, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def by_hand(host: Host, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward pass for one token, left end cut."""
    total, greedy, ids = 0.0, True, list(context)
    for token in continuation:
        log_probs = host.logits(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
        total += log_probs[token].item()
        greedy &= int(log_probs.argmax()) == token
        ids.append(token)
    return total, greedy


def test_loglikelihoods_are_the_sums_of_log_softmax(host, cayley):
    for subject, start in ((host, [BOS_ID]), (cayley, [])):
        ids = subject.tokenize("of the people by")
        got = HostLM(subject).loglikelihood(requests("loglikelihood", [("of the people", " by")]))
        want = by_hand(subject, start + ids[:13], ids[13:])
        assert got[0][0] == pytest.approx(want[0], abs=1e-9)
        assert got[0][1] == want[1]


def test_the_likeliest_continuation_is_greedy(cayley):
    lm = HostLM(cayley)
    token = int(cayley.logits(torch.tensor([cayley.tokenize("we")]))[0, -1].argmax())
    scored = lm._loglikelihood_tokens([(None, cayley.tokenize("we"), [t]) for t in (token, (token + 1) % 256)])
    assert [greedy for _, greedy in scored] == [True, False]


def hf_lm(**options: Any) -> Any:
    """lm-eval's own model: transformers' forward pass and generation, the weights of tiny_host("llama")."""
    kind: Any = HFLM
    return kind(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), backend="causal", batch_size=2, device="cpu", **options
    )


def test_loglikelihoods_agree_with_the_model_of_lm_eval():
    """Float32, padding and cutting included."""
    asked = requests("loglikelihood", PAIRS)
    ours = HostLM(tiny_host("llama")).loglikelihood(asked)
    theirs = hf_lm().loglikelihood(asked, disable_tqdm=True)
    assert [a for a, _ in ours] == pytest.approx([b for b, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_perplexity_agrees_with_the_model_of_lm_eval():
    """`add_bos_token=False`: it would otherwise also predict the BOS that the tokenizer puts in front."""
    texts = [(tiny_text(n, seed=n),) for n in (1, N_CTX - 1, N_CTX, N_CTX + 1, 3 * N_CTX + 7)]
    asked = requests("loglikelihood_rolling", texts)
    want = hf_lm(add_bos_token=False).loglikelihood_rolling(asked, disable_tqdm=True)
    ours = HostLM(tiny_host("llama"))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(want, abs=1e-3)
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", [("",)])) == [0.0]


def test_generation_agrees_with_the_model_of_lm_eval():
    ours = HostLM(tiny_host("llama"))
    free = ours.generate_until(requests("generate_until", [("peace", {"max_gen_toks": 20, "until": []})]))[0]
    stop = free[7:9]
    options = [{"max_gen_toks": 20, "until": until} for until in ([], [stop], [free[-1], stop])]
    contexts = ("peace", "we must keep", tiny_text(2 * N_CTX))
    asked = requests("generate_until", [(context, option) for option in options for context in contexts])
    got = ours.generate_until(asked)
    assert got == hf_lm().generate_until(asked, disable_tqdm=True)
    assert got[3] == free[: free.index(stop)]


def test_windows_predict_every_token_once_with_the_context_that_is_left(host):
    ids = host.tokenize(tiny_text(29))
    lm = HostLM(host, max_length=10)
    got = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(tiny_text(29),)]))[0]
    # 29 = 10 + 10 + 9: the last window starts one token further left, so that its input is full.
    want = [([BOS_ID], ids[:10]), (ids[9:10], ids[10:20]), (ids[18:20], ids[20:])]
    assert got == pytest.approx(sum(by_hand(host, *window)[0] for window in want), abs=1e-9)


def test_batches_do_not_matter(host, monkeypatch):
    asked = requests("loglikelihood", PAIRS)
    shares: list[float] = []
    whole = HostLM(host, progress=lambda _, share: shares.append(share)).loglikelihood(asked)
    monkeypatch.setattr("analysis.lm_eval_adapter.LOGITS_AT_A_TIME", 1)
    alone = HostLM(host).loglikelihood(asked)
    assert [a for a, _ in alone] == pytest.approx([a for a, _ in whole], abs=1e-9)
    assert shares[-1] == 1


@pytest.mark.parametrize("which", ["host", "cayley"])
def test_replacements_take_part(which, request):
    host = request.getfixturevalue(which)
    site = Site(1)
    asked = requests("loglikelihood", PAIRS[:3])
    own = HostLM(host).loglikelihood(asked)
    mlp = true_mlp(host, site)
    assert HostLM(host, {site: mlp}).loglikelihood(asked) == own
    halved = HostLM(host, {site: lambda x: 0.5 * mlp(x)}).loglikelihood(asked)
    assert all(abs(a[0] - b[0]) > 1e-6 for a, b in zip(halved, own, strict=True))


def test_bad_input(host):
    with pytest.raises(ValueError, match="max_length must be from 2"):
        HostLM(host, max_length=N_CTX + 1)
    with pytest.raises(ValueError, match="has no tokenizer"):
        HostLM(load_host(tiny_model("gpt2")))
    with pytest.raises(ValueError, match="expected 1 to max_length"):
        HostLM(host, max_length=8).loglikelihood(requests("loglikelihood", [("a", " nine tokens")]))
    for options, message in (({"do_sample": True, "temperature": 1.0}, "greedy"), ({"max_gen_toks": 500}, "500 new")):
        with pytest.raises(ValueError, match=message):
            HostLM(host).generate_until(requests("generate_until", [("a", options)]))


# ---- Whole tasks, from local files ----


@pytest.fixture(scope="module")
def manager(tmp_path_factory) -> TaskManager:
    return TaskManager(include_path=str(write_tasks(tmp_path_factory.mktemp("tasks"))), include_defaults=False)


def test_a_local_task_end_to_end(cayley, manager):
    report = evaluate_lm(cayley, ["words", "rolling"], manager=manager, limit=4)
    json.dumps(report)
    lm = HostLM(cayley)
    correct, bits, n_bytes = 0, 0.0, 0
    for i in range(4):
        text, start = tiny_text(20, seed=i), cayley.tokenize(tiny_text(20, seed=i))
        scores = [by_hand(cayley, start, cayley.tokenize(f" {tiny_text(n, seed=i + n)}"))[0] for n in (4, 5, 6)]
        correct += scores.index(max(scores)) == i % 3
        bits -= by_hand(cayley, [lm.prefix_token_id], start)[0] / torch.tensor(2.0).double().log().item()
        n_bytes += len(text)
    assert report["results"]["words"]["acc,none"] == correct / 4
    assert report["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(bits / n_bytes, rel=1e-6)
    assert report["n_samples"]["words"]["effective"] == 4
    assert ["words", "acc"] in [row[:2] for row in to_sheet(report).rows]


def test_what_cannot_be_loaded_is_named(manager):
    with pytest.raises(ValueError, match="no task 'word': did you mean words"):
        load_task("word", manager)
    with pytest.raises(FileNotFoundError, match="the data of task 'missing' could not be had"):
        load_task("missing", manager)

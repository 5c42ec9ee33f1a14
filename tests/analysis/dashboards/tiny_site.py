"""A tiny Cayley-GPT with a hostile vocabulary, opened for its dashboards, and what a site says read back."""

import json
from pathlib import Path
from typing import Any

import torch

from analysis.dashboards.cayley import CayleySource
from analysis.dashboards.cayley_opening import CayleyExtras
from analysis.dashboards.opening import Curve, Figure, Opened
from analysis.dashboards.sources import Text
from analysis.dashboards.text import text_of_prompt
from analysis.tokens import token_strings
from cayley_interp import CayleyGPT, CayleyGPTConfig
from tests.analysis.fabricated import HOSTILE, make_tokenizer

N_CTX, N_WINDOWS, D_VOCAB = 16, 40, 280
FIRST_HOSTILE = 256
SURROGATE = "\ud800"
"""No tokenizer can hold it; a chunk must all the same."""
NAME = 'tiny <b>"x"</b>'


class ByRule:
    """Names each unit by the first token that is marked in what it is shown; says of every second unit too little."""

    name = "rules <b>"

    def __init__(self, fails_at: int | None = None):
        self.asked, self.fails_at = 0, fails_at

    def complete(self, prompt: str, max_tokens: int) -> str:
        assert max_tokens > 0
        self.asked += 1
        if self.asked == self.fails_at:
            raise ValueError("rules gives no completion")
        if "Fits:" in prompt:
            return "1, 2"
        return f"Name: <i>{prompt.split('<<')[1][:20]}</i>" if "1. " in prompt else ""


def tiny_opened(seed: int = 0) -> Opened:
    torch.manual_seed(seed)
    model = CayleyGPT(
        CayleyGPTConfig(n_layers=2, n_heads=2, d_model=16, n_ctx=N_CTX, d_vocab=D_VOCAB, levels="4,3,0;6,4,4")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    source, tokenizer = CayleySource(model.eval(), NAME), make_tokenizer()
    strings = token_strings(tokenizer, D_VOCAB)
    strings[5] = SURROGATE + "\x00\u2028</script>"
    return Opened(
        kind="cayley",
        source=source,
        text=tiny_text(),
        strings=strings,
        fingerprint=f"tiny {seed}",
        extras=CayleyExtras(model, source),
        text_of=lambda prompt: text_of_prompt(tokenizer, prompt, N_CTX),
        about=[("dictionary", "<i>gold</i>")],
        settings=[("eps", "1e-05")],
        figures=[Figure("Loss", "step", "nats per token", [Curve("training", [(0.0, 6.0), (10.0, 5.0)])])],
    )


def tiny_text() -> Text:
    """Every other token hostile."""
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(D_VOCAB, (N_WINDOWS, N_CTX), generator=generator)
    windows[:, ::2] = torch.randint(FIRST_HOSTILE, FIRST_HOSTILE + len(HOSTILE), (N_WINDOWS, 8), generator=generator)
    windows[:, 1] = 5
    documents = (torch.arange(N_WINDOWS) // 4)[:, None].expand(-1, N_CTX).contiguous()
    return Text(windows, documents, torch.ones_like(windows, dtype=torch.bool))


def read_data(out: Path, key: str) -> Any:
    """What a data file registers under its own name."""
    content = (out / "data" / f"{key}.js").read_bytes().decode("ascii")
    start = f'register("{key}",'
    assert content.startswith(start)
    assert content.endswith(");\n")
    return json.loads(content[len(start) : -3])


def files_of(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}

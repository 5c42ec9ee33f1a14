"""CayleyGPT: a plain GPT whose MLP inputs pass through a CayleySAE. `levels=None` is the vanilla GPT.

Learned absolute positions, affine RMSNorm before attention and MLP, no biases, exact GELU, tied head: the backbone of
the published `cayley-*` and `vanilla-*` models. Modules carry names that TransformerLens' bridge leaves free.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from cayley_interp.bottleneck import BottleneckOptions, CayleySAE, CayleySAEConfig, LevelCodes

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CayleyGPTConfig(BottleneckOptions):
    n_layers: int
    """Transformer blocks."""
    n_heads: int
    """Attention heads; d_head = d_model / n_heads."""
    d_model: int
    """Width of the residual stream; a power of two where there is a bottleneck."""
    n_ctx: int = 1024
    """Longest sequence, in tokens."""
    d_vocab: int = 50304
    """Rows of the embedding; at least the tokenizer's size."""
    levels: str | None = None
    """Levels of the bottleneck before each MLP, "n,k,budget;..."; None is the vanilla GPT."""
    eps: float = 1e-5
    """Epsilon of the RMSNorms."""

    def __post_init__(self):
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model={self.d_model}, got {self.n_heads}: try a power of two")
        self.bottleneck()

    def bottleneck(self) -> CayleySAEConfig | None:
        """Config of the CayleySAE of every block, or None."""
        if self.levels is None:
            return None
        options = {f.name: getattr(self, f.name) for f in fields(BottleneckOptions)}
        return CayleySAEConfig(d_model=self.d_model, levels=self.levels, **options)


class CayleyGPT(nn.Module):
    def __init__(self, config: CayleyGPTConfig):
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        """Set by `load_pretrained`; saved with the model."""
        self.tok = nn.Embedding(config.d_vocab, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.eps)
        self.head = nn.Linear(config.d_model, config.d_vocab, bias=False)
        self.head.weight = self.tok.weight
        self.apply(_init_weights)
        for block in self.blocks():
            for residual in (block.attn.o, block.mlp.fc_out):  # GPT-2: 2 n_layers writes to one stream
                nn.init.normal_(residual.weight, std=0.02 / (2 * config.n_layers) ** 0.5)

    def forward(self, input_ids: Int64[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits.

        Raises:
            ValueError: more than n_ctx tokens.
        """
        return self.head(self.norm_f(self.residual(input_ids)))

    def loss(self, windows: Int64[Tensor, "batch pos_plus_1"]) -> Float[Tensor, "batch pos"]:
        """Cross-entropy of each token from those before it, in nats."""
        return token_losses(self(windows[:, :-1]), windows[:, 1:])

    def blocks(self) -> list["Block"]:
        return [block for block in self.layers if isinstance(block, Block)]

    def bottlenecks(self) -> list[CayleySAE]:
        """The CayleySAE of each block, first to last; empty for a vanilla GPT."""
        return [block.sparse for block in self.blocks() if block.sparse is not None]

    @torch.no_grad()
    def codes(self, input_ids: Int64[Tensor, "batch pos"]) -> list[tuple[LevelCodes, ...]]:
        """Sparse codes of every block's bottleneck, without gradients: codes[layer][level]."""
        codes: list[tuple[LevelCodes, ...]] = []
        self.residual(input_ids, codes)
        return codes

    def num_parameters(self, *, positions: bool = True) -> int:
        """Parameters, tied weights once; published sizes of nanoGPT descendants leave the positions out."""
        return sum(p.numel() for p in self.parameters()) - (0 if positions else self.wpe.weight.numel())

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int64[Tensor, "batch longer"]:
        """Sample a continuation; the context slides once it is full."""
        for _ in range(max_new_tokens):
            logits = self(input_ids[:, -self.config.n_ctx :])[:, -1].float() / temperature
            if top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            input_ids = torch.cat((input_ids, token), dim=1)
        return input_ids

    def residual(
        self, input_ids: Int64[Tensor, "batch pos"], codes: list[tuple[LevelCodes, ...]] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream behind the last block; each block's sparse code is appended to `codes` where given.

        Raises:
            ValueError: more than n_ctx tokens.
        """
        length = input_ids.shape[1]
        if length > self.config.n_ctx:
            raise ValueError(f"{length} tokens are more than the model's n_ctx={self.config.n_ctx}")
        x = self.tok(input_ids) + self.wpe.weight[:length]
        for block in self.layers:
            x = block(x, codes)
        return x


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int64[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Cross-entropy of each target, in nats, computed in at least fp32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


class Block(nn.Module):
    def __init__(self, config: CayleyGPTConfig):
        super().__init__()
        bottleneck = config.bottleneck()
        self.norm1 = nn.RMSNorm(config.d_model, eps=config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.d_model, eps=config.eps)
        self.sparse = None if bottleneck is None else CayleySAE(bottleneck)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, codes: list[tuple[LevelCodes, ...]] | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        if self.sparse is not None:
            if codes is None:
                h = self.sparse(h)
            else:
                codes.append(self.sparse.encode(h))
                h = self.sparse.decode(codes[-1]).to(h.dtype)
        return x + self.mlp(h)


class Attention(nn.Module):
    def __init__(self, config: CayleyGPTConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.d_model, config.d_model, bias=False) for _ in range(4))

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = (w(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(z.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: CayleyGPTConfig):
        super().__init__()
        self.fc_in = nn.Linear(config.d_model, 4 * config.d_model, bias=False)
        self.fc_out = nn.Linear(4 * config.d_model, config.d_model, bias=False)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.fc_out(F.gelu(self.fc_in(x)))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)

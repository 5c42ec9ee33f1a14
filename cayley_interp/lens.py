"""CayleyGPT as a TransformerBridge, the same code on TransformerLens 3.9 and 4.

    bridge = to_bridge(model)   # blocks.0.sparse.hook_in, .hook_codes_0, .hook_codes_1, .hook_out

`hook_codes_{i}` sees the code of level i as a dense [batch, pos, 2^n]; what a hook makes of it is decoded, so ablating
a feature is one assignment. The dense code exists only while something listens: name the hooks you cache. The bare
model shares its parameters with the bridge and goes on working as it was.

No name ends in `mlp_in`: TransformerLens gates that suffix, and its own `hook_mlp_in` is the residual before the norm.
"""

import copy
import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import ArchitectureAdapter, TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    PosEmbedBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import PreTrainedTokenizerFast

from cayley_interp.bottleneck import CayleySAE, LevelCodes
from cayley_interp.model import MLP, Block, CayleyGPT, CayleyGPTConfig
from cayley_interp.tokenizer import EOS

ARCHITECTURE = "CayleyGPT"
M = TypeVar("M", bound=nn.Module)


def add_codes_hooks(module: nn.Module, n_levels: int) -> None:
    for i in range(n_levels):
        setattr(module, f"hook_codes_{i}", HookPoint())


def run_through_hooks(
    module: Any, sae: CayleySAE, x: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """The bottleneck's output, its input, codes and output passed through the hooks of `module`."""
    codes = sae.encode(module.hook_in(x))
    hooks = [getattr(module, f"hook_codes_{i}") for i in range(len(codes))]
    return module.hook_out(decode_through_hooks(sae, codes, hooks).to(x.dtype))


def decode_through_hooks(
    sae: CayleySAE, codes: tuple[LevelCodes, ...], hooks: list[HookPoint]
) -> Float[Tensor, "*batch d_model"]:
    """Decode what the hooks make of each level's dense code.

    A code that keeps to the features it had goes the sparse way, so that looking changes no bit of the output.
    """
    if not any(hook.has_hooks() for hook in hooks):
        return sae.decode(codes)
    acts = [hook(level) for hook, level in zip(hooks, sae.to_dense(codes), strict=True)]
    kept = tuple(LevelCodes(c.indices, a.gather(-1, c.indices)) for c, a in zip(codes, acts, strict=True))
    if all(k.values.count_nonzero() == a.count_nonzero() for k, a in zip(kept, acts, strict=True)):
        return sae.decode(kept)
    return sae.decode_dense(acts)


class KnownHookNames:
    """Every method that takes hook names raises KeyError on one that does not exist, naming the nearest that do.

    TransformerLens 3.9 ignores such a name, and the ablation that it was meant for.
    """

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        self._check_pairs(*args[1:3], kwargs.get("fwd_hooks"), kwargs.get("bwd_hooks"))
        return super().run_with_hooks(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        self._check_pairs(*args[:2], kwargs.get("fwd_hooks"), kwargs.get("bwd_hooks"))
        return super().hooks(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def run_with_cache(self, *args: Any, names_filter: Any = None, **kwargs: Any) -> Any:
        self._check(names_filter if isinstance(names_filter, list | tuple) else [names_filter])
        return super().run_with_cache(*args, names_filter=names_filter, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def add_hook(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        self._check([name])
        return super().add_hook(name, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _check_pairs(self, *lists: Any) -> None:
        self._check(pair[0] for pairs in lists if isinstance(pairs, list | tuple) for pair in pairs)

    def _check(self, names: Iterable[Any]) -> None:
        known: list[str] = list(self.hook_dict)  # pyright: ignore[reportAttributeAccessIssue]
        for name in names:
            if isinstance(name, str) and name not in known:
                near = ", ".join(difflib.get_close_matches(name, known, n=3)) or ", ".join(known[:5])
                raise KeyError(f"the model has no hook {name!r}; the nearest are {near}")


def hf_tokenizer(model: CayleyGPT) -> PreTrainedTokenizerFast | None:
    """The model's tokenizer for TransformerLens.

    It has no BOS token, so that a string becomes exactly the ids it has in training.
    """
    if model.tokenizer is None:
        return None
    return PreTrainedTokenizerFast(tokenizer_object=model.tokenizer, eos_token=EOS, pad_token=EOS, unk_token=EOS)


# ---- TransformerBridge ----


class CayleyBridge(KnownHookNames, TransformerBridge):
    """A TransformerBridge of a CayleyGPT; `original_model` holds its layers."""


def to_bridge(model: CayleyGPT, name: str = ARCHITECTURE) -> "CayleyBridge":
    """The model as a TransformerBridge, its parameters shared with the bare one."""
    bridge = build_bridge_from_module(
        BridgeHost(model),
        ARCHITECTURE,
        tl_config=bridge_config(model.config),
        tokenizer=hf_tokenizer(model),
        model_name=name,
    )
    bridge.__class__ = CayleyBridge
    return bridge.eval()  # pyright: ignore[reportReturnType]


def bridge_config(config: CayleyGPTConfig) -> TransformerBridgeConfig:
    cfg = TransformerBridgeConfig(
        d_model=config.d_model,
        d_head=config.d_model // config.n_heads,
        n_layers=config.n_layers,
        n_ctx=config.n_ctx,
        n_heads=config.n_heads,
        d_vocab=config.d_vocab,
        d_mlp=4 * config.d_model,
        act_fn="gelu",
        eps=config.eps,
        default_prepend_bos=False,
        architecture=ARCHITECTURE,
    )
    cfg.cayley_levels = config.levels  # pyright: ignore[reportAttributeAccessIssue]
    return cfg


class CayleyAdapter(ArchitectureAdapter):
    """Which module of a BridgeHost is which component of TransformerLens; found through an entry point."""

    supports_kv_cache = False
    bool_4d_mask_is_keep = False

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        cfg.normalization_type, cfg.uses_rms_norm, cfg.final_rms = "RMS", True, True
        cfg.gated_mlp, cfg.attn_only, cfg.positional_embedding_type = False, False, "standard"
        self.weight_processing_conversions = {**self._qkvo_weight_conversions()}
        block: dict[str, GeneralizedComponent] = {
            "ln1": RMSNormalizationBridge(name="norm1", config=cfg),
            "attn": CausalAttentionBridge(
                name="attn", config=cfg, submodules={w: LinearBridge(name=w) for w in ("q", "k", "v", "o")}
            ),
            "ln2": RMSNormalizationBridge(name="norm2", config=cfg),
            "mlp": MLPBridge(
                name="mlp",
                config=cfg,
                submodules={"in": LinearBridge(name="fc_in"), "out": LinearBridge(name="fc_out")},
            ),
        }
        if cfg.cayley_levels is not None:
            block["sparse"] = CayleySAEBridge(name="sparse", config=cfg)
        self.component_mapping = {
            "embed": EmbeddingBridge(name="tok"),
            "pos_embed": PosEmbedBridge(name="wpe"),
            "blocks": BlockBridge(name="layers", config=cfg, submodules=block),
            "ln_final": RMSNormalizationBridge(name="norm_f", config=cfg),
            "unembed": UnembeddingBridge(name="head"),
        }


class CayleySAEBridge(GeneralizedComponent):
    """The bottleneck with hooks for its input, the code of each level, and its output."""

    def __init__(self, name: str, config: Any):
        super().__init__(name, config)
        add_codes_hooks(self, config.cayley_levels.count(";") + 1)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        assert isinstance(self.original_component, CayleySAE)
        return run_through_hooks(self, self.original_component, x)


class CausalAttentionBridge(AttentionBridge):
    """Attention as the bare model computes it, to the bit, unless a hook edits its scores or its pattern.

    Rounding matters here: a bottleneck downstream picks the k largest scores, and where two are nearly equal another
    kernel's last bit picks another feature. An edit takes the written-out path, so that it reaches the output; in
    TransformerLens 3.9 `hook_pattern` otherwise fires after the pattern has been used.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        x = self.hook_in(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        n_heads = self.config.n_heads  # pyright: ignore[reportOptionalMemberAccess]
        q, k, v = (w(x).unflatten(-1, (n_heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        mask = kwargs.get("attention_mask")
        padded = mask is not None and not mask.all()
        pattern, edited = None, False
        if padded or self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks():
            pattern, edited = self.pattern_through_hooks(
                q, k, causal_mask(x.shape[1], mask if padded else None, x.device)
            )
        if pattern is not None and (padded or edited):
            z = pattern @ v
        else:
            z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.hook_out(self.o(z.transpose(1, 2).flatten(2))), pattern

    def pattern_through_hooks(
        self, q: Tensor, k: Tensor, hidden: Tensor
    ) -> tuple[Float[Tensor, "batch head query key"], bool]:
        """The pattern through its hooks, and whether they want the output to come of it."""
        raw = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        scores = self.hook_attn_scores(raw.clone())
        # A padding token may attend to nothing: its row would be nan.
        softmax = scores.softmax(-1).masked_fill(hidden, 0)
        pattern = self.hook_pattern(softmax.clone())
        edited = not (torch.equal(scores, raw) and torch.equal(pattern, softmax))
        needs_gradient = self.hook_attn_scores.has_hooks("bwd") or self.hook_pattern.has_hooks("bwd")
        return pattern, edited or needs_gradient


def causal_mask(length: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """True where a query may not look: at later tokens, and at padding (0 in a [batch, pos] attention mask)."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    if attention_mask is None:
        return hidden
    if attention_mask.ndim != 2:
        raise ValueError(f"expected an attention_mask of shape [batch, pos], got {tuple(attention_mask.shape)}")
    return hidden | ~attention_mask.bool()[:, None, None, :]


class BridgeHost(nn.Module):
    """The layers of a CayleyGPT under the call signature that TransformerBridge expects of a language model.

    The bridge replaces submodules and adds a bias to the unembedding: all modules but the bottlenecks are the host's
    own, all parameters the model's.
    """

    def __init__(self, model: CayleyGPT):
        super().__init__()
        self.n_ctx = model.config.n_ctx
        self.tok, self.wpe, self.norm_f, self.head = map(twin, (model.tok, model.wpe, model.norm_f, model.head))
        self.layers = nn.ModuleList(BridgeBlock(block) for block in model.blocks())

    def forward(
        self,
        input_ids: Int64[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int64[Tensor, "batch pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        **_: Any,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        x = self.tok(input_ids) if inputs_embeds is None else inputs_embeds
        if x.shape[1] > self.n_ctx:
            raise ValueError(f"{x.shape[1]} tokens are more than the model's n_ctx={self.n_ctx}")
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        x = x + self.wpe(position_ids)
        for block in self.layers:
            x = block(hidden_states=x, attention_mask=attention_mask)
        return self.head(self.norm_f(x))


class BridgeBlock(nn.Module):
    def __init__(self, block: Block):
        super().__init__()
        self.norm1, self.norm2, self.sparse = twin(block.norm1), twin(block.norm2), block.sparse
        self.attn = nn.ModuleDict({w: twin(getattr(block.attn, w)) for w in ("q", "k", "v", "o")})
        self.mlp = BridgeMLP(block.mlp)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        attn, _ = self.attn(hidden_states=self.norm1(hidden_states), attention_mask=attention_mask)
        x = hidden_states + attn
        h = self.norm2(x)
        if self.sparse is not None:
            h = self.sparse(h)
        return x + self.mlp(h)


class BridgeMLP(nn.Module):
    def __init__(self, mlp: MLP):
        super().__init__()
        self.fc_in, self.fc_out = twin(mlp.fc_in), twin(mlp.fc_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(nn.functional.gelu(self.fc_in(x)))


def twin(leaf: M) -> M:
    """Another module over the same parameters."""
    other = copy.copy(leaf)
    other._parameters, other._buffers = dict(leaf._parameters), dict(leaf._buffers)
    return other

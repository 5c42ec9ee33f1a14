"""CayleyGPT as a true HookedTransformer (TransformerLens 3.9; version 4 has no such class).

The hook names of the bottleneck are the bridge's: blocks.0.sparse.hook_in, .hook_codes_0, .hook_codes_1, .hook_out.
Weights are copied: TransformerLens keeps them by head, and an unembedding of its own.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.components.mlps.mlp import MLP
from transformer_lens.config import HookedTransformerConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedTransformer import HookedTransformer

from cayley_interp.bottleneck import CayleySAE
from cayley_interp.lens import KnownHookNames, add_codes_hooks, hf_tokenizer, run_through_hooks
from cayley_interp.model import Block, CayleyGPT, CayleyGPTConfig


class HookedCayleyGPT(KnownHookNames, HookedTransformer):
    """A HookedTransformer whose MLPs read their input through a CayleySAE."""


def to_hooked_transformer(model: CayleyGPT, name: str = "CayleyGPT") -> HookedCayleyGPT:
    """The model as a HookedTransformer, on its device and in its dtype."""
    weight = model.tok.weight
    hooked = HookedCayleyGPT(
        hooked_config(model.config, name, weight.dtype, weight.device),
        tokenizer=hf_tokenizer(model),  # pyright: ignore[reportArgumentType]
        move_to_device=False,
    )
    hooked.load_state_dict(hooked_state(model), strict=False)  # masks and biases, zero already, are its own
    for block, source in zip(hooked.blocks, model.blocks(), strict=True):
        if source.sparse is not None:
            block.sparse = HookedCayleySAE(source.sparse)
            block.mlp = sparse_mlp(block.mlp, block.sparse)  # pyright: ignore[reportArgumentType]
    hooked.setup()
    return hooked.to(weight.device, print_details=False).eval()


def hooked_config(
    config: CayleyGPTConfig, name: str, dtype: torch.dtype, device: torch.device
) -> HookedTransformerConfig:
    return HookedTransformerConfig(
        model_name=name,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        d_model=config.d_model,
        d_head=config.d_model // config.n_heads,
        d_mlp=4 * config.d_model,
        n_ctx=config.n_ctx,
        d_vocab=config.d_vocab,
        act_fn="gelu",
        normalization_type="RMS",
        eps=config.eps,
        positional_embedding_type="standard",
        default_prepend_bos=False,
        init_weights=False,
        dtype=dtype,
        device=str(device),
    )


def hooked_state(model: CayleyGPT) -> dict[str, Tensor]:
    """Backbone weights by their names in HookedTransformer."""
    state = {
        "embed.W_E": model.tok.weight,
        "pos_embed.W_pos": model.wpe.weight,
        "ln_final.w": model.norm_f.weight,
        "unembed.W_U": model.head.weight.T,
        "unembed.b_U": model.head.weight.new_zeros(model.config.d_vocab),
    }
    for i, block in enumerate(model.blocks()):
        state |= {f"blocks.{i}.{name}": weight for name, weight in block_state(block, model.config.n_heads).items()}
    return {name: weight.detach().clone().contiguous() for name, weight in state.items()}


def block_state(block: Block, n_heads: int) -> dict[str, Tensor]:
    attn, mlp = block.attn, block.mlp
    by_head = {f"attn.W_{w.upper()}": getattr(attn, w).weight.unflatten(0, (n_heads, -1)).mT for w in ("q", "k", "v")}
    d_head = attn.q.weight.shape[0] // n_heads
    zeros = {f"attn.b_{w}": attn.q.weight.new_zeros(n_heads, d_head) for w in ("Q", "K", "V")}
    zeros["attn.b_O"] = zeros["mlp.b_out"] = attn.o.weight.new_zeros(len(attn.o.weight))
    zeros["mlp.b_in"] = mlp.fc_in.weight.new_zeros(len(mlp.fc_in.weight))
    return {
        "ln1.w": block.norm1.weight,
        "ln2.w": block.norm2.weight,
        "attn.W_O": attn.o.weight.T.unflatten(0, (n_heads, -1)),
        "mlp.W_in": mlp.fc_in.weight.T,
        "mlp.W_out": mlp.fc_out.weight.T,
        **by_head,
        **zeros,
    }


class HookedCayleySAE(nn.Module):
    """The bottleneck with hooks for its input, the code of each level, and its output."""

    def __init__(self, sae: CayleySAE):
        super().__init__()
        self.sae = sae
        self.hook_in, self.hook_out = HookPoint(), HookPoint()
        add_codes_hooks(self, len(sae.levels))

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return run_through_hooks(self, self.sae, x)


class SparseMLP(MLP):
    """TransformerLens' MLP behind the bottleneck, so that W_in, hook_pre and hook_post stay where they were."""

    sparse: tuple[HookedCayleySAE]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return super().forward(self.sparse[0](x))


def sparse_mlp(mlp: MLP, sparse: HookedCayleySAE) -> MLP:
    mlp.__class__ = SparseMLP
    object.__setattr__(mlp, "sparse", (sparse,))  # in a tuple: the module is the block's
    return mlp

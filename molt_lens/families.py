"""What the modules around an MLP are called in each family of language models, here and in TransformerLens."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

InputName = Literal["pre_norm_in", "pre_norm_out"]
"""The residual before the MLP's norm; what that norm gives, which is what the MLP reads."""
TargetName = Literal["mlp_out", "post_norm_out"]
"""What the MLP gives; that after the norm behind the MLP, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Family:
    layers: str
    """Dotted path from the model to its list of blocks."""
    pre_norm: str
    """In a block, the norm whose output its MLP reads."""
    mlp: str = "mlp"
    post_norm: str | None = None
    """In a block, the norm that the MLP's output passes before it is added to the residual stream."""
    tl_pre_norm_out: str = "mlp.hook_in"
    """In a TransformerBridge's block, the hook on the norm's output."""

    def hook_name(self, layer: int, site: InputName | TargetName) -> str:
        """TransformerBridge's canonical name (TransformerLens 3.9).

        Its aliases (`hook_mlp_in`, `hook_mlp_out`, `hook_resid_mid`) may not fire, or name another tensor.
        """
        hooks = {
            "pre_norm_in": "ln2.hook_in",
            "pre_norm_out": self.tl_pre_norm_out,
            "mlp_out": "mlp.hook_out",
            "post_norm_out": "ln2_post.hook_out",
        }
        return f"blocks.{layer}.{hooks[site]}"


LLAMA = Family(layers="model.layers", pre_norm="post_attention_layernorm")
GEMMA = Family(layers="model.layers", pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm")
GEMMA_WITH_IMAGES = Family(
    layers="model.language_model.layers", pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"
)
GPT2 = Family(layers="transformer.h", pre_norm="ln_2")
# The hook of its MLP's input lies behind the bottleneck, which a replacement stands for too.
CAYLEY = Family(layers="layers", pre_norm="norm2", tl_pre_norm_out="ln2.hook_out")

FAMILIES = {
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma3": GEMMA_WITH_IMAGES,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}
"""By the `model_type` of a transformers config."""


def is_cayley(model: nn.Module) -> bool:
    """Whether a module is a CayleyGPT, by what it is made of: this package knows nothing of the other."""
    return isinstance(getattr(model, "layers", None), nn.ModuleList) and all(
        hasattr(model, name) for name in ("tok", "wpe", "norm_f", "head", "config")
    )


def family_of_type(model_type: str | None, name: str) -> Family:
    """The family of a transformers config's `model_type`; `name` is for the error.

    Raises:
        ValueError: no family is known for it.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"{name} is of model_type {model_type!r}, and where its MLPs read and write is not known here: expected "
            f"one of {', '.join(sorted(FAMILIES))}, or a CayleyGPT given as a module "
            "(cayley_interp.load_pretrained(..., wrap=None))"
        )
    return FAMILIES[model_type]

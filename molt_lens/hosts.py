"""Hosts: causal language models whose MLPs can be read and replaced, whatever library they come from.

host = load_host("gemma-3-270m")
site = Site(layer=9, target="post_norm_out")
x, y = host.capture(site, input_ids)        # the forward pass ends where y is
host.names(site).tl_input                   # "blocks.9.mlp.hook_in"
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from molt_lens.families import CAYLEY, Family, InputName, TargetName, family_of_type, is_cayley
from molt_lens.fingerprint import fingerprint_of_files, fingerprint_of_module, weight_files
from molt_lens.host_files import locate, read_model, read_tokenizer

CAYLEY_EOS = "<|endoftext|>"
"""What ends a document in every tokenizer of a CayleyGPT."""


@dataclass(frozen=True)
class Site:
    """What stands for an MLP reads and writes: which layer, from where, to where.

    Raises:
        ValueError: a layer below 0, or a name that is none of InputName's or TargetName's.
    """

    layer: int
    input: InputName = "pre_norm_out"
    target: TargetName = "mlp_out"

    def __post_init__(self):
        if self.layer < 0:
            raise ValueError(f"layer must be 0 or more, got {self.layer}")
        if self.input not in get_args(InputName):
            raise ValueError(f"input must be one of {', '.join(get_args(InputName))}, got {self.input!r}")
        if self.target not in get_args(TargetName):
            raise ValueError(f"target must be one of {', '.join(get_args(TargetName))}, got {self.target!r}")


@dataclass(frozen=True)
class SiteModules:
    """Where a site is in a model."""

    input_module: nn.Module
    input_side: Literal["in", "out"]
    """Whether the site's input is the first argument of `input_module` or its output."""
    target_module: nn.Module
    """Its output is the site's target."""
    mlp: nn.Module
    post_norm: nn.Module | None
    bottleneck: nn.Module | None
    """What a CayleyGPT's MLP reads through, and a replacement stands for too."""


@dataclass(frozen=True)
class SiteNames:
    """What a site is called: as a path in the model with its side, and by TransformerBridge's canonical hook names."""

    hf_input: str
    hf_target: str
    tl_input: str
    tl_target: str


class Host:
    """A causal language model whose MLPs can be read and replaced.

    The model is used as it is, not copied: in eval mode, its parameters without gradients.
    """

    name: str
    """The id or path it was loaded by; of a module, where it came from or its class."""
    fingerprint: str
    """SHA-256 (hex) of the weights' files; of a module given directly, of its state."""
    model: nn.Module
    tokenizer: Any
    """A transformers tokenizer, or None."""
    d_model: int
    n_layers: int
    n_ctx: int
    """Longest sequence, in tokens."""
    d_vocab: int
    bos_id: int | None
    special_ids: frozenset[int]
    """Tokens that are not text: never trained or measured on."""
    is_chat: bool
    """Whether the tokenizer has a chat template: the model is instruction-tuned."""

    def __init__(self, model: nn.Module, family: Family, tokenizer: Any, *, name: str, fingerprint: str):
        self.model = model.eval().requires_grad_(False)
        self.name, self.fingerprint, self.tokenizer = name, fingerprint, tokenizer
        self._family = family
        config: Any = model.config
        if family is CAYLEY:
            self.d_model, self.n_layers, self.n_ctx = config.d_model, config.n_layers, config.n_ctx
            self.d_vocab = config.d_vocab
        else:
            text: Any = config.get_text_config()
            self.d_model, self.n_layers = text.hidden_size, text.num_hidden_layers
            self.n_ctx, self.d_vocab = text.max_position_embeddings, text.vocab_size
        self.bos_id = None if tokenizer is None else tokenizer.bos_token_id
        self.special_ids = special_ids(tokenizer)
        self.is_chat = getattr(tokenizer, "chat_template", None) is not None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def modules(self, site: Site) -> SiteModules:
        """The modules of a site.

        Raises:
            ValueError: the model has no such layer, or no norm behind its MLP where the site's target is one.
        """
        self._check_site(site)
        block = self.model.get_submodule(f"{self._family.layers}.{site.layer}")
        mlp, norm = block.get_submodule(self._family.mlp), block.get_submodule(self._family.pre_norm)
        post_norm = None if self._family.post_norm is None else block.get_submodule(self._family.post_norm)
        target = mlp if site.target == "mlp_out" or post_norm is None else post_norm
        bottleneck: Any = block.sparse if self._family is CAYLEY else None
        side = "in" if site.input == "pre_norm_in" else "out"
        return SiteModules(norm, side, target, mlp, post_norm, bottleneck)

    def names(self, site: Site) -> SiteNames:
        """The names of a site, to be written into what is made for it.

        Raises:
            ValueError: what `modules` raises.
        """
        self._check_site(site)
        block = f"{self._family.layers}.{site.layer}"
        target = self._family.mlp if site.target == "mlp_out" else self._family.post_norm
        return SiteNames(
            hf_input=f"{block}.{self._family.pre_norm}.{'input' if site.input == 'pre_norm_in' else 'output'}",
            hf_target=f"{block}.{target}.output",
            tl_input=self._family.hook_name(site.layer, site.input),
            tl_target=self._family.hook_name(site.layer, site.target),
        )

    @torch.no_grad()
    def capture(
        self,
        site: Site,
        input_ids: Int64[Tensor, "batch pos"],
        attention_mask: Int64[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_out"]]:
        """Input and target of a site, in the model's dtype on its device, from a forward pass that ends at the target.

        Hooks that are on the model already take part, so a replacement spliced into an earlier layer is seen.

        Args:
            attention_mask: 0 at padding, whose activations mean nothing; without it every position is a token.

        Raises:
            ValueError: what `modules` raises; ids that are not [batch, pos], outside the vocabulary or too many for
                n_ctx; a mask of another shape, or one that a CayleyGPT cannot follow.
        """
        modules = self.modules(site)
        seen: dict[str, Tensor] = {}

        def read_input(_module: nn.Module, args: tuple, output: Tensor | None = None) -> None:
            seen["input"] = args[0] if output is None else output

        def read_target(_module: nn.Module, _args: tuple, output: Tensor) -> NoReturn:
            seen["target"] = output
            raise _TargetReached

        register = modules.input_module.register_forward_hook
        if modules.input_side == "in":
            register = modules.input_module.register_forward_pre_hook
        handles = [register(read_input), modules.target_module.register_forward_hook(read_target)]
        try:
            self._forward(input_ids, attention_mask)
        except _TargetReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen["input"], seen["target"]

    @torch.no_grad()
    def logits(
        self,
        input_ids: Int64[Tensor, "batch pos"],
        attention_mask: Int64[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits, in the model's dtype.

        Raises:
            ValueError: what `capture` raises of ids and masks.
        """
        output = self._forward(input_ids, attention_mask)
        return output if isinstance(output, Tensor) else output.logits

    def tokenize(self, text: str) -> list[int]:
        """A document's ids: no BOS, no chat template.

        Raises:
            ValueError: the host has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer: give one, load_host(..., tokenizer=...)")
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _check_site(self, site: Site) -> None:
        if site.layer >= self.n_layers:
            raise ValueError(f"{self.name} has layers 0 to {self.n_layers - 1}, got layer {site.layer}")
        if site.target == "post_norm_out" and self._family.post_norm is None:
            raise ValueError(f"{self.name} has no norm behind its MLPs, so no post_norm_out: use target mlp_out")

    def _forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        self._check_ids(input_ids, attention_mask)
        input_ids = input_ids.to(self.device)
        if self._family is CAYLEY:
            if attention_mask is not None and (attention_mask.long().diff(dim=1) > 0).any():
                raise ValueError(f"{self.name} has no attention mask: pad on the right, where no token can see it")
            return self.model(input_ids)
        if attention_mask is None:
            return self.model(input_ids=input_ids, use_cache=False)
        attention_mask = attention_mask.to(self.device).long()
        # Positions count tokens, as in transformers' generate: GPT-2 would otherwise count padding on the left.
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)

    def _check_ids(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must be [batch, pos] with at least one token, got {tuple(input_ids.shape)}")
        if input_ids.shape[1] > self.n_ctx:
            raise ValueError(f"{input_ids.shape[1]} tokens are more than the n_ctx={self.n_ctx} of {self.name}")
        low, high = (int(end) for end in input_ids.aminmax())
        if low < 0 or high >= self.d_vocab:
            raise ValueError(
                f"ids from {low} to {high} are outside the vocabulary of {self.name}, 0 to {self.d_vocab - 1}: were "
                "they made by another model's tokenizer?"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )


def load_host(
    name_or_module: str | Path | nn.Module,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    tokenizer: Any = None,
) -> Host:
    """A language model as a host.

    Args:
        name_or_module: "gemma-3-270m" (the packaged one, see `molt_lens.gemma`); the local folder or Hub id of a
            Gemma 2 or 3, Llama, Mistral, Qwen 2 or 3 or GPT-2 in safetensors; or a transformers model or CayleyGPT as
            a module, which is used as it is, not copied: moved to `device` and `dtype`, its gradients switched off.
        dtype: of the weights; a CayleyGPT takes float32 or float64 only, its top-k would be mostly ties in less.
        revision: branch, tag or commit of a Hub id.
        tokenizer: a transformers tokenizer, instead of the one that comes with the model; a module of transformers
            comes with none, a CayleyGPT with its own.

    Raises:
        FileNotFoundError: nothing of that name here or on the Hub, no safetensors in it, or no tokenizer.
        ImportError: transformers, or for "gemma-3-270m" the optional package, is not installed.
        ValueError: an architecture, dtype or revision that cannot be used, or weights that lack a tensor.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, such as torch.float32, got {dtype}")
    if isinstance(name_or_module, nn.Module):
        if revision is not None:
            raise ValueError("a revision is one of a Hub id, but the host was given as a module")
        return _host_of_module(name_or_module, torch.device(device), dtype, tokenizer)
    name = str(name_or_module)
    folder = locate(name, revision)
    family = family_of_type(json.loads((folder / "config.json").read_text()).get("model_type"), name)
    files = weight_files(folder)
    tokenizer = read_tokenizer(folder) if tokenizer is None else tokenizer
    model = read_model(folder, dtype).to(torch.device(device))
    return Host(model, family, tokenizer, name=name, fingerprint=fingerprint_of_files(files))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of a transformers tokenizer that are not text: BOS, EOS, padding, and all that it was given as special."""
    if tokenizer is None:
        return frozenset()
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


class _TargetReached(Exception):
    """Ends a forward pass whose rest nobody needs."""


def _host_of_module(model: nn.Module, device: torch.device, dtype: torch.dtype, tokenizer: Any) -> Host:
    kind = type(model).__name__
    if is_cayley(model):
        family, name = CAYLEY, kind
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a CayleyGPT takes float32 or float64, its top-k would be mostly ties in {dtype}")
        model.to(dtype)
        own: Any = getattr(model, "tokenizer", None)
        if tokenizer is None and own is not None:
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token=CAYLEY_EOS)
    else:
        config: Any = getattr(model, "config", None)
        family = family_of_type(getattr(config, "model_type", None), f"a module of class {kind}")
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(
                f"{kind} gives no logits: expected a causal language model, such as AutoModelForCausalLM's"
            )
        name = getattr(model, "name_or_path", "") or kind
        # Parameters only: the rotary frequencies are buffers, which transformers keeps in float32 whatever the dtype.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model = model.to(device)
    return Host(model, family, tokenizer, name=name, fingerprint=fingerprint_of_module(model))

"""Tiny real hosts of every family, with a byte-level tokenizer: what the tests of molt_lens run on."""

from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from molt_lens.hosts import Host, load_host

Family = Literal["gpt2", "llama", "qwen3", "gemma3"]
FAMILIES: tuple[Family, ...] = ("gpt2", "llama", "qwen3", "gemma3")

BOS_ID, EOS_ID, D_VOCAB, N_CTX = 256, 257, 260, 128
"""Ids 0 to 255 are the bytes."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tiny_host(
    family: Family = "gemma3",
    n_layers: int = 3,
    d_model: int = 32,
    seed: int = 0,
    *,
    chat: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Host:
    """A host of random weights; the same arguments give the same weights. `chat` gives its tokenizer a template."""
    return load_host(tiny_model(family, n_layers, d_model, seed), dtype=dtype, tokenizer=tiny_tokenizer(chat=chat))


def tiny_model(family: Family = "gemma3", n_layers: int = 3, d_model: int = 32, seed: int = 0) -> PreTrainedModel:
    """A transformers model made from a config, in eval mode; its gains and biases are random too."""
    shared = {
        "vocab_size": D_VOCAB,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "initializer_range": d_model**-0.5,
    }
    sizes = {
        "hidden_size": d_model,
        "intermediate_size": 3 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": N_CTX,
        "head_dim": d_model // 4,
    }
    torch.manual_seed(seed)
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=d_model, n_layer=n_layers, n_head=4, n_positions=N_CTX, **shared)  # pyright: ignore[reportArgumentType]
        )
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, **shared))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **shared))
    else:
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(sliding_window=32, query_pre_attn_scalar=d_model // 4, **sizes, **shared)
        )
    model.config.architectures = [type(model).__name__]  # as a loaded model has it, and TransformerLens wants it
    shake_vectors(model)
    return model.eval()


def tiny_bridge(family: Family = "gemma3", n_layers: int = 3, d_model: int = 32, seed: int = 0) -> Any:
    """The same weights as a TransformerBridge; offline, though it wants a name that TransformerLens knows.

    Not for models that read images: to make their processor, TransformerLens 3.9 runs `pip install torchvision`, which
    replaces torch in the environment.
    """
    from transformer_lens.model_bridge import TransformerBridge

    names = {
        "gpt2": "openai-community/gpt2",
        "llama": "meta-llama/Llama-3.2-1B",
        "qwen3": "Qwen/Qwen3-0.6B",
        "gemma3": "google/gemma-3-270m",
    }
    model = tiny_model(family, n_layers, d_model, seed)
    return TransformerBridge.boot_transformers(names[family], hf_model=model, tokenizer=tiny_tokenizer(), device="cpu")


@torch.no_grad()
def shake_vectors(model: nn.Module) -> None:
    """Random gains and biases: as they are made, a norm with its gain equals the norm without."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)


def tiny_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; encoding with special tokens puts a BOS in front, as Gemma's does."""
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS_ID)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        model_max_length=N_CTX,
        name_or_path="tiny",  # these two: TransformerLens would otherwise look for the tokenizer on the Hub
        add_bos_token=True,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_text(n_bytes: int, seed: int = 0) -> str:
    """Lower-case words of random letters, for hosts whose weights are random too."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 27, (n_bytes,), generator=generator).tolist()
    return "".join("abcdefghijklmnopqrstuvwxyz "[letter] for letter in letters)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2, encoder.py: bytes_to_unicode)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + unprintable.index(byte)) for byte in range(256)]

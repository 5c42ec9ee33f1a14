"""MOLTs and transcoders inside SAELens: architectures `molt` and `molt_lens_transcoder`.

    sae = replacement_sae(replacement, record)
    sae.save_model(folder)                             # SAE.load_from_disk(folder) gives the same outputs
    bridge = SAETransformerBridge.boot_transformers(name)
    bridge.run_with_saes(tokens, saes=[sae])           # the logits of spliced(host, {site: replacement}, "replace")

SAELens calls encode, then decode(acts) without x, and never forward; but what a MOLT's transform or a skip connection
writes depends on x. So encode remembers x, and decode writes at the x that was encoded last: one SAE is for one
thread, and acts belong to the x they came from. decode(acts, x) says it outright. The skip connection is part of
decode; SAELens' own skip transcoders have it in forward alone, and lose it when attached.

Hooks are named as TransformerBridge names them. A HookedSAETransformer has others, and skips what it does not have
with no more than a warning. `saelens_training.py` has the architectures for SAELens' trainer. SAELens finds an
architecture only once the module that registers it has been imported.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from molt_lens.folder import ReplacementRecord
from molt_lens.maps import make_map
from molt_lens.molt import Molt
from molt_lens.standardize import Replacement
from molt_lens.transcoder import Transcoder

try:
    from sae_lens.registry import (
        SAE_CLASS_REGISTRY,
        SAE_TRAINING_CLASS_REGISTRY,
        register_sae_class,
        register_sae_training_class,
    )
    from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata, TrainingSAE
    from sae_lens.util import dtype_to_str
except ImportError as error:
    raise ImportError(
        'SAELens is missing or does not import: pip install "cayley-interp[saelens]". It needs TransformerLens 3.9; '
        "sae-lens does not support TransformerLens 4"
    ) from error


@dataclass(kw_only=True)
class ReplacementSAEConfig(SAEConfig):
    """What both architectures add to SAELens' fields.

    Raises:
        ValueError: a map of another kind, or that cannot be built; sizes that are not the map's; a normalisation or
            reshaping, for which a replacement has its standardisers.
    """

    map: dict[str, Any]
    """The map's kind and settings, as `SparseMap.config` gives them."""
    d_in: int = 0
    """0: as the map says, like the other sizes."""
    d_out: int = 0
    d_sae: int = 0
    """Units: transforms or features."""
    apply_b_dec_to_input: bool = False
    metadata: Any = field(default_factory=SAEMetadata)
    """An SAEMetadata; SAELens, loading, constructs with a dict and then sets the SAEMetadata."""

    def __post_init__(self):
        super().__post_init__()
        kind = self.map.get("kind")
        if kind != self.kind():
            raise ValueError(f"architecture {self.architecture()!r} holds a map of kind {self.kind()!r}, got {kind!r}")
        with torch.device("meta"):
            made = make_map(self.map)
        for name, size in (("d_in", made.d_in), ("d_out", made.d_out), ("d_sae", made.n_units)):
            if getattr(self, name) not in (0, size):
                raise ValueError(f"the map has {name}={size}, got {getattr(self, name)}: leave it out")
            setattr(self, name, size)
        if self.apply_b_dec_to_input or self.normalize_activations != "none" or self.reshape_activations != "none":
            raise ValueError(
                "a replacement has its own standardisers: leave out apply_b_dec_to_input, normalize_activations and "
                "reshape_activations"
            )

    @classmethod
    def kind(cls) -> str:
        """The kind of map that the architecture holds."""
        raise NotImplementedError


@dataclass(kw_only=True)
class MoltSAEConfig(ReplacementSAEConfig):
    """Config of a MoltSAE; `cfg.json` holds it."""

    @classmethod
    def architecture(cls) -> str:
        return "molt"

    @classmethod
    def kind(cls) -> str:
        return Molt.kind


@dataclass(kw_only=True)
class TranscoderSAEConfig(ReplacementSAEConfig):
    """Config of a TranscoderSAE; `cfg.json` holds it."""

    @classmethod
    def architecture(cls) -> str:
        return "molt_lens_transcoder"

    @classmethod
    def kind(cls) -> str:
        return Transcoder.kind


class ReplacementSAE(SAE[Any]):
    """A Replacement with the hooks and methods of SAELens' SAEs; `sae.replacement` is the Replacement itself."""

    replacement: Replacement

    def initialize_weights(self) -> None:
        with torch.device(self.device):  # "meta" while SAELens loads
            self.replacement = Replacement(make_map(self.cfg.map)).to(self.dtype).eval()
        self._encoded: tuple[Tensor, torch.dtype] | None = None

    @property
    def d_out(self) -> int:
        return self.cfg.d_out

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Gate values, 0 where a unit is closed, in the SAE's dtype; x is remembered for `decode`.

        Raises:
            ValueError: the width of x is not d_in.
        """
        return self.encode_with_hidden_pre(x)[0]

    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        """`encode`, with what the detectors give beside the gate values."""
        if x.shape[-1] != self.cfg.d_in:
            raise ValueError(f"this SAE has d_in={self.cfg.d_in}, got an input of shape {tuple(x.shape)}")
        map = self.replacement.map
        sae_in = self.hook_sae_input(x.to(self.dtype))
        self._encoded = sae_in, x.dtype
        pre = self.hook_sae_acts_pre(map.pre_acts(self.replacement.input(sae_in)))
        return self.hook_sae_acts_post(map.gate(pre)), pre

    def decode(
        self, feature_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """What the replacement writes with these acts at x, skip connection and all, in the dtype that x came in.

        Args:
            x: by default the one that was encoded last. A transcoder without skip connection needs none.

        Raises:
            ValueError: no x, or one of another shape than the acts.
        """
        if x is not None:
            sae_in, dtype = x.to(self.dtype), x.dtype
        else:
            sae_in, dtype = self._encoded or (None, feature_acts.dtype)
        if sae_in is None or sae_in.shape[:-1] != feature_acts.shape[:-1]:
            sae_in = self._any_x(feature_acts, sae_in)
        return self.hook_sae_recons(self.replacement.decode(feature_acts.to(self.dtype), sae_in).to(dtype))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.hook_sae_output(self.decode(self.encode(x)))

    def _any_x(self, acts: Tensor, x: Tensor | None) -> Tensor:
        map = self.replacement.map
        if isinstance(map, Transcoder) and map.W_skip is None:
            return acts.new_zeros(*acts.shape[:-1], self.cfg.d_in, dtype=self.dtype)
        seen = "nothing has been encoded" if x is None else f"the x encoded last has shape {tuple(x.shape)}"
        raise ValueError(
            f"what these acts of shape {tuple(acts.shape)} write depends on x, and {seen}: encode their x first, or "
            "call decode(acts, x)"
        )

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Raises: NotImplementedError: nothing can be folded."""
        raise NotImplementedError("a replacement's units are used as they were trained: there is nothing to fold")

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Raises: NotImplementedError: a replacement standardises what it reads and writes by itself."""
        raise NotImplementedError("a replacement has its own standardisers: do not scale its activations")


class MoltSAE(ReplacementSAE):
    """A MOLT as SAELens knows SAEs. It has no W_dec: a transform writes a linear function of x, not a vector."""


class TranscoderSAE(ReplacementSAE):
    """A transcoder as SAELens knows SAEs; W_enc and W_dec are in raw coordinates, computed at each access."""

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """x @ W_enc and a constant are the pre-activations."""
        return (self.replacement.map.W_enc / self.replacement.input.std).T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Row f is what one unit of feature f adds to the output."""
        map = self.replacement.map
        assert isinstance(map, Transcoder)
        return map.W_dec * self.replacement.output.std


CLASSES: dict[str, tuple[type[ReplacementSAE], type[ReplacementSAEConfig]]] = {
    Molt.kind: (MoltSAE, MoltSAEConfig),
    Transcoder.kind: (TranscoderSAE, TranscoderSAEConfig),
}


def replacement_sae(replacement: Replacement, record: ReplacementRecord) -> ReplacementSAE:
    """A MOLT or transcoder as a SAELens SAE: a copy, on its device and in its dtype, in eval mode.

    `sae.replacement` leads back, and `sae.cfg.metadata` has the record: both pairs of hook names, the host's name and
    its fingerprint.

    Raises:
        ValueError: another kind of map.
    """
    return wrapped(replacement, record, CLASSES)


S = TypeVar("S", bound=ReplacementSAE)


def wrapped(
    replacement: Replacement,
    record: ReplacementRecord,
    classes: Mapping[str, tuple[type[S], type[ReplacementSAEConfig]]],
    **settings: Any,
) -> S:
    """`replacement_sae` in the classes that are given by kind, and with further settings for its config."""
    map = replacement.map
    if map.kind not in classes:
        raise ValueError(f"SAELens is told of {', '.join(classes)} here, got a map of kind {map.kind!r}")
    sae_class, config_class = classes[map.kind]
    config = config_class(
        map=map.config(),
        dtype=dtype_to_str(map.b_dec.dtype),
        device="meta",  # a random start would be thrown away
        metadata=SAEMetadata(
            model_name=record.host_name,
            hook_name=record.hooks["tl_input"],
            hook_name_out=record.hooks["tl_target"],
            hf_hook_name=record.hooks["hf_input"],
            hf_hook_name_out=record.hooks["hf_target"],
            hook_head_index=None,
            prepend_bos=True,  # as the sequences that it was trained on, where the host has a BOS
            host_fingerprint=record.host_fingerprint,
        ),
        **settings,
    )
    sae = sae_class(config)
    sae.replacement = copy.deepcopy(replacement)
    return sae.to(device=map.b_dec.device).eval()


def register(sae_class: type[ReplacementSAE], config_class: type[ReplacementSAEConfig]) -> None:
    """Make a class known to SAELens; once more is no harm, as when its module is reloaded."""
    is_trained = issubclass(sae_class, TrainingSAE)
    registry, add = (
        (SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class)
        if is_trained
        else (SAE_CLASS_REGISTRY, register_sae_class)
    )
    name = config_class.architecture()
    known = registry.get(name)
    if known is not None and known[0].__module__ == sae_class.__module__:
        del registry[name]
    add(name, sae_class, config_class)  # pyright: ignore[reportArgumentType]


for _classes in CLASSES.values():
    register(*_classes)

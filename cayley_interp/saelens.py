"""CayleySAE inside SAELens: architecture `cayley`, as a view of a model's own bottleneck or fitted to any activations.

    sae = cayley_sae(model, layer=0)                   # bare CayleyGPT, TransformerBridge or HookedTransformer
    sae.save_model(folder)                             # SAE.load_from_disk(folder) gives the same outputs
    sae_transformer(wrapped).add_sae(sae)              # stands where the model's own bottleneck does: same logits
    sae_transformer(wrapped).reset_saes()
    run_evals(sae, store, evaluation_host(wrapped, sae), ActivationScaler(), exclude_special_tokens=False)

A dense code is the levels side by side. `W_dec` and `W_enc` are computed from the algebra when a tool asks for them;
encode and decode never build them. `saelens_training.py` has the architecture for SAELens' trainer. SAELens finds an
architecture only once the module that registers it has been imported.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cayley_interp.bottleneck import MIN_STD, CayleySAE, CayleySAEConfig, LevelCodes, parse_levels

try:
    from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
    from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
    from sae_lens.util import dtype_to_str
except ImportError as error:
    raise ImportError(
        'SAELens is missing or does not import: pip install "cayley-interp[saelens]". It needs TransformerLens 3.9; '
        "sae-lens does not support TransformerLens 4"
    ) from error

ARCHITECTURE = "cayley"
COUNTERS = ("bottleneck.n_updates", "bottleneck.tokens_since_active")
"""int64 buffers of the bottleneck that only its own training reads. SAELens casts all it loads to one dtype."""


@dataclass(kw_only=True)
class CayleyConfig(SAEConfig):
    """What the `cayley` architecture adds to SAELens' fields, fitted or not.

    Raises:
        ValueError: a bottleneck that cannot be built, narrower than d_in, or of another d_sae; whitened activations.
    """

    bottleneck: CayleySAEConfig | dict[str, Any]
    """Levels and conventions, kept as a dict of JSON. Its d_model is at least d_in: inputs are padded with zeros."""
    rotation: bool = False
    """Whether inputs are rotated before they meet the atoms, and back after."""
    d_sae: int = 0
    """Features of all levels together; 0: as the levels say."""

    def __post_init__(self):
        super().__post_init__()
        if self.normalize_activations == "covariance_whitening":
            raise ValueError("the atoms are fixed, so no whitening can be folded into them: normalise another way")
        try:
            config = self.bottleneck_config
        except TypeError as error:
            raise ValueError(f"`bottleneck` must hold the fields of a CayleySAEConfig: {error}") from error
        self.bottleneck = asdict(config)
        if config.d_model < self.d_in:
            raise ValueError(
                f"a bottleneck of d_model={config.d_model} cannot hold d_in={self.d_in}: "
                f"use d_model={1 << (self.d_in - 1).bit_length()}, the next power of two (inputs are padded with zeros)"
            )
        d_sae = sum(1 << level.n for level in parse_levels(config.levels))
        if self.d_sae not in (0, d_sae):
            raise ValueError(f"levels {config.levels!r} have {d_sae} features, got d_sae={self.d_sae}: leave it out")
        self.d_sae = d_sae

    @property
    def bottleneck_config(self) -> CayleySAEConfig:
        return CayleySAEConfig(**self.bottleneck) if isinstance(self.bottleneck, dict) else self.bottleneck

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class CayleyBase(SAE[Any]):
    """Encoder, decoder and weights of both `cayley` classes: a CayleySAE between an affine map and its inverse.

    An input x goes in as u = R pad(x - b_dec), with R the rotation, if any; a code f comes out as
    R' sum f_u gain_u D_u + b_dec, cut back to d_in.
    """

    bottleneck: CayleySAE

    def initialize_weights(self) -> None:
        """b_dec zero, every gain 1, and the bottleneck of the config."""
        self.bottleneck = CayleySAE(self.cfg.bottleneck_config).to(self.device, self.dtype)
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_in, device=self.device, dtype=self.dtype))
        self.gain = nn.Parameter(torch.ones(self.cfg.d_sae, device=self.device, dtype=self.dtype))

    @abstractmethod
    def rotation_matrix(self) -> Float[Tensor, "d_model d_model"] | None:
        """R, orthogonal, or None for the identity."""

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The levels' codes side by side, 0 where a feature is not active, in the dtype of x.

        `hook_sae_acts_pre` gets (x - b_dec) @ W_enc + b_enc, which selection never needs: it is computed where a hook
        listens, and for looking only. Under `score_standardize="token"` it is before the token's standardisation.

        Raises:
            ValueError: the width of x is not d_in, a hook has changed `hook_sae_acts_pre`, or the SAE itself is in less
                than float32.
        """
        width = x.shape[-2:].numel() if self.hook_z_reshaping_mode else x.shape[-1]
        if width != self.cfg.d_in:
            raise ValueError(f"this SAE has d_in={self.cfg.d_in}, got an input of shape {tuple(x.shape)}")
        u = self.to_atoms(self.process_sae_in(x), self.rotation_matrix())
        if self.hook_sae_acts_pre._forward_hooks:  # not `has_hooks`: SAELens swaps in a plain module to silence hooks
            pre = self.acts_pre(u)
            if not torch.equal(self.hook_sae_acts_pre(pre), pre):
                raise ValueError("edits of hook_sae_acts_pre have no effect here: edit hook_sae_acts_post")
        return self.hook_sae_acts_post(self.dense(self.bottleneck.encode(u)).to(x.dtype))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """One transform per level, whatever the code and its number of active features; in the code's dtype."""
        sizes = [1 << level.n for level in self.bottleneck.levels]
        y = self.bottleneck.decode_dense((feature_acts.to(self.dtype) * self.gain).split(sizes, dim=-1))
        return self.output(y, self.rotation_matrix()).to(feature_acts.dtype)

    def to_atoms(self, sae_in: Tensor, rotation: Tensor | None) -> Float[Tensor, "*batch d_model"]:
        """u = R pad(sae_in)."""
        if self.dtype.itemsize < 4:
            raise ValueError(
                f"in {self.dtype} the statistics and scores of an SAE would select other features: keep it in float32 "
                "(`sae.to(torch.float32)`, or load it anew); what it reads and writes may be of any dtype"
            )
        u = F.pad(sae_in, (0, self.bottleneck.config.d_model - sae_in.shape[-1]))
        return u if rotation is None else u @ rotation.T

    def output(self, y: Float[Tensor, "*batch d_model"], rotation: Tensor | None) -> Tensor:
        """What a decoded sum of atoms is in the space of the input: R' y, cut to d_in, plus b_dec."""
        y = y if rotation is None else y @ rotation
        recons = self.hook_sae_recons(y[..., : self.cfg.d_in] + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)

    def dense(self, codes: tuple[LevelCodes, ...]) -> Float[Tensor, "*batch d_sae"]:
        return torch.cat(self.bottleneck.to_dense(codes), dim=-1)

    @torch.no_grad()
    def acts_pre(self, u: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Every score, scaled and shifted as selection sees it."""
        scores = self.bottleneck.dictionary.scores(u)
        levels = [scores[..., : 1 << level.n] for level in self.bottleneck.levels]  # a level is a prefix of the deepest
        return torch.cat(levels, dim=-1) * self.score_scale() + self.b_enc

    def score_scale(self) -> Float[Tensor, " d_sae"]:
        """By what a score is multiplied before the bias joins it."""
        if self.bottleneck.config.score_standardize == "feature":
            return 1 / self.bottleneck.std.clamp(min=MIN_STD)
        return torch.ones_like(self.bottleneck.std)

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """What remains of a pre-activation once (x - b_dec) @ W_enc is taken away."""
        bias = self.bottleneck.bias.detach()
        if self.bottleneck.config.score_standardize == "feature":
            return bias - self.bottleneck.mean * self.score_scale()
        return bias

    @torch.no_grad()
    def atoms(self) -> Float[Tensor, "d_sae d_in"]:
        """The atoms as rows of the input's space: R' D_u, cut to d_in."""
        dictionary = self.bottleneck.dictionary
        indices = torch.arange(dictionary.size, device=self.b_dec.device)
        deepest = dictionary.atoms(indices, self.dtype)
        rotation = self.rotation_matrix()
        if rotation is not None:
            deepest = deepest @ rotation
        levels = [deepest[: 1 << level.n, : self.cfg.d_in] for level in self.bottleneck.levels]
        return torch.cat(levels)

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """The norms, where there is nothing to fold.

        Raises:
            NotImplementedError: the norms are not 1, as after fitting.
        """
        norms = self.get_W_dec_norm()
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
            raise NotImplementedError("W_dec is computed from fixed atoms: its norms cannot be folded into W_enc")
        return norms

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        for name in COUNTERS:
            del state_dict[name]

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        for name in COUNTERS:
            own = self.bottleneck.get_buffer(name.split(".")[1])
            state_dict[name] = torch.zeros(own.shape, dtype=own.dtype, device=state_dict["b_dec"].device)


@dataclass(kw_only=True)
class CayleyInferenceSAEConfig(CayleyConfig):
    """Config of a CayleyInferenceSAE; `cfg.json` holds it.

    Raises:
        ValueError: as for CayleyConfig, or a normalisation that training has not folded into the weights.
    """

    metadata: Any = field(default_factory=SAEMetadata)
    """An SAEMetadata; SAELens, loading, constructs with a dict and then sets the SAEMetadata."""

    def __post_init__(self):
        super().__post_init__()
        if self.normalize_activations == "expected_average_only_in":
            raise ValueError(
                'normalize_activations="expected_average_only_in" is of training, whose end folds it into the weights: '
                "finish the fit before saving an inference model"
            )


class CayleyInferenceSAE(CayleyBase):
    """A Cayley dictionary as SAELens knows SAEs: what `cayley_sae` and `SAE.load_from_disk` return.

    `W_dec` and `W_enc` are built at first use and kept until the SAE moves or changes its dtype; `del sae.W_dec` frees
    one, as is due after a change of its parameters. At d_in = 1,024 with 33,792 features each takes 138 MB.
    """

    cfg: CayleyInferenceSAEConfig

    def initialize_weights(self) -> None:
        super().initialize_weights()
        d_model = self.bottleneck.config.d_model
        eye = torch.eye(d_model, device=self.device, dtype=self.dtype) if self.cfg.rotation else None
        self.rotation = None if eye is None else nn.Parameter(eye)

    def rotation_matrix(self) -> Float[Tensor, "d_model d_model"] | None:
        return self.rotation

    @cached_property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Row u is what one unit of feature u adds to the output."""
        return self.atoms() * self.gain.detach()[:, None]

    @cached_property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(x - b_dec) @ W_enc + b_enc are the pre-activations that features are selected by."""
        return (self.atoms() * self.score_scale()[:, None]).T

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        for name in ("W_dec", "W_enc"):
            vars(self).pop(name, None)
        return super()._apply(fn, recurse)


def cayley_sae(model: nn.Module, layer: int) -> CayleyInferenceSAE:
    """The bottleneck of a block as a SAELens SAE: a copy of its parameters, on its device and in its dtype.

    Its input is `blocks.{layer}.sparse.hook_in` and its output takes the place of `blocks.{layer}.sparse.hook_out`.

    Args:
        model: a Cayley-GPT, bare or wrapped as a TransformerBridge or HookedTransformer.
        layer: index of the block, from 0.

    Raises:
        ValueError: the model has no bottleneck.
        IndexError: no such block.
    """
    bottlenecks = [module for module in model.modules() if isinstance(module, CayleySAE)]
    if not bottlenecks:
        raise ValueError("this model has no CayleySAE: a vanilla GPT can be given one by fitting a CayleyTrainingSAE")
    if not 0 <= layer < len(bottlenecks):
        raise IndexError(f"the model has bottlenecks in blocks 0 to {len(bottlenecks) - 1}, got layer {layer}")
    own = bottlenecks[layer]
    host: Any = getattr(model, "cfg", None) or model.config
    config = CayleyInferenceSAEConfig(
        d_in=own.config.d_model,
        bottleneck=own.config,
        dtype=dtype_to_str(own.bias.dtype),
        device=str(own.bias.device),
        metadata=SAEMetadata(
            model_name=getattr(host, "model_name", None) or type(model).__name__,
            hook_name=f"blocks.{layer}.sparse.hook_in",
            hook_name_out=f"blocks.{layer}.sparse.hook_out",
            hook_head_index=None,
            prepend_bos=False,
            context_size=host.n_ctx,
            l0=sum(level.k for level in own.levels),
        ),
    )
    sae = CayleyInferenceSAE(config)
    sae.bottleneck.load_state_dict(own.state_dict())
    return sae.eval()  # pyright: ignore[reportReturnType]


def sae_transformer(model: Any) -> Any:
    """The same wrapped model, from now on with SAELens' `add_sae`, `run_with_saes` and their like.

    SAELens has them on classes of its own, HookedSAETransformer and SAETransformerBridge; the model is made an instance
    of one of them too, the way SAELens does it to a TransformerBridge.

    Raises:
        TypeError: the model is not wrapped for TransformerLens.
    """
    from sae_lens import HookedSAETransformer
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    for theirs in (HookedSAETransformer, SAETransformerBridge):
        if isinstance(model, theirs):
            return model
        if isinstance(model, theirs.__bases__):
            model.__class__ = type(theirs.__name__, (type(model), _LiveHooks, theirs), {})
            model._acts_to_saes, model._transcoder_output_hooks = {}, {}
            return model
    raise TypeError(f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}: wrap it first")


class _LiveHooks:
    """Repairs `reset_saes`: it leaves a bridge's hook point without its full name, and hooks put on it then do nothing.

    Seen in SAELens 6.54; no error tells of it.
    """

    _transcoder_output_hooks: dict[str, str]

    def _reset_sae(self, act_name: str, *args: Any, **kwargs: Any) -> None:
        from sae_lens.analysis.hooked_sae_transformer import get_deep_attr

        hook_name = self._transcoder_output_hooks.get(act_name, act_name)
        super()._reset_sae(act_name, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        get_deep_attr(self, hook_name).name = hook_name


def evaluation_host(model: Any, sae: SAE[Any]) -> Any:
    """The model for SAELens' `run_evals`, which knows no `hook_name_out`.

    `run_evals` puts decode(encode(x)) in the place of x at `hook_name`. In a model that has a bottleneck of its own
    there, the bottleneck would then read its own output. Here a hook on `hook_name` reads there and writes at
    `hook_name_out`, as when the SAE is attached: the SAE stands for the bottleneck and does not come on top of it.

    Of the metrics, CE and KL "with SAE" then test the view, for it is the model's own computation (KL 0), and "with
    ablation" says what the block's MLP is worth with nothing to read. Sparsity and densities are of the real code. The
    reconstruction metrics compare the code with the bottleneck's input, which training never asks it to reproduce.

    Pass `exclude_special_tokens=False`: at an excluded token `run_evals` writes the unchanged input, which would
    bypass the bottleneck.
    """
    return _SplicedHost(model, sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out)


class _SplicedHost:
    """A model, but hooks of `run_with_hooks` on one point read there and write at another."""

    def __init__(self, model: Any, hook_name: str, hook_name_out: str):
        self.model, self.hook_name, self.hook_name_out = model, hook_name, hook_name_out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def run_with_hooks(self, *args: Any, fwd_hooks: Sequence[tuple[Any, Callable[..., Any]]], **kwargs: Any) -> Any:
        spliced = [pair for name, hook in fwd_hooks for pair in self._splice(name, hook)]
        return self.model.run_with_hooks(*args, fwd_hooks=spliced, **kwargs)

    def _splice(self, name: Any, replace: Callable[..., Any]) -> list[tuple[Any, Callable[..., Any]]]:
        if name != self.hook_name:
            return [(name, replace)]
        seen: list[Tensor] = []

        def read(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001  (the name is TransformerLens')
            seen.append(tensor)

        def write(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            return replace(seen.pop(), hook=hook)

        return [(self.hook_name, read), (self.hook_name_out, write)]


def register(registry: dict[str, Any], add: Callable[..., None], sae_class: type, config_class: type) -> None:
    """Make a class known to SAELens as `cayley`; once more is no harm, as when its module is reloaded."""
    known = registry.get(ARCHITECTURE)
    if known is not None and known[0].__module__ == sae_class.__module__:
        del registry[ARCHITECTURE]
    add(ARCHITECTURE, sae_class, config_class)


register(SAE_CLASS_REGISTRY, register_sae_class, CayleyInferenceSAE, CayleyInferenceSAEConfig)

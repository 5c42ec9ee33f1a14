"""Training MOLTs and transcoders with SAELens' trainer.

    store = ActivationStore(host, site, sequences, tokens=300_000, batch_size=1024, seed=0)
    trainer_cfg = SAETrainerConfig(total_training_samples=299_008, train_batch_size_samples=1024, lr=2e-3, ...)
    molt = Molt(host.d_model, host.d_model, gate="batchtopk:4")
    sae = training_sae(molt, store, training_steps=trainer_cfg.total_training_steps)
    SAETrainer(trainer_cfg, sae, data_provider=paired(store)).fit().eval()
    sae.save_inference_model(folder)    # SAE.load_from_disk(folder) is a MoltSAE with the same outputs
    save_replacement(sae.replacement, other_folder, host=host, site=site)

SAELens' trainer has one tensor a step, and a transcoder needs a pair: `paired` puts x and y side by side, and the step
takes them apart. Hence the classes are for SAETrainer and a store of this package: LanguageModelSAETrainingRunner reads
one hook, makes an SAE with no statistics of its data, and evaluates a transcoder as if its target were its input. Hence
also normalisation by SAELens is refused: one factor would scale both halves.

The loss is that of this package, the same numbers as its own trainer's: the error in standardised coordinates
(`molt_lens.objective`, which has revival too) and a Penalty, whose weight SAELens' coefficient `penalty` warms up. A
unit that SAELens calls dead, closed for more than `dead_feature_window` steps, has its bias raised at each step until
it opens; a window longer than the run revives none. Save the store's state in `save_checkpoint_fn`, and a run can be
resumed.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor

from molt_lens.activations import ActivationStore
from molt_lens.folder import ReplacementRecord
from molt_lens.molt import Molt
from molt_lens.objective import fit_of, revive_
from molt_lens.penalties import Penalty, penalty_of, starting_open_rate
from molt_lens.saelens import (
    MoltSAE,
    MoltSAEConfig,
    ReplacementSAE,
    ReplacementSAEConfig,
    TranscoderSAE,
    TranscoderSAEConfig,
    register,
    wrapped,
)
from molt_lens.sparse_map import SparseMap
from molt_lens.standardize import Replacement
from molt_lens.transcoder import Transcoder

CALIBRATION_TOKENS = 4_096
"""Tokens that an untrained map's scales are set from."""


@dataclass(kw_only=True)
class ReplacementTrainingSAEConfig(ReplacementSAEConfig, TrainingSAEConfig):
    """What both architectures add for training. `decoder_init_norm`, which SAELens gives every config, is not used.

    Raises:
        ValueError: as for ReplacementSAEConfig; fields that a Penalty does not have; norms held between steps, which
            SAELens' checkpoints cannot keep; a warm-up without the number of steps that it is a share of.
    """

    penalty: Penalty | dict[str, Any] = field(default_factory=Penalty)
    """What keeps ReLU and JumpReLU gates closed; kept as a dict of JSON."""
    training_steps: int = 0
    """SAETrainerConfig.total_training_steps, of which the penalty's warm-up is a share."""

    def __post_init__(self):
        penalty = self.penalty_config
        self.penalty = asdict(penalty)  # first of all, because SAELens copies it into the metadata
        super().__post_init__()
        if penalty.norms_every != 1:
            raise ValueError(
                f"norms_every={penalty.norms_every}: SAELens' checkpoints have no place for norms held between steps: "
                "leave it out, or train with train_molt.py"
            )
        if penalty.kind != "none" and penalty.warmup > 0 and self.training_steps < 1:
            raise ValueError(
                f"the penalty warms up over {penalty.warmup} of the run, got training_steps={self.training_steps}: "
                "give SAETrainerConfig.total_training_steps, or Penalty(warmup=0)"
            )

    @property
    def penalty_config(self) -> Penalty:
        """Raises: ValueError: fields that a Penalty does not have."""
        try:
            return Penalty(**self.penalty) if isinstance(self.penalty, dict) else self.penalty
        except TypeError as error:
            raise ValueError(f"`penalty` must hold the fields of a Penalty: {error}") from error


@dataclass(kw_only=True)
class MoltTrainingSAEConfig(ReplacementTrainingSAEConfig, MoltSAEConfig):
    """Config of a MoltTrainingSAE."""


@dataclass(kw_only=True)
class TranscoderTrainingSAEConfig(ReplacementTrainingSAEConfig, TranscoderSAEConfig):
    """Config of a TranscoderTrainingSAE."""


class ReplacementTrainingSAE(ReplacementSAE, TrainingSAE[Any]):
    """A Replacement under SAETrainer; `sae.replacement` is the one that is trained.

    After `fit` call `eval`: a BatchTopK gate in training mode ranks the tokens of a batch among each other.
    """

    cfg: ReplacementTrainingSAEConfig

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """`penalty`, which rises from 0 as `molt_lens.penalties.penalty_weight` does over whole steps; else none."""
        penalty = self.cfg.penalty_config
        if penalty.kind == "none":
            return {}
        # A share of a step would have SAELens' schedule overshoot.
        return {"penalty": TrainCoefficientConfig(penalty.weight, round(penalty.warmup * self.cfg.training_steps))}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on pairs [batch, d_in + d_out] as `paired` gives them; revives dead units first.

        In the result `sae_in` is the target and `sae_out` its reconstruction, both in standardised coordinates: the
        explained variance that SAELens logs is of the target, each dimension counting alike.

        Raises:
            ValueError: a batch of another width.
        """
        d_in, d_out = self.cfg.d_in, self.cfg.d_out
        if step_input.sae_in.shape[-1] != d_in + d_out:
            raise ValueError(
                f"expected pairs of width d_in + d_out = {d_in} + {d_out} = {d_in + d_out}, got a batch of shape "
                f"{tuple(step_input.sae_in.shape)}: use data_provider=paired(store), for a store that gives x alone "
                "has no target to train on"
            )
        if step_input.dead_neuron_mask is not None:
            revive_(self.replacement.map, step_input.dead_neuron_mask)
        x, y = step_input.sae_in.to(self.dtype).split([d_in, d_out], dim=-1)
        fit = fit_of(self.replacement, x, y)
        penalties = self.calculate_aux_loss(step_input, fit.acts, fit.pre, fit.recons)
        loss = sum(penalties.values(), start=fit.mse)
        return TrainStepOutput(fit.target, fit.recons, fit.acts, fit.pre, loss, {"mse_loss": fit.mse} | penalties)

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """`penalty_loss`, weighted, where there is a penalty."""
        penalty = self.cfg.penalty_config
        if penalty.kind == "none":
            return {}
        unweighted = penalty_of(penalty, self.replacement.map, hidden_pre, feature_acts)
        return {"penalty_loss": step_input.coefficients["penalty"] * unweighted}

    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """Frobenius norms [d_sae] of what the units write, in standardised coordinates."""
        return {"weights/norms": self.replacement.map.norms().float().cpu().numpy()}


class MoltTrainingSAE(ReplacementTrainingSAE, MoltSAE):
    """A MOLT under SAETrainer."""


class TranscoderTrainingSAE(ReplacementTrainingSAE, TranscoderSAE):
    """A transcoder under SAETrainer."""


TRAINING_CLASSES: dict[str, tuple[type[ReplacementTrainingSAE], type[ReplacementTrainingSAEConfig]]] = {
    Molt.kind: (MoltTrainingSAE, MoltTrainingSAEConfig),
    Transcoder.kind: (TranscoderTrainingSAE, TranscoderTrainingSAEConfig),
}


def training_sae(
    map: SparseMap,
    store: ActivationStore,
    *,
    training_steps: int,
    penalty: Penalty | None = None,
    moments_tokens: int = 100_000,
    open_rate: float = 0.25,
    initial_variance: float = 0.01,
) -> ReplacementTrainingSAE:
    """A copy of an untrained MOLT or transcoder, ready for SAETrainer: its standardisers and scales set from a store.

    `sae.cfg.metadata` names the store's host and both hooks, so that what is saved attaches to a bridge.

    Args:
        map: its device and dtype are the SAE's; its gate is relu, jumprelu, topk:K or batchtopk:K.
        training_steps: SAETrainerConfig.total_training_steps.
        penalty: what keeps ReLU and JumpReLU gates closed; by default none, as the other gates need.
        moments_tokens: tokens that the standardisers' statistics are taken over, the store's first.
        open_rate, initial_variance: as for `SparseMap.calibrate`.

    Raises:
        ValueError: another kind of map, a penalty that there is not or that its gate cannot have, a config that cannot
            work, a store with fewer tokens than asked for.
    """
    host, site, penalty = store.host, store.site, penalty or Penalty()
    record = ReplacementRecord(site, asdict(host.names(site)), host.name, host.fingerprint, None)
    settings = {"penalty": penalty, "training_steps": training_steps}
    sae = wrapped(Replacement(map), record, TRAINING_CLASSES, **settings).train()
    replacement = sae.replacement
    no_tokens = torch.empty(0, map.n_units, device=sae.device, dtype=sae.dtype)
    penalty_of(penalty, replacement.map, no_tokens, no_tokens)  # what it raises is said before the first forward pass
    moments = store.moments(moments_tokens)
    replacement.input.set(moments.mean_in, moments.std_in)
    replacement.output.set(moments.mean_out, moments.std_out)
    sample = store.first_inputs(min(CALIBRATION_TOKENS, moments_tokens)).to(sae.device, sae.dtype)
    open_rate = starting_open_rate(penalty, map.n_units, open_rate)
    replacement.map.calibrate(replacement.input(sample), open_rate, initial_variance)
    return sae


def paired(store: ActivationStore) -> Iterator[Float[Tensor, "batch d_in_and_d_out"]]:
    """The store's batches from its position on, x and y side by side: a data provider for SAETrainer.

    Raises:
        ValueError: at the end of the store's last epoch, for SAETrainer asks for a batch only where it needs one.
    """
    samples = 0
    for x, y in store:
        samples += len(x)
        yield torch.cat([x, y], dim=-1)
    raise ValueError(
        f"the store has served its {samples:,} tokens and training asks for more: lower total_training_samples to "
        "what it has, or give the store more text or epochs"
    )


for _classes in TRAINING_CLASSES.values():
    register(*_classes)

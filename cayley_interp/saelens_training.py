"""Fitting a Cayley dictionary to the activations of any model, with SAELens' trainer.

    bottleneck = CayleySAEConfig(d_model=128, levels="7,24,0", score_standardize="none", signed=True)
    sae = CayleyTrainingSAE(CayleyTrainingSAEConfig(d_in=128, bottleneck=bottleneck, rotation=True))
    SAETrainer(SAETrainerConfig(...), sae, batches).fit()
    sae.save_inference_model(folder)    # SAE.load_from_disk(folder) is a CayleyInferenceSAE

The atoms are fixed. Trained are the biases, b_dec, one gain per feature and, with `rotation`, the orthogonal matrix in
front of the atoms: without it the dictionary is blind to the directions a model prefers, and no bias can turn it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from cayley_interp.saelens import CayleyBase, CayleyConfig, register


@dataclass(kw_only=True)
class CayleyTrainingSAEConfig(CayleyConfig, TrainingSAEConfig):
    """Config of a CayleyTrainingSAE. `decoder_init_norm`, which SAELens gives every training config, is not used.

    Raises:
        ValueError: as for CayleyConfig, or a bottleneck whose values are not in units of the input.
    """

    def __post_init__(self):
        super().__post_init__()
        options = self.bottleneck_config
        if options.score_standardize != "none" or not options.forward_standardized or options.revive_after is not None:
            raise ValueError(
                "to reconstruct its input a code must be in its units, and its biases must have a gradient: use "
                'CayleySAEConfig(score_standardize="none", forward_standardized=True, revive_after=None), got '
                f"score_standardize={options.score_standardize!r}, "
                f"forward_standardized={options.forward_standardized}, revive_after={options.revive_after}"
            )


class CayleyTrainingSAE(CayleyBase, TrainingSAE[CayleyTrainingSAEConfig]):
    """A Cayley dictionary fitted to reconstruct activations: the sum of squares over d_in, averaged over tokens.

    The value of an active feature is its raw score plus its bias. On one level, an orthonormal basis, the scores of the
    k largest are the best values there are, and the fit is of the rotation: which basis makes the activations sparse.
    With more levels an active leaf measures again what its parent has already written (the score of an atom that
    overlaps others is not its share), which the gains correct; they start at 1 / levels. Scores standardised by
    feature, as models trained with a bottleneck have them, select what is unusual and not what is large, and
    reconstruct less. The measurements are in docs/results.md.

    There are no running statistics then, and nothing for `update_statistics` to do; SAELens' trainer counts the dead.
    """

    cfg: CayleyTrainingSAEConfig

    def initialize_weights(self) -> None:
        super().initialize_weights()
        nn.init.constant_(self.gain, 1 / len(self.bottleneck.levels))
        d_model = self.bottleneck.config.d_model
        zeros = torch.zeros(d_model, d_model, device=self.device, dtype=self.dtype) if self.cfg.rotation else None
        self.rotation_generator = None if zeros is None else nn.Parameter(zeros)

    def rotation_matrix(self) -> Float[Tensor, "d_model d_model"] | None:
        """exp(A - A'), which reaches every rotation from A = 0, the identity."""
        if self.rotation_generator is None:
            return None
        return torch.linalg.matrix_exp(self.rotation_generator - self.rotation_generator.T)

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Row u is what one unit of feature u adds to the output; built anew at each use, for it is being trained."""
        return self.atoms() * self.gain.detach()[:, None]

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.atoms().T

    def get_coefficients(self) -> dict[str, Any]:
        """None: k fixes the sparsity."""
        return {}

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,  # noqa: ARG002
        feature_acts: Tensor,  # noqa: ARG002
        hidden_pre: Tensor,  # noqa: ARG002
        sae_out: Tensor,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """None."""
        return {}

    def encode_with_hidden_pre(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Tensor, Tensor]:
        """The code, twice: pre-activations are not computed."""
        acts = self.encode(x)
        return acts, acts

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step: the gradient goes through the active features alone, and the rotation is computed once.

        The dense code in the result is for SAELens' counts of features and has no gradient.
        """
        x = step_input.sae_in
        with torch.autocast(x.device.type, enabled=False):  # selection by bf16 scores would be mostly ties
            rotation = self.rotation_matrix()
            codes = self.bottleneck.encode(self.to_atoms(self.process_sae_in(x), rotation))
            scaled = tuple(
                code._replace(values=code.values * self.gain[code.indices + offset])
                for code, offset in zip(codes, self.bottleneck.offsets, strict=True)
            )
            sae_out = self.output(self.bottleneck.decode(scaled), rotation)
            loss = self.mse_loss_fn(sae_out, x).sum(dim=-1).mean()
            acts = self.dense(codes).detach()
        return TrainStepOutput(x, sae_out, acts, acts, loss, {"mse_loss": loss})

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Take activations as they are from now on, having trained on `scaling_factor` times as much.

        Scores are of degree one in the input, so the biases are divided and the atoms stay unit vectors.
        """
        self.bottleneck.bias.div_(scaling_factor)
        self.b_dec.div_(scaling_factor)
        self.cfg.normalize_activations = "none"

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """The rotation in the place of its generator."""
        super().process_state_dict_for_saving_inference(state_dict)
        rotation = self.rotation_matrix()
        if rotation is not None:
            del state_dict["rotation_generator"]
            state_dict["rotation"] = rotation.detach().contiguous()


register(SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class, CayleyTrainingSAE, CayleyTrainingSAEConfig)

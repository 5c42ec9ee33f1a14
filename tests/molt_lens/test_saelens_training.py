"""MOLTs and transcoders under SAELens' own trainer: the same numbers as this package's, saved and read back."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from molt_lens import LinearMap, Molt, SparseMap, Transcoder, saelens_training
from molt_lens.activations import ActivationStore
from molt_lens.folder import load_replacement, save_replacement
from molt_lens.hosts import Site
from molt_lens.objective import revive_
from molt_lens.packing import pack_documents
from molt_lens.penalties import Penalty, penalty_weight
from molt_lens.saelens import MoltSAE, TranscoderSAE
from molt_lens.saelens_training import (
    MoltTrainingSAE,
    MoltTrainingSAEConfig,
    ReplacementTrainingSAE,
    TranscoderTrainingSAE,
    TranscoderTrainingSAEConfig,
    paired,
    training_sae,
)
from tests.molt_lens.host_models import tiny_host, tiny_text
from training.molt_loop import MoltTrainer
from training.molt_recipes import MoltOptim, MoltRun
from training.train_molt import CALIBRATION_TOKENS, MOMENTS_TOKENS

SITE = Site(1, target="post_norm_out")
TOKENS, BATCH, EPOCHS = 1_000, 50, 2
STEPS = TOKENS // BATCH * EPOCHS
L0 = Penalty("l0", weight=0.01, target=4.0)
TANH = Penalty("tanh", weight=0.01, warmup=0.5)
RUNS = {
    "molt": ("batchtopk:2", None),
    "molt-skip": ("relu", TANH),
    "transcoder": ("jumprelu", L0),
    "skip-transcoder": ("topk:4", None),
}


@pytest.fixture(scope="module")
def host():
    return tiny_host()


def make_map(kind: str, gate: str) -> SparseMap:
    torch.manual_seed(0)
    skip = "skip" in kind
    if kind.startswith("molt"):
        return Molt(32, 32, gate=gate, skip=skip, ladder=((8, 2), (4, 6)))
    return Transcoder(32, 32, n_features=60, gate=gate, skip=skip)


def make_store(host, epochs: int = EPOCHS) -> ActivationStore:
    texts = [tiny_text(300, seed=i) for i in range(8)]
    settings: dict[str, Any] = {"tokens": TOKENS, "batch_size": BATCH, "seed": 0, "epochs": epochs}
    return ActivationStore(host, SITE, lambda: pack_documents(texts, host, 96), dtype=torch.float32, **settings)


def make_sae(host, kind: str, gate: str | None = None, penalty: Penalty | None = None) -> ReplacementTrainingSAE:
    settings: dict[str, Any] = {"training_steps": STEPS, "moments_tokens": TOKENS, "penalty": penalty or RUNS[kind][1]}
    return training_sae(make_map(kind, gate or RUNS[kind][0]), make_store(host), **settings)


def trainer_config(**changed) -> SAETrainerConfig:
    sizes = {"total_training_samples": STEPS * BATCH, "train_batch_size_samples": BATCH}
    return SAETrainerConfig(**sizes | {"lr": 5e-3, "lr_end": 5e-3, "adam_beta2": 0.99} | changed)


def make_trainer(host, sae: ReplacementTrainingSAE, **changed) -> SAETrainer:
    return SAETrainer(trainer_config(**changed), sae, data_provider=paired(make_store(host)))


def native_trainer(sae: ReplacementTrainingSAE, store: ActivationStore, folder: Path, **changed) -> MoltTrainer:
    """This package's own, with SAETrainer's Adam and rates."""
    settings: dict[str, Any] = {
        "penalty": sae.cfg.penalty_config,
        "optim": MoltOptim(lr=5e-3, warmup=0.0, decay=0.0),
        "tokens": TOKENS,
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "revive_after": 0,
        "log_every": 1,
    }
    return MoltTrainer(MoltRun(name="native", **settings | changed), sae.replacement, store, folder)


# ---- The numbers ----


@pytest.mark.parametrize(
    ("kind", "gate", "penalty"),
    [
        *((kind, *run) for kind, run in RUNS.items()),
        ("molt", "jumprelu", L0),
        ("transcoder", "relu", Penalty("l1", weight=0.01)),
    ],
)
def test_a_step_has_the_loss_and_gradients_of_the_native_trainer(host, tmp_path, kind, gate, penalty):
    at_once = penalty and replace(penalty, warmup=0.0)
    sae, same = (make_sae(host, kind, gate, at_once) for _ in range(2))
    one_step = {"tokens": BATCH, "epochs": 1, "optim": MoltOptim(clip=0.0)}
    native = native_trainer(same, make_store(host), tmp_path, **one_step)
    expected: dict[str, Tensor] = {}

    def keep_gradients(*_) -> None:
        expected.update((name, p.grad.clone()) for name, p in native.map.named_parameters() if p.grad is not None)

    native.optimizer.register_step_pre_hook(keep_gradients)
    records: list[dict[str, Any]] = []
    native.run(records.append)

    coefficients = {name: coefficient.value for name, coefficient in sae.get_coefficients().items()}
    assert (penalty is None) == (not coefficients)
    batch = next(paired(make_store(host)))
    output = sae.training_forward_pass(TrainStepInput(batch, coefficients, None, 0, is_logging_step=False))
    output.loss.backward()
    assert abs(output.loss.item() - records[0]["loss"]) < 1e-6
    assert abs(output.losses["mse_loss"].item() - records[0]["mse"]) < 1e-6
    assert expected.keys() == dict(sae.replacement.map.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(sae.replacement.map.get_parameter(name).grad, gradient, rtol=0, atol=1e-6)
        assert gradient.count_nonzero() > 0


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_ends_with_the_weights_of_the_native_trainer(host, tmp_path, kind):
    """Warm-up of the penalty, clipping and revival among them; unit 0 is dead, and nothing but revival moves it."""
    sae, same = (make_sae(host, kind) for _ in range(2))
    for one in (sae, same):
        one.replacement.map.b_enc.data[0] = -50.0
    native = native_trainer(same, make_store(host), tmp_path, revive_after=4 * BATCH)
    native.run()
    trainer = make_trainer(host, sae, dead_feature_window=3)
    trainer.fit()
    revive_(sae.replacement.map, trainer.dead_neurons)  # SAELens leaves the last step's to the step that would follow
    for name, tensor in native.replacement.state_dict().items():
        torch.testing.assert_close(sae.replacement.state_dict()[name], tensor, rtol=0, atol=1e-5)
    assert abs(sae.replacement.map.b_enc[0].item() - (-50 + 0.02 * (STEPS - 3))) < 1e-3


def test_the_coefficient_warms_up_as_the_native_penalty_does(host):
    trainer = make_trainer(host, make_sae(host, "molt-skip"))
    for step in range(STEPS):
        assert trainer.get_coefficients()["penalty"] == pytest.approx(penalty_weight(TANH, step, STEPS))
        trainer.step(next(trainer.data_provider))


# ---- A run, and what is left of it ----


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_learns_and_what_it_saves_is_what_it_trained(host, tmp_path, kind):
    sae = make_sae(host, kind)
    x, y = next(iter(make_store(host)))

    @torch.no_grad()
    def error() -> float:
        return (sae.replacement.output(sae.replacement(x)) - sae.replacement.output(y)).square().mean().item()

    before = error()
    trained = make_trainer(host, sae).fit().eval()
    assert trained is sae
    assert error() < 0.8 * before
    expected = sae.replacement(x)
    sae.save_inference_model(tmp_path / "sae")
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert type(loaded) is (MoltSAE if kind.startswith("molt") else TranscoderSAE)
    torch.testing.assert_close(loaded.replacement(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=0)
    assert 0 < (loaded.encode(x) != 0).float().mean() < 1
    names, metadata = host.names(SITE), loaded.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == (names.tl_input, names.tl_target)
    assert (metadata.hf_hook_name, metadata.hf_hook_name_out) == (names.hf_input, names.hf_target)
    assert metadata.host_fingerprint == host.fingerprint
    assert metadata.training_architecture_details["training_steps"] == STEPS

    save_replacement(sae.replacement, tmp_path / "native", host=host, site=SITE)
    torch.testing.assert_close(load_replacement(tmp_path / "native")[0](x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", RUNS)
def test_it_learns_under_bf16_autocast(host, kind):
    trainer = make_trainer(host, make_sae(host, kind), autocast=True)
    losses = [trainer.step(next(trainer.data_provider)).losses["mse_loss"] for _ in range(STEPS)]
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert losses[-1] < 0.85 * losses[0]


def test_a_run_goes_on_from_its_checkpoint(host, tmp_path):
    whole, stopped = (make_sae(host, "molt-skip") for _ in range(2))
    make_trainer(host, whole).fit()
    store = make_store(host)
    states: list[dict[str, Any]] = []
    half = trainer_config(
        total_training_samples=STEPS * BATCH // 2, checkpoint_path=str(tmp_path), save_final_checkpoint=True
    )
    SAETrainer(
        half,
        stopped,
        data_provider=paired(store),
        save_checkpoint_fn=lambda checkpoint_path: states.append(store.state_dict()),  # noqa: ARG005
    ).fit()

    (checkpoint,) = tmp_path.iterdir()
    loaded = TrainingSAE.load_from_disk(checkpoint)
    assert type(loaded) is MoltTrainingSAE
    assert loaded.cfg.penalty_config == TANH
    store = make_store(host)
    store.load_state_dict(states[0])
    trainer = SAETrainer(trainer_config(), loaded, data_provider=paired(store))
    trainer.load_trainer_state(checkpoint)
    trainer.fit()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


def test_what_saelens_logs_is_of_the_target(host):
    sae = make_sae(host, "transcoder")
    trainer = make_trainer(host, sae)
    batch = next(paired(make_store(host)))
    output = trainer.step(batch)
    logged = trainer.build_train_step_log_dict(output, BATCH)
    target = sae.replacement.output(batch[:, 32:])
    variance = (target - target.mean(0)).square().mean().item()
    assert logged["metrics/explained_variance"] == pytest.approx(1 - logged["losses/mse_loss"] / variance, abs=1e-5)
    assert logged["details/penalty_coefficient"] > 0
    assert logged["metrics/l0"] == pytest.approx((output.feature_acts != 0).sum(-1).float().mean().item())
    assert sae.log_histograms()["weights/norms"].shape == (60,)


def test_the_batches_are_pairs_side_by_side(host):
    for batch, (x, y), _ in zip(paired(make_store(host)), make_store(host), range(3), strict=False):
        assert batch.shape == (BATCH, 64)
        assert torch.equal(batch[:, :32], x)
        assert torch.equal(batch[:, 32:], y)


# ---- The start ----


def test_the_standardisers_and_scales_are_the_stores(host):
    made = make_map("molt", "relu")
    sae = training_sae(made, make_store(host), training_steps=STEPS, moments_tokens=TOKENS, open_rate=0.1)
    x, y = (torch.cat(part) for part in zip(*make_store(host).first(TOKENS), strict=True))
    z = sae.replacement.input(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(32), rtol=0, atol=1e-4)
    torch.testing.assert_close(sae.replacement.output(y).std(0, correction=0), torch.ones(32), rtol=0, atol=1e-4)
    assert sae.replacement.map.encode(z).bool().float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert sae.replacement.map(z).var(0).mean().item() == pytest.approx(0.01, rel=0.05)
    assert made.b_enc.count_nonzero() == 0  # a copy was prepared


def test_its_defaults_are_those_of_the_native_recipes():
    defaults = {name: p.default for name, p in inspect.signature(training_sae).parameters.items()}
    run = MoltRun("")
    assert (defaults["open_rate"], defaults["initial_variance"]) == (run.open_rate, run.initial_variance)
    assert defaults["moments_tokens"] == MOMENTS_TOKENS
    assert saelens_training.CALIBRATION_TOKENS == CALIBRATION_TOKENS


# ---- The registry, and what is refused ----


def test_the_architectures_are_registered_under_their_names_for_inference():
    assert SAE_TRAINING_CLASS_REGISTRY["molt"] == (MoltTrainingSAE, MoltTrainingSAEConfig)
    assert SAE_TRAINING_CLASS_REGISTRY["molt_lens_transcoder"] == (TranscoderTrainingSAE, TranscoderTrainingSAEConfig)
    cfg = MoltTrainingSAEConfig(map=make_map("molt", "relu").config(), penalty=TANH, training_steps=7)
    assert TrainingSAE.from_dict(json.loads(json.dumps(cfg.to_dict()))).cfg == cfg


def test_a_batch_without_targets_is_refused(host):
    sae = make_sae(host, "molt")
    with pytest.raises(ValueError, match=r"d_in \+ d_out = 32 \+ 32 = 64, got a batch of shape \(50, 32\).*paired"):
        SAETrainer(trainer_config(), sae, data_provider=(x for x, _ in make_store(host))).fit()


def test_a_store_that_runs_dry_says_so(host):
    sae = make_sae(host, "molt")
    provider = paired(make_store(host, epochs=1))
    with pytest.raises(ValueError, match=r"served its 1,000 tokens.*total_training_samples"):
        SAETrainer(trainer_config(), sae, data_provider=provider).fit()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "its own standardisers"),
        ({"penalty": {"strength": 1.0}}, "must hold the fields of a Penalty"),
        ({"penalty": Penalty("tanh", norms_every=4)}, "norms_every=4: SAELens' checkpoints have no place"),
        ({"penalty": TANH}, "warms up over 0.5 of the run, got training_steps=0"),
        ({"map": make_map("transcoder", "relu").config()}, "of kind 'molt', got 'transcoder'"),
    ],
)
def test_configs_that_cannot_work_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        MoltTrainingSAEConfig(**{"map": make_map("molt", "relu").config()} | fields)


@pytest.mark.parametrize(
    ("map", "penalty", "complaint"),
    [
        (LinearMap(32, 32), Penalty(), "got a map of kind 'linear'"),
        (make_map("molt", "relu"), L0, "moves the thresholds of a jumprelu gate, and relu has none"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_forward_pass(host, map, penalty, complaint):
    store = make_store(host)
    with pytest.raises(ValueError, match=complaint):
        training_sae(map, store, training_steps=STEPS, penalty=penalty)
    assert store._held == 0

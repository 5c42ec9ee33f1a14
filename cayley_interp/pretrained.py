"""Models by name: bundled with the package, in a run's or a model's folder, on the Hub, or of the published code.

    model = load_pretrained("cayley-tiny-2L-sotu")           # a TransformerBridge
    model = load_pretrained("runs/tiny-20260101", wrap=None)  # the bare CayleyGPT

Whatever is wrong with a file is said before any of it is used.
"""

import importlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from cayley_interp.folder import MODEL_FILES, is_model_folder, read_model
from cayley_interp.model import CayleyGPT

BUNDLED = Path(__file__).parent / "bundled"

PUBLISHED = {
    "markhenry/cayley-small-2L-mlp_in-20B": 3.1671,
    "markhenry/cayley-small-3L-mlp_in-20B": 3.1425,
    "markhenry/cayley-32k-2L-mlp_in": 3.1162,
    "markhenry/cayley-large-2L-mlp_in-20B": 2.7957,
    "markhenry/vanilla-small-20B": 2.8530,
    "markhenry/vanilla-large-20B": 2.5419,
}
"""Validation losses on FineWeb-Edu that the cards of published checkpoints give, re-measured where they were."""

FOREIGN_FILES = ("ckpt.pt", "conventions.json")

Wrap = Literal["bridge", "hooked"] | None


def load_pretrained(
    name_or_path: str | Path,
    *,
    wrap: Wrap = "bridge",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    text: str | None = None,
) -> Any:
    """A model in eval mode, with its tokenizer.

    Args:
        name_or_path: a bundled name (`bundled_models()`), the folder of a run or of a model, a Hub id
            ("owner/name", or "owner/name/file.pt" for one checkpoint of several), or the checkpoint of another code.
        wrap: "bridge" for a TransformerBridge, "hooked" for a HookedTransformer (TransformerLens 3.9), None for the
            bare CayleyGPT.
        device: where to; by default the CPU.
        dtype: of the weights; by default float32. A bottleneck stays in float32 at least: its selection would be mostly
            ties in less.
        revision: branch, tag or commit on the Hub.
        text: English text that decides how a checkpoint of another code is read, 8,192 tokens of it; by default a
            speech that comes with the package.

    Raises:
        FileNotFoundError: nothing of that name, or a folder that lacks a file.
        ValueError: a file that is damaged, does not fit, or cannot be read safely; `wrap` of another value; `dtype` not
            a floating-point one.
        ImportError: the library that `wrap` needs is missing or of a version that cannot.
    """
    check_wrap(wrap)  # before a model is read, which may take minutes
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, such as torch.float32, got {dtype}")
    source = locate(name_or_path, revision)
    if is_model_folder(source):
        model = read_model(source)
    else:
        from cayley_interp.foreign import load_foreign

        text = (BUNDLED / "speech.txt").read_text() if text is None else text
        repository = "/".join(str(name_or_path).split("/")[:2])
        model = load_foreign(source, text=text, published_loss=PUBLISHED.get(repository))
    cast(model, torch.float32 if dtype is None else dtype)
    return wrapped(model.to(device or "cpu").eval(), wrap, str(name_or_path))


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(folder.parent.name for folder in BUNDLED.glob("*/model.safetensors"))


def cast(model: CayleyGPT, dtype: torch.dtype) -> None:
    """Weights to `dtype`; a bottleneck to float32 at least, without passing through less."""
    kept = [{name: tensor.clone() for name, tensor in sae.state_dict().items()} for sae in model.bottlenecks()]
    model.to(dtype)
    for sae, state in zip(model.bottlenecks(), kept, strict=True):
        sae.to(dtype if dtype == torch.float64 else torch.float32).load_state_dict(state)


def wrapped(model: CayleyGPT, wrap: Wrap, name: str) -> Any:
    """The model as `wrap` says.

    Raises:
        ValueError, ImportError: what `check_wrap` raises.
    """
    check_wrap(wrap)
    if wrap is None:
        return model
    if wrap == "bridge":
        from cayley_interp.lens import to_bridge

        return to_bridge(model, name)
    from cayley_interp.hooked import to_hooked_transformer

    return to_hooked_transformer(model, name)


def check_wrap(wrap: Wrap) -> None:
    """Whether a model can be wrapped so.

    Raises:
        ValueError: there is no such wrap.
        ImportError: TransformerLens is missing, or, for a HookedTransformer, is version 4.
    """
    if wrap not in ("bridge", "hooked", None):
        raise ValueError(f'wrap must be "bridge", "hooked" or None, got {wrap!r}')
    if wrap is None:
        return
    try:
        for module in ("transformer_lens", "cayley_interp.lens" if wrap == "bridge" else "cayley_interp.hooked"):
            importlib.import_module(module)
    except ImportError as error:
        raise ImportError(_advice(wrap, error)) from error


def _advice(wrap: str, error: ImportError) -> str:
    if error.name == "transformer_lens":
        return (
            f'wrap="{wrap}" needs TransformerLens: pip install "cayley-interp[lens]"; wrap=None gives the bare model '
            "without it"
        )
    installed = f"TransformerLens {version('transformer-lens')}"
    if wrap == "hooked" and (error.name or "").startswith("transformer_lens"):
        return (
            f'{installed} has no HookedTransformer, which version 4 removed: use wrap="bridge", which has the same '
            'hooks, or pip install "transformer-lens<4"'
        )
    return f'wrap="{wrap}" does not work with {installed} ({error}): pip install -U "cayley-interp[lens]"'


# ---- Where a name leads ----


def locate(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, or the checkpoint file of another code.

    Raises:
        FileNotFoundError: there is nothing of that name, here or on the Hub, or a folder holds no model.
        ValueError: a folder holds several foreign checkpoints.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in bundled_models():
        return BUNDLED / name
    if path.is_file():
        return _of_file(path)
    if path.is_dir():
        return model_in(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        return download(name, revision)
    raise FileNotFoundError(
        f"there is no model {name!r}: expected a bundled name ({', '.join(bundled_models())}), the folder of a run or "
        "of a model, a checkpoint file, or a Hub id owner/name"
    )


def _of_file(file: Path) -> Path:
    """The folder whose weights a file is, else the file."""
    return file.parent if file.name == "model.safetensors" and is_model_folder(file.parent) else file


def model_in(folder: Path) -> Path:
    """What there is to load in a folder: a run's model, a model, or a foreign checkpoint."""
    from cayley_interp.foreign import find_checkpoint

    if is_model_folder(folder):
        return folder
    if (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir():
        if (folder / "model").is_dir():
            return folder / "model"
        raise FileNotFoundError(
            f"the run {folder} has no model/ yet: finish it with python training/train_cayley.py --resume {folder}"
        )
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder} holds no model: expected config.json with model.safetensors, a run's model/, or a ckpt.pt"
        )
    return checkpoint


def download(name: str, revision: str | None) -> Path:
    """The model of a Hub id, from the Hub or from its local cache.

    Raises:
        FileNotFoundError: the Hub cannot be reached, has no such repository or revision, or no such file in it.
    """
    from huggingface_hub import snapshot_download

    owner, repository, *file = name.split("/")
    wanted = [*MODEL_FILES, *FOREIGN_FILES, *file]
    try:
        folder = Path(snapshot_download(f"{owner}/{repository}", revision=revision, allow_patterns=wanted))
    except Exception as error:  # its HTTP library, and with it the errors of a lost connection, change with its version
        raise FileNotFoundError(
            f"{name!r} is not a bundled model ({', '.join(bundled_models())}), not a folder here, and could not be "
            f"fetched from the Hub{f' at {revision}' if revision else ''}: {error}"
        ) from error
    if file and (folder / file[0]).is_file():
        return _of_file(folder / file[0])
    if file or not any((folder / weights).is_file() for weights in ("model.safetensors", "ckpt.pt")):
        raise FileNotFoundError(
            f"the Hub repository {owner}/{repository} has no {file[0] if file else 'model.safetensors or ckpt.pt'}"
            + _other_checkpoints(f"{owner}/{repository}", revision)
        )
    return model_in(folder)


def _other_checkpoints(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import list_repo_files

    try:
        names = [n for n in list_repo_files(repo_id, revision=revision) if n.endswith((".pt", ".safetensors"))]
    except Exception:  # the advice is extra: whatever keeps it from being made must not hide the error
        return ""
    return f"; load one of its checkpoints as {', '.join(f'{repo_id}/{n}' for n in names[:8])}" if names else ""


def push_to_hub(
    name_or_path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a run's model or a model's folder, card included, after reading it whole; returns the commit's address.

    Args:
        name_or_path: as for `load_pretrained`, but not the checkpoint of another code.
        repo_id: "owner/name"; made if it does not exist.
        private: whether a repository that is made is private.
        token: of the Hub; by default the one that `hf auth login` left.
        revision: branch to commit to, made if it does not exist; by default main.

    Raises:
        FileNotFoundError, ValueError: what `load_pretrained` raises; nothing is uploaded then.
    """
    from huggingface_hub import HfApi

    folder = locate(name_or_path)
    if not is_model_folder(folder):
        raise ValueError(f"{folder} is not a model's folder: save_pretrained it first")
    read_model(folder)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(MODEL_FILES),
        revision=revision,
        commit_message="upload model",
    )
    return commit.commit_url

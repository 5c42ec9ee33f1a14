"""Where the files of a transformers model are, and reading them whole and safely."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn


def locate(name: str, revision: str | None) -> Path:
    """The folder of a host's files, fetched from the Hub where it is not here.

    Raises:
        FileNotFoundError: there is nothing of that name, here or on the Hub, or no model in it.
        ValueError: a revision of something that does not come from the Hub.
        ImportError, OSError, ValueError: what `gemma_3_270m` raises.
    """
    if name == "gemma-3-270m":
        from molt_lens.gemma import gemma_3_270m

        folder = gemma_3_270m()
    elif Path(name).is_dir():
        folder = Path(name)
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        return _download(name, revision)
    else:
        raise FileNotFoundError(f"there is no host {name!r}: expected gemma-3-270m, a folder, or a Hub id owner/name")
    if revision is not None:
        raise ValueError(f"a revision is one of a Hub id, but {name!r} is here: leave it out")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: expected config.json with model.safetensors")
    return folder


def fetch(
    repo_id: str, revision: str | None, *, wanted: list[str], unwanted: list[str] | None = None, otherwise: str
) -> Path:
    """The files of a Hub repository that match `wanted`, in the cache of the Hub's client.

    Raises:
        FileNotFoundError: beginning with `otherwise`, what the name could have been besides; and why it failed.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # its HTTP library, and with it the errors of a lost connection, change with its version
        raise FileNotFoundError(
            f"{otherwise} and could not be fetched from the Hub{f' at {revision}' if revision else ''}: {error}"
        ) from error


def _download(name: str, revision: str | None) -> Path:
    # Nothing of a repository but the transformers model at its top: no pickles, no copies for other programs.
    wanted = ["*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja"]
    otherwise = f"{name!r} is not gemma-3-270m, not a folder here,"
    folder = fetch(name, revision, wanted=wanted, unwanted=["*/*"], otherwise=otherwise)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the Hub repository {name} has no config.json")
    return folder


def read_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a folder.

    Raises:
        FileNotFoundError: the folder has none.
    """
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        # transformers would make one with an empty vocabulary.
        raise FileNotFoundError(f"{folder} has no tokenizer.json: give a tokenizer, load_host(..., tokenizer=...)")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def read_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The transformers model of a folder, from safetensors only and without running any code of its own.

    Raises:
        ValueError: the weights lack a tensor that the model has.
    """
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model, loading = read
    if missing := sorted(loading["missing_keys"]):
        # transformers would go on with random values in their place.
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} tensors that the model has ({', '.join(missing[:4])} ...): "
            "the files are not whole, or not of this config.json"
        )
    return model

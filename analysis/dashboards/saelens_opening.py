"""A SAELens SAE opened for its dashboards: its model in a bridge, the text, and what its pages say besides."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.dashboards.feature_page import FeatureExtras
from analysis.dashboards.host_text import N_CTX, text_of_host
from analysis.dashboards.opening import Opened
from analysis.dashboards.replacement import ReplacementSource
from analysis.dashboards.replacement_opening import check_layer, opened_of
from analysis.dashboards.saelens import SaelensSource
from analysis.dashboards.text import one_window, text_of_speeches
from analysis.hosts import open_host
from analysis.page import flatten
from analysis.tokens import token_strings
from cayley_interp.folder import is_model_folder
from cayley_interp.pretrained import bundled_models, load_pretrained
from molt_lens.fingerprint import digest_of_tensors, fingerprint_of_module
from molt_lens.hosts import Host, Site, special_ids

SPEECHES = "State of the Union speeches"


def open_sae(
    name: str, *, layers: Sequence[int] | None = None, tokens: int, device: str = "cpu", model: str | None = None
) -> Opened:
    """An SAE by its folder, or by RELEASE:ID where SAELens finds it; a MOLT or transcoder of ours as what it is.

    Args:
        layers: where given, the SAE's own must be among them.
        model: by default the one that its metadata name.

    Raises:
        FileNotFoundError: no such SAE.
        ValueError: what `SaelensSource` and `text_of_speeches` raise, or metadata that name no model.
        ImportError: SAELens is not installed.
    """
    sae = load_sae(name, device)
    model = model or sae.cfg.metadata.model_name
    if not model:
        raise ValueError(f"the metadata of {name} name no model")
    if hasattr(sae, "replacement"):
        return _open_replacement(sae, name, open_host(_local(model), device), layers, tokens)
    bridge = bridge_of(model, device)
    source = SaelensSource(bridge, sae, name)
    check_layer(name, source.groups[0].layer, layers)
    return opened_of_sae(source, model, tokens)


def load_sae(name: str, device: str) -> Any:
    """
    Raises:
        FileNotFoundError: no such SAE.
        ImportError: SAELens is not installed.
    """
    from importlib import import_module

    for package in ("cayley_interp", "molt_lens"):
        import_module(f"{package}.saelens")  # each tells SAELens of its architectures
    from sae_lens import SAE

    if Path(name).is_dir():
        return SAE.load_from_disk(name, device=device).eval()
    release, _, sae_id = name.partition(":")
    try:
        return SAE.from_pretrained(release, sae_id, device=device).eval()
    except Exception as error:  # an unknown id, a lost connection: what SAELens and its HTTP library raise changes
        raise FileNotFoundError(
            f"{name} is no folder, and SAELens does not find the SAE {sae_id!r} of the release {release!r}: {error}"
        ) from error


def bridge_of(model: str, device: str) -> Any:
    """A model in TransformerLens' bridge: a Cayley-GPT, the packaged Gemma 3 270M, or what TransformerLens boots.

    Raises:
        FileNotFoundError: TransformerLens does not find it.
    """
    if model in bundled_models() or is_model_folder(Path(model)) or is_model_folder(Path(model) / "model"):
        return load_pretrained(model, device=device)
    from transformer_lens.model_bridge import TransformerBridge

    if _local(model) == "gemma-3-270m":
        host = open_host("gemma-3-270m", device)
        name = "google/gemma-3-270m"
        return TransformerBridge.boot_transformers(name, hf_model=host.model, tokenizer=host.tokenizer, device=device)
    try:
        return TransformerBridge.boot_transformers(model, device=device)
    except Exception as error:  # of transformers, its HTTP library or TransformerLens
        raise FileNotFoundError(f"TransformerLens does not boot the model {model!r}: {error}") from error


def opened_of_sae(source: SaelensSource, model: str, tokens: int) -> Opened:
    """A source with its pages; the SAE may have been trained on other text than speeches."""
    sae, tokenizer = source.sae, source.bridge.tokenizer
    special = torch.tensor(sorted(special_ids(tokenizer)), dtype=torch.int64)
    bos = [tokenizer.bos_token_id] if sae.cfg.metadata.prepend_bos and tokenizer.bos_token_id is not None else []
    n_ctx = min(N_CTX, source.bridge.cfg.n_ctx, sae.cfg.metadata.context_size or N_CTX)

    def keep(ids: Tensor) -> Tensor:
        kept = ~torch.isin(ids, special)
        kept[..., 0] = False  # the attention sink, whatever stands there
        return kept

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    W_enc = getattr(sae, "W_enc", None)
    return Opened(
        kind="sae",
        source=source,
        text=text_of_speeches(_packer(ids_of, bos, n_ctx), keep, n_ctx, tokens),
        strings=token_strings(tokenizer, source.readout.W_U.shape[0]),
        fingerprint=f"{fingerprint_of_module(source.bridge)} {digest_of_tensors(sae.state_dict())}",
        extras=FeatureExtras(sae.W_dec, None if W_enc is None else W_enc.T),
        text_of=lambda prompt: one_window((bos + ids_of(prompt))[:n_ctx], keep),
        about=_about(source, model),
        settings=flatten({k: v for k, v in sae.cfg.to_dict().items() if k != "metadata"}),
    )


def _packer(ids_of: Callable[[str], list[int]], bos: list[int], n_ctx: int) -> Callable[[str], Iterator[Tensor]]:
    def pack(text: str) -> Iterator[Tensor]:
        ids, room = ids_of(text), n_ctx - len(bos)
        for start in range(0, len(ids) - room + 1, room):
            yield torch.tensor(bos + ids[start : start + room])

    return pack


def _about(source: SaelensSource, model: str) -> list[tuple[str, str]]:
    rows = [
        ("model", model),
        ("architecture", source.sae.cfg.architecture()),
        ("reads", source.hook_name),
        ("writes", source.hook_name_out),
        ("features", f"{source.groups[0].n_units:,}"),
        ("text", SPEECHES),
    ]
    if not source.has_direct_path:
        where = f"{source.hook_name_out} is not added to the residual stream as it stands"
        rows.append(("logits", f"none are shown: {where}, so there is no direct path"))
    if source.centres:
        rows.append(("activations", "with their mean taken away, as of the model that it was trained on"))
    return rows


def _open_replacement(sae: Any, name: str, host: Host, layers: Sequence[int] | None, tokens: int) -> Opened:
    metadata = sae.cfg.metadata
    if metadata.host_fingerprint not in (None, host.fingerprint):
        raise ValueError(f"{name} was made for {metadata.model_name}, and {host.name} has other weights")
    site = site_of(host, metadata.hf_hook_name, metadata.hf_hook_name_out)
    check_layer(name, site.layer, layers)
    source = ReplacementSource(host, site, sae.replacement, name)
    return opened_of(source, None, text_of_host(host, tokens), SPEECHES)


def site_of(host: Host, hf_input: str, hf_target: str) -> Site:
    """The site of these names.

    Raises:
        ValueError: the host has none.
    """
    for layer in range(host.n_layers):
        for reads in ("pre_norm_out", "pre_norm_in"):
            for target in ("mlp_out", "post_norm_out"):
                try:
                    names = host.names(site := Site(layer, reads, target))
                except ValueError:
                    continue
                if (names.hf_input, names.hf_target) == (hf_input, hf_target):
                    return site
    raise ValueError(f"{host.name} has no site from {hf_input} to {hf_target}")


def _local(model: str) -> str:
    return "gemma-3-270m" if model == "google/gemma-3-270m" else model

"""Hosts from folders and the Hub: whole, from safetensors only, and with their fingerprint."""

import hashlib
import json
import shutil

import pytest
import torch

from molt_lens.hosts import load_host
from tests.cayley_interp.hub import Hub
from tests.molt_lens.host_models import BOS_ID, tiny_host, tiny_model, tiny_tokenizer

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "host"
    tiny_model("gemma3").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_folder_gives_the_same_host(folder):
    host, module = load_host(folder), tiny_host("gemma3")
    assert torch.equal(host.logits(IDS), module.logits(IDS))
    assert (host.name, host.bos_id, host.tokenize("a b")) == (str(folder), BOS_ID, [97, 32, 98])
    assert load_host(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_fingerprint_is_the_weights(folder):
    host = load_host(folder)
    assert host.fingerprint == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    tiny_model("gemma3", seed=1).save_pretrained(folder)
    assert load_host(folder).fingerprint != host.fingerprint

    module = tiny_host("gemma3")
    assert module.fingerprint == tiny_host("gemma3").fingerprint
    assert module.fingerprint != tiny_host("gemma3", seed=1).fingerprint
    changed = tiny_model("gemma3")
    with torch.no_grad():
        changed.get_input_embeddings().weight[3, 4] += 1e-3  # pyright: ignore[reportOperatorIssue, reportIndexIssue]
    assert module.fingerprint != load_host(changed).fingerprint


def test_weights_in_several_files(folder, tmp_path):
    several = tmp_path / "several"
    tiny_model("gemma3").save_pretrained(several, max_shard_size="50KB")
    shutil.copy(folder / "tokenizer.json", several)
    shutil.copy(folder / "tokenizer_config.json", several)
    files = sorted(several.glob("model-*.safetensors"))
    assert len(files) > 1
    host = load_host(several)
    assert torch.equal(host.logits(IDS), load_host(folder).logits(IDS))
    assert host.fingerprint == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {files[1].name}"):
        load_host(several)


def test_a_pickle_is_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"Weights in a pickle .* are not read"):
        load_host(folder)


def test_weights_that_lack_a_tensor_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "layer_types": None}))
    with pytest.raises(ValueError, match=r"lack \d+ tensors .*model.layers.3"):
        load_host(folder)


def test_folders_that_hold_no_host(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected config\.json"):
        load_host(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no host '\./nowhere'"):
        load_host("./nowhere")
    with pytest.raises(ValueError, match="a revision is one of a Hub id"):
        load_host(folder, revision="main")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="give a tokenizer"):
        load_host(folder)
    assert load_host(folder, tokenizer=tiny_tokenizer()).bos_id == BOS_ID


HUB_CODE = """
from molt_lens.hosts import load_host
host = load_host("owner/tiny", revision="v2")
print(host.name, host.fingerprint, host.bos_id)
try:
    load_host("owner/none")
except FileNotFoundError as error:
    print("owner/none" in str(error), "could not be fetched" in str(error))
"""


@pytest.mark.slow
def test_a_hub_id_is_fetched_without_its_pickles(folder, tmp_path):
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with Hub() as hub:
        hub.commit("owner/tiny", "v2", files | {"pytorch_model.bin": b"x", "onnx/model.safetensors": b"x"})
        done = hub.python(HUB_CODE, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert done.stdout.splitlines() == [f"owner/tiny {digest} {BOS_ID}", "True True"]
    assert not [request for request in hub.requests if "pytorch_model" in request or "onnx" in request]

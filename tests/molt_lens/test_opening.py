"""Opening a replacement by whatever it is called."""

import pytest
import torch

from molt_lens import Replacement, matched_map
from molt_lens.folder import save_replacement
from molt_lens.gemma_scope import load_gemma_scope
from molt_lens.hosts import Site, load_host
from molt_lens.opening import bundled_replacements, open_replacement
from molt_lens.packing import keep_mask
from tests.molt_lens.host_models import tiny_host
from tests.molt_lens.test_gemma import PROSE
from tests.molt_lens.test_gemma_scope import config, params, write

SITE = Site(1, target="post_norm_out")


def test_a_run_and_its_model_are_the_same(tmp_path):
    host, replacement = tiny_host("gemma3"), Replacement(matched_map("molt", 32, 32, n=1, gate="topk:4")).eval()
    save_replacement(replacement, tmp_path / "run" / "model", host=host, site=SITE)
    (tmp_path / "run" / "config.json").write_text("{}")
    for name in (tmp_path / "run", str(tmp_path / "run" / "model")):
        found, record = open_replacement(name, host)
        assert record.site == SITE
        assert all(
            torch.equal(a, b)
            for a, b in zip(found.state_dict().values(), replacement.state_dict().values(), strict=True)
        )


def test_a_gemma_scope_transcoder_is_opened_by_its_id_and_by_its_folder(tmp_path):
    host, folder = tiny_host("gemma3"), write(tmp_path / "scope", params(), config())
    expected = load_gemma_scope(folder).on(host)[0]
    for name in (folder, f"gemma-scope-2:{folder}"):
        found, record = open_replacement(name, host)
        assert record.site == SITE
        x = torch.randn(5, 32)
        assert torch.equal(found(x), expected(x))


@pytest.mark.gemma
def test_the_replacement_of_the_package_stands_in_for_its_layer():
    assert bundled_replacements() == ["molt-gemma-3-270m-L9-2M"]
    host = load_host("gemma-3-270m")
    replacement, record = open_replacement("molt-gemma-3-270m-L9-2M", host)
    assert {parameter.dtype for parameter in replacement.parameters()} == {torch.float32}
    ids = torch.tensor([host.tokenizer(PROSE).input_ids])
    x, y = (acts[keep_mask(host, ids)] for acts in host.capture(record.site, ids))
    with torch.no_grad():
        error = (y - replacement(x)).square().sum() / (y - y.mean(0)).square().sum()
        opened = (replacement.encode(x) != 0).sum(1).float().mean()
    assert error < 0.4  # prose, where it was trained on speeches: there it is 0.21
    assert 3 < opened < 5


def test_what_cannot_be_opened_says_why(tmp_path):
    host = tiny_host("gemma3")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no replacement"):
        open_replacement(tmp_path, host)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_replacement(tmp_path / "absent", host)
    made = Replacement(matched_map("linear", 32, 32, n=1, gate="relu"))
    save_replacement(made, tmp_path / "other", host=tiny_host("gemma3", seed=1), site=SITE)
    with pytest.raises(ValueError, match="has other weights"):
        open_replacement(tmp_path / "other", host)

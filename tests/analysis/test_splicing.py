"""Sums over sequences against forward passes written out by hand."""

import pytest
import torch

from analysis.splicing import spliced_sums
from molt_lens import Replacement, matched_map
from molt_lens.hosts import Site
from molt_lens.packing import keep_mask, pack_documents
from tests.molt_lens.host_models import tiny_host, tiny_text

SITE = Site(1, target="post_norm_out")


def test_sums_are_those_of_a_hook_by_hand_one_map_not_disturbing_the_other():
    host = tiny_host("gemma3")
    sequences = torch.stack(list(pack_documents([tiny_text(400)], host, 40)))
    torch.manual_seed(0)
    maps = {
        name: Replacement(matched_map("transcoder", 32, 32, n=1, gate=name)).eval() for name in ("topk:3", "topk:9")
    }
    sums = spliced_sums(host, {name: {SITE: map} for name, map in maps.items()}, sequences)
    keep, module = keep_mask(host, sequences), host.modules(SITE).target_module
    own, x = host.logits(sequences).double().log_softmax(-1), host.capture(SITE, sequences)[0]
    predicted, targets = keep[:, 1:], sequences[:, 1:, None]
    for name, map in maps.items():
        written = map(x)
        handle = module.register_forward_hook(
            lambda m, a, y, written=written: torch.where(keep[..., None], written, y)  # noqa: ARG005
        )
        other = host.logits(sequences).double().log_softmax(-1)
        handle.remove()
        figures = {
            "ce_host": -own[:, :-1].gather(-1, targets)[..., 0],
            "ce": -other[:, :-1].gather(-1, targets)[..., 0],
            "kl": (own.exp() * (own - other)).sum(-1)[:, :-1],
            "top1": (own.argmax(-1) == other.argmax(-1))[:, :-1].double(),
        }
        assert sums[name].tokens.tolist() == predicted.sum(1).tolist()
        for figure, values in figures.items():
            expected = (values * predicted).sum(1)
            torch.testing.assert_close(getattr(sums[name], figure), expected, rtol=1e-4, atol=1e-5)


def test_errors_name_what_disagrees():
    host = tiny_host("gemma3")
    sequences = torch.stack(list(pack_documents([tiny_text(100)], host, 40)))
    fitting, narrow = (Replacement(matched_map("transcoder", d, d, n=1, gate="topk:3")).eval() for d in (32, 16))
    special = torch.full((2, 10), host.bos_id)
    for map, site, ids, message in (
        (narrow, SITE, sequences, "Site.* maps 16 to 16 dimensions, and Gemma3ForCausalLM has d_model=32"),
        (fitting, Site(9), sequences, "Gemma3ForCausalLM has layers 0 to 2, got layer 9"),
        (fitting, SITE, sequences + 300, "ids from .* are outside the vocabulary of Gemma3ForCausalLM, 0 to 259"),
        (fitting, SITE, sequences[:0], "the 0 sequences of 40 tokens have none to predict"),
        (fitting, SITE, sequences[:, :1], r"two tokens or more, got \(\d+, 1\)"),
        (fitting, SITE, special, "the 2 sequences of 10 tokens have none to predict: .*tokens of Gemma3ForCausalLM"),
    ):
        with pytest.raises(ValueError, match=message):
            spliced_sums(host, {"a map": {site: map}}, ids)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no norm behind its MLPs, so no post_norm_out"):
        spliced_sums(tiny_host("llama"), {"a map": {SITE: fitting}}, sequences)


def test_losses_that_are_not_finite_name_the_map():
    host = tiny_host("gemma3")
    sequences = torch.stack(list(pack_documents([tiny_text(100)], host, 40)))
    with pytest.raises(ValueError, match=r"Gemma3ForCausalLM with a broken map spliced in .* not finite"):
        spliced_sums(host, {"a broken map": {SITE: lambda x: x * torch.nan}}, sequences)

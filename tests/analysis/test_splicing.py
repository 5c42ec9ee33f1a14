"""Sums over sequences against `measure_behaviour`, the definition over all tokens."""

import pytest
import torch

from analysis.behaviour import measure_behaviour
from analysis.splicing import spliced_sums
from molt_lens import Replacement, matched_map
from molt_lens.hosts import Site
from molt_lens.packing import pack_documents
from tests.molt_lens.host_models import tiny_host, tiny_text

SITE = Site(1, target="post_norm_out")


def test_sums_are_those_of_the_definition_one_map_not_disturbing_the_other():
    host = tiny_host("gemma3")
    sequences = torch.stack(list(pack_documents([tiny_text(400)], host, 40)))
    torch.manual_seed(0)
    maps = {
        name: Replacement(matched_map("transcoder", 32, 32, n=1, gate=name)).eval() for name in ("topk:3", "topk:9")
    }
    sums = spliced_sums(host, {name: {SITE: map} for name, map in maps.items()}, sequences)
    for name, map in maps.items():
        expected = measure_behaviour(host, {SITE: map}, sequences, {SITE: torch.zeros(32)})
        own = sums[name]
        assert own.tokens.sum() == expected.tokens
        for total, mean in (
            (own.ce_host, expected.ce_host),
            (own.ce, expected.ce_spliced),
            (own.kl, expected.kl),
            (own.top1, expected.top1),
        ):
            assert len(total) == len(sequences)
            assert (total.sum() / expected.tokens).item() == pytest.approx(mean, rel=1e-6)


def test_losses_that_are_not_finite_name_the_map():
    host = tiny_host("gemma3")
    sequences = torch.stack(list(pack_documents([tiny_text(100)], host, 40)))
    with pytest.raises(ValueError, match="with a broken map spliced in gives losses that are not finite"):
        spliced_sums(host, {"a broken map": {SITE: lambda x: x * torch.nan}}, sequences)

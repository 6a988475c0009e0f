"""What the drafter stores of steps in which nothing drafts."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.engine.attention.cpu import CPUTreeAttention
from vllm_ctc_spec.engine.proposer import MOST_REMEMBERED, CTCProposer, VerifiedRows

BLOCK_SIZE = 32


def proposer() -> CTCProposer:
    config = CTCDrafterConfig(
        hidden_size=32, vocab_size=11, num_attention_heads=2, num_key_value_heads=1, head_dim=32, condition_rank=4
    )
    torch.manual_seed(0)
    made = CTCProposer.__new__(CTCProposer)
    made.drafter = CTCDrafter(config).eval().requires_grad_(False)
    made.cache_layers = [SimpleNamespace(kv_cache=torch.zeros(2, 1, BLOCK_SIZE, 64))]
    made.attention = CPUTreeAttention([])
    made.remembered = []
    return made


def steps(count: int) -> list[VerifiedRows]:
    torch.manual_seed(1)
    return [VerifiedRows(torch.randn(1, 32), torch.tensor([i]), torch.tensor([i])) for i in range(count)]


def test_rows_that_were_remembered_are_stored_as_if_at_once() -> None:
    at_once, later = proposer(), proposer()
    for rows in steps(5):
        at_once.propose(rows, None)
        later.remember(rows)
    assert not later.cache_layers[0].kv_cache.any()
    later._store_remembered()
    stored = later.cache_layers[0].kv_cache
    assert stored.any()
    torch.testing.assert_close(stored, at_once.cache_layers[0].kv_cache)
    later._store_remembered()
    assert torch.equal(later.cache_layers[0].kv_cache, stored)


def test_not_more_is_remembered_than_that() -> None:
    made = proposer()
    for rows in steps(MOST_REMEMBERED + 3):
        made.remember(rows)
    assert made.cache_layers[0].kv_cache.any()
    assert len(made.remembered) == 3

"""The drafter's keys and values of steps without drafts."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.engine.attention.cpu import ISA, CPUTreeAttention
from vllm_ctc_spec.engine.drafting import MAX_DEFERRED_ROWS, CTCProposer, VerifiedRows

BLOCK_SIZE = 32


def proposer() -> CTCProposer:
    config = CTCDrafterConfig(
        hidden_size=32, vocab_size=11, num_attention_heads=2, num_key_value_heads=1, head_dim=32, condition_rank=4
    )
    torch.manual_seed(0)
    made = CTCProposer.__new__(CTCProposer)
    made.drafter = CTCDrafter(config).eval().requires_grad_(False)
    made.cache_layers = [SimpleNamespace(kv_cache=torch.zeros(2, 1, BLOCK_SIZE, 64), isa=ISA)]
    made.attention = CPUTreeAttention(made.cache_layers)
    made.deferred, made.num_deferred, made.defers = [], 0, True
    return made


def steps(slots: list[int]) -> list[VerifiedRows]:
    torch.manual_seed(1)
    return [VerifiedRows(torch.randn(1, 32), torch.tensor([i]), torch.tensor([slot])) for i, slot in enumerate(slots)]


def test_deferred_rows_are_stored_as_if_at_once() -> None:
    """Slot 1 moves to another request between the steps."""
    at_once, later = proposer(), proposer()
    *before, last = steps([0, 1, 2, 1, 3])
    for rows in before:
        at_once.propose(rows, None)
        later.defer(rows)
    assert not later.cache_layers[0].kv_cache.any()
    at_once.propose(last, None)
    later.propose(last, None)
    stored = later.cache_layers[0].kv_cache
    assert stored.any() and not later.deferred
    torch.testing.assert_close(stored, at_once.cache_layers[0].kv_cache)


def test_deferred_rows_are_stored_at_the_limit() -> None:
    made = proposer()
    for rows in steps([0] * (MAX_DEFERRED_ROWS + 3)):
        made.defer(rows)
    assert made.cache_layers[0].kv_cache.any()
    assert len(made.deferred) == 3


def test_rows_are_stored_at_once_where_kv_groups_share_memory() -> None:
    made = proposer()
    made.defers = False
    [rows] = steps([1])
    made.defer(rows)
    assert made.cache_layers[0].kv_cache.any() and not made.deferred

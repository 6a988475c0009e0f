"""vLLM's thinking budgets, counted in each request's own row.

vLLM counts in a speculative mode where there are draft tokens: it then looks for a row per draft token, which the walk
does not hand to the sampler, and forces the end of every thought in row 0. The walk asks as plain decoding does, one
row per request and token, so that the plain mode is right for it, with drafts and without.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder


class ThinkingBudgets(ThinkingBudgetStateHolder):
    def sync_batch(self, batch_update: BatchUpdate | None) -> None:
        # vLLM 0.32 does not name a row as removed where another request moves into it. If that one has no budget, it
        # would go on with the budget of the one that has ended.
        if batch_update is not None:
            freed = [to for _, to, how in batch_update.moved if how == MoveDirectionality.UNIDIRECTIONAL]
            batch_update = dataclasses.replace(batch_update, removed=[*batch_update.removed, *freed])
        super().sync_batch(batch_update)


def thinking_budgets(
    reasoning_config: Any, max_num_seqs: int, num_spec_tokens: int, *args: Any
) -> ThinkingBudgets | None:
    """In place of vLLM's `maybe_create_thinking_budget_state_holder`."""
    return None if reasoning_config is None else ThinkingBudgets(reasoning_config, max_num_seqs, 0, *args)

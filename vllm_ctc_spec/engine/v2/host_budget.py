"""The adaptive node budget on Model Runner V2, where the scheduler waits for each step's tokens.

It reads the trees' probabilities on the host, once after each step that drafts. With asynchronous scheduling the host
has scheduled the next step by then, so there the node budget is fixed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.outputs import DraftTokenIds

from vllm_ctc_spec.engine.adaptive.budget import DraftPlan
from vllm_ctc_spec.engine.adaptive.control import BudgetControl, EndedStep
from vllm_ctc_spec.engine.host_tree import EMPTY_TREE, HostTree, unpack
from vllm_ctc_spec.engine.v2.device_trees import TreeStep


class HostBudget:
    def __init__(self, control: BudgetControl) -> None:
        self.control = control
        self.trees: dict[str, HostTree] = {}
        """Of each request that the last step drafted for, with the nodes that were chosen."""

    def plan(self, batch: Any) -> DraftPlan | None:
        return self.control.plan(batch.num_reqs)

    def end_step(self, batch: Any, step: TreeStep | None, plan: DraftPlan | None, packed: Tensor | None) -> None:
        """packed: trees [R, 4 N + 1] of `host_tree.pack`, of all requests of the batch; None if nothing was drafted."""
        num_accepted, expected = 0, 0.0
        if step is not None:
            num_accepted = int(step.accepted.num_accepted.sum())
            last = [self.trees.get(request, EMPTY_TREE) for request in batch.req_ids]
            expected = sum(sum(tree.probabilities[:count]) for tree, count in zip(last, step.counts))
        # Trees of requests whose prompt is not read to its end are of no use.
        lens = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        drafting = np.flatnonzero(lens >= batch.prefill_len_np).tolist() if packed is not None else []
        trees = unpack(packed[drafting]) if packed is not None and drafting else []
        is_decode = batch.num_tokens == batch.num_reqs + batch.num_draft_tokens
        self.control.observe(
            EndedStep(batch.req_ids, bool(trees), batch.num_draft_tokens, num_accepted, expected, is_decode)
        )
        if plan is not None:
            trees = self.control.cut(plan, trees)
        self.trees = {batch.req_ids[index]: tree for index, tree in zip(drafting, trees)}

    def cut(self, drafts: DraftTokenIds) -> DraftTokenIds | None:
        """What vLLM tells the scheduler, with as many drafts for each request as were chosen; None without any."""
        chosen = [len(self.trees.get(request, EMPTY_TREE).tokens) for request in drafts.req_ids]
        if not any(chosen):
            return None
        return DraftTokenIds(
            drafts.req_ids, [tokens[:count] for tokens, count in zip(drafts.draft_token_ids, chosen, strict=True)]
        )

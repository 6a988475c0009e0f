"""The adaptive node budget on Model Runner V2.

Results of a step are copied to the host behind it. Where the scheduler waits for each step they are read at its end,
and the nodes of its trees are chosen. With asynchronous scheduling they are read at the end of the next step, when the
device has work again. The scheduler learns numbers of nodes with that step's output, and schedules by them a step whose
trees are not drafted yet. So they are chosen by the mean of each request's latest trees.

Letters: R requests, N node budget.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import DraftTokenIds

from vllm_ctc_spec.engine.adaptive.budget import DraftPlan
from vllm_ctc_spec.engine.adaptive.control import BudgetControl, EndedStep
from vllm_ctc_spec.engine.host_tree import EMPTY_TREE, HostTree, unpack
from vllm_ctc_spec.engine.v2.device_trees import TreeStep
from vllm_ctc_spec.engine.v2.scheduler import NodeCounts

LATEST = 0.25
"""Weight of a request's latest tree in the mean of its trees."""


@dataclass(frozen=True)
class _Results:
    """Of a step, on their way to the host."""

    requests: list[str]
    drafting: list[int]
    """Indices of the requests that have a tree of use."""
    counts: np.ndarray
    """[R] nodes that the step verifies."""
    is_decode: bool
    packed: Tensor | None
    """[R, 4 N + 1] of `host_tree.pack`"""
    num_accepted: Tensor | None
    """[R]"""
    arrived: torch.cuda.Event

    @classmethod
    def of(cls, batch: Any, step: TreeStep | None, packed: Tensor | None) -> _Results:
        # Trees of requests whose prompt is not read to its end are of no use.
        lens = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        drafting = np.flatnonzero(lens >= batch.prefill_len_np).tolist() if packed is not None else []
        counts = np.zeros(batch.num_reqs, int) if step is None else step.counts
        num_accepted = None if step is None else _copied(step.accepted.num_accepted)
        copied = None if packed is None else _copied(packed)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
        is_decode = batch.num_tokens == batch.num_reqs + int(counts.sum())
        return cls(batch.req_ids, drafting, counts, is_decode, copied, num_accepted, arrived)


def _copied(tensor: Tensor) -> Tensor:
    """On the host, when the device has come so far."""
    return tensor.to("cpu", non_blocking=True, copy=True)


class HostBudget:
    def __init__(self, control: BudgetControl, num_nodes: int, is_async: bool) -> None:
        self.control, self.num_nodes, self.is_async = control, num_nodes, is_async
        self.trees: dict[str, HostTree] = {}
        """Of each request that the last step whose results were read drafted for."""
        self._unread: deque[_Results] = deque()
        self._next_plan: DraftPlan | None = None
        self._means: dict[str, np.ndarray] = {}
        """[N] prefix probabilities, the mean of the latest trees of each request."""
        self._typical = num_nodes
        self.node_counts = NodeCounts({}, 0)
        """For the step after the next one, with asynchronous scheduling."""

    def plan(self, batch: Any) -> DraftPlan | None:
        return self._next_plan if self.is_async else self.control.plan(batch.num_reqs)

    def end_step(self, batch: Any, step: TreeStep | None, plan: DraftPlan | None, packed: Tensor | None) -> None:
        """packed: trees [R, 4 N + 1] of `host_tree.pack`, of all requests of the batch; None if nothing was drafted."""
        if self._unread and set(self._unread[-1].requests).isdisjoint(batch.req_ids):
            # The engine may have been idle since, and how long the step took is not known.
            self._unread.clear()
        self._unread.append(_Results.of(batch, step, packed))
        # One step stays unread where the next one is under way.
        if len(self._unread) > self.is_async:
            self._read(self._unread.popleft())
        if self.is_async:
            self._look_ahead(batch)
        elif plan is not None:
            self.trees = dict(zip(self.trees, self.control.cut(plan, list(self.trees.values()))))

    def _read(self, results: _Results) -> None:
        results.arrived.synchronize()
        last = [self.trees.get(request, EMPTY_TREE) for request in results.requests]
        expected = sum(sum(tree.probabilities[:count]) for tree, count in zip(last, results.counts))
        num_accepted = 0 if results.num_accepted is None else int(results.num_accepted.sum())
        trees = [] if results.packed is None else unpack(results.packed[results.drafting])
        num_nodes = int(results.counts.sum())
        self.control.observe(
            EndedStep(results.requests, bool(trees), num_nodes, num_accepted, expected, results.is_decode)
        )
        self.trees = {results.requests[index]: tree for index, tree in zip(results.drafting, trees)}
        if self.is_async:
            for request, tree in self.trees.items():
                latest = np.pad(tree.probabilities, (0, self.num_nodes - len(tree.probabilities)))
                mean = self._means.get(request, latest)
                self._means[request] = mean + LATEST * (latest - mean)

    def _look_ahead(self, batch: Any) -> None:
        """Decides whether the next step drafts, and how many nodes the step after it verifies."""
        self._means = {request: self._means[request] for request in batch.req_ids if request in self._means}
        self._next_plan = plan = self.control.plan(batch.num_reqs)
        if plan is None:
            self.node_counts = NodeCounts({}, 0)
            return
        counts = self.control.choose(plan, [mean.tolist() for mean in self._means.values()])
        if counts:
            self._typical = round(sum(counts) / len(counts))
        self.node_counts = NodeCounts(dict(zip(self._means, counts)), self._typical)

    def cut(self, drafts: DraftTokenIds) -> DraftTokenIds | None:
        """What vLLM tells the scheduler, with as many drafts for each request as were chosen; None without any."""
        if self.is_async:
            # It asks for the tokens only, for a grammar.
            return drafts
        chosen = [len(self.trees.get(request, EMPTY_TREE).tokens) for request in drafts.req_ids]
        if not any(chosen):
            return None
        return DraftTokenIds(
            drafts.req_ids, [tokens[:count] for tokens, count in zip(drafts.draft_token_ids, chosen, strict=True)]
        )

"""Between the model runner and the node budget: tells the budget what a step did, and applies what it chooses."""

from __future__ import annotations

import time
from collections.abc import Sequence

from vllm_ctc_spec.engine.adaptive.budget import DraftPlan, NodeBudget, StepOutcome
from vllm_ctc_spec.engine.host_tree import HostTree
from vllm_ctc_spec.engine.step import Step


class BudgetControl:
    def __init__(self, budget: NodeBudget) -> None:
        self.budget = budget
        self._last_requests: frozenset[str] = frozenset()
        """Of the step before."""
        self._last_end = 0.0

    def plan(self, step: Step) -> DraftPlan | None:
        """None where the step after `step` is to verify nothing."""
        return self.budget.plan(len(step.trees))

    def cut(self, plan: DraftPlan, trees: list[HostTree]) -> list[HostTree]:
        """Each tree with the nodes that the budget chooses of it."""
        if not trees:
            return []
        counts = self.budget.choose(plan, [tree.probabilities for tree in trees])
        return [tree.cut(count) for tree, count in zip(trees, counts)]

    def observe(self, step: Step, request_ids: Sequence[str], drafted: bool) -> None:
        """At the end of a step. drafted: whether it has drafted for the next one."""
        num_accepted, expected = 0, 0.0
        if step.num_nodes:
            num_accepted = sum(map(len, step.accepted_nodes))
            expected = sum(sum(tree.probabilities) for tree in step.trees)
        now, requests = time.perf_counter(), frozenset(request_ids)
        # A request that was in the step before proves that the engine has not been idle in between.
        is_timed = step.is_decode and not requests.isdisjoint(self._last_requests)
        seconds = now - self._last_end if is_timed else None
        outcome = StepOutcome(len(step.trees), drafted, step.num_nodes, num_accepted, expected, seconds)
        self.budget.observe(outcome)
        self._last_requests, self._last_end = requests, now

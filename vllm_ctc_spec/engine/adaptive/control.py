"""Between the model runner and the node budget: tells the budget what a step did, and applies what it chooses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_ctc_spec.engine.adaptive.budget import DraftPlan, NodeBudget, StepOutcome
from vllm_ctc_spec.engine.host_tree import HostTree


@dataclass(frozen=True)
class EndedStep:
    requests: Sequence[str]
    """Their ids."""
    drafted: bool
    """Whether it has drafted for the next one."""
    num_nodes: int
    num_accepted: int
    """Nodes of all its trees."""
    expected: float
    """Sum of the prefix probabilities of its nodes."""
    is_decode: bool
    """Whether no request had prompt tokens in it."""


class BudgetControl:
    def __init__(self, budget: NodeBudget) -> None:
        self.budget = budget
        self._last_requests: frozenset[str] = frozenset()
        """Of the step before."""
        self._last_end = 0.0

    def plan(self, num_requests: int) -> DraftPlan | None:
        """None where the step after one of so many requests is to verify nothing."""
        return self.budget.plan(num_requests)

    def cut(self, plan: DraftPlan, trees: list[HostTree]) -> list[HostTree]:
        """Each tree with the nodes that the budget chooses of it."""
        if not trees:
            return []
        counts = self.budget.choose(plan, [tree.probabilities for tree in trees])
        return [tree.cut(count) for tree, count in zip(trees, counts)]

    def observe(self, step: EndedStep) -> None:
        """At the end of a step."""
        now, requests = time.perf_counter(), frozenset(step.requests)
        # A request that was in the step before proves that the engine has not been idle in between.
        is_timed = step.is_decode and not requests.isdisjoint(self._last_requests)
        seconds = now - self._last_end if is_timed else None
        outcome = StepOutcome(
            len(step.requests), step.drafted, step.num_nodes, step.num_accepted, step.expected, seconds
        )
        self.budget.observe(outcome)
        self._last_requests, self._last_end = requests, now

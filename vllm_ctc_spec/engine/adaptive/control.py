"""Between the model runner and the node budget: tells the budget what a step did, and applies what it chooses."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ctc_spec.engine.adaptive.budget import DraftPlan, NodeBudget, StepOutcome
from vllm_ctc_spec.engine.adaptive.cost import drafting_sizes, measure, target_sizes, timed
from vllm_ctc_spec.engine.host_tree import HostTree
from vllm_ctc_spec.engine.tensor_parallel import is_first_rank, of_first_rank

Run = Callable[[int], object]
"""Runs something of the given size, and waits for its end."""


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

    def with_retrieval(self, plan: DraftPlan, gain: float) -> DraftPlan:
        """gain: tokens that the drafter is expected to add to what retrieval has found for all requests."""
        return dataclasses.replace(plan, asks_drafter=self.budget.should_draft(plan, gain))

    def choose(self, plan: DraftPlan, trees: Sequence[Sequence[float]]) -> list[int]:
        """See `NodeBudget.choose`."""
        return self.budget.choose(plan, trees) if trees else []

    def cut(self, plan: DraftPlan, trees: list[HostTree]) -> list[HostTree]:
        """Each tree with the nodes that the budget chooses of it."""
        counts = self.choose(plan, [tree.probabilities for tree in trees])
        return [tree.cut(count) for tree, count in zip(trees, counts, strict=True)]

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


def measured_control(runner: Any, run_target: Run) -> BudgetControl | None:
    """Measures the target and drafting before the first request; None on other ranks than the first, which decides for
    all.

    runner: one of ours, whose model is compiled.
    """
    most_rows = min(runner.max_num_reqs * (1 + runner.drafter.settings.num_nodes), runner.max_num_tokens)
    # vLLM's data parallel ranks of a MoE target run it in lock-step: each waits for all others.
    in_lock_step = runner.parallel_config.data_parallel_size > 1 and runner.model_config.is_moe
    target = measure(_of_first_rank(timed(run_target)), target_sizes(most_rows), in_lock_step)
    drafting = measure(_of_first_rank(timed(runner.drafter.profile)), drafting_sizes(runner.max_num_reqs))
    return BudgetControl(NodeBudget(target, drafting)) if is_first_rank() else None


def _of_first_rank(seconds_of: Callable[[int], float]) -> Callable[[int], float]:
    """The first rank's seconds on every rank, so that all run the same sizes."""
    return lambda size: of_first_rank(seconds_of(size))

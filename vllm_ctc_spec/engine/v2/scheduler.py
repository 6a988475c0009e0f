"""vLLM's asynchronous scheduler with an adaptive node budget.

A step is scheduled before the one before it has ended, so the number of its nodes is chosen two steps ahead
(host_budget.py) and comes with the output of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler


@dataclass(frozen=True)
class NodeCounts:
    """Nodes to schedule of each request; an attribute `node_counts` of vLLM's `ModelRunnerOutput`."""

    of_request: dict[str, int]
    others: int


class CTCScheduler(AsyncScheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.node_counts = NodeCounts({}, 0)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        counts = self.node_counts
        for request in self.running:
            # Placeholders for tokens that the worker has.
            count = counts.of_request.get(request.request_id, counts.others)
            request.spec_token_ids = request.spec_token_ids[:count]
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        # A step without tokens has none.
        self.node_counts = getattr(model_runner_output, "node_counts", self.node_counts)
        return super().update_from_output(scheduler_output, model_runner_output)

"""What vLLM's counters say about trees: acceptance length, acceptance by depth, nodes per step.

vLLM counts the i-th accepted token of a step at "position" i, which for a tree is depth i; its acceptance *rate*
divides by nodes and says little about a tree. Definitions: acceptance length = 1 + accepted / drafts (as
vllm/v1/spec_decode/metrics.py); acceptance at depth d = steps whose path reached d / steps whose path reached
d - 1; nodes per step = draft tokens / drafts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Gauge
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_ctc_spec.engine.plugin import is_ctc

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

logger = init_logger("vllm.ctc_spec")


@dataclass(frozen=True)
class TreeMetrics:
    acceptance_length: float
    nodes_per_step: float
    acceptance_by_depth: tuple[float, ...]
    """Entry d - 1 is the acceptance at depth d; ends at the last depth that any path reached."""

    @classmethod
    def from_counts(cls, num_drafts: int, num_nodes: int, accepted_by_depth: Sequence[int]) -> TreeMetrics | None:
        """None where nothing was drafted."""
        if num_drafts == 0:
            return None
        reached = [num_drafts, *accepted_by_depth]
        rates = tuple(accepted / above for above, accepted in itertools.pairwise(reached) if accepted)
        return cls(1 + sum(accepted_by_depth) / num_drafts, num_nodes / num_drafts, rates)

    def __str__(self) -> str:
        rates = ", ".join(f"{rate:.2f}" for rate in self.acceptance_by_depth) or "0"
        return (
            f"acceptance length {self.acceptance_length:.2f}, nodes per step {self.nodes_per_step:.1f}, "
            f"acceptance by depth {rates}"
        )


UNDRAFTED = TreeMetrics(1.0, 0.0, ())
"""Of steps without drafts."""


def read_tree_metrics(llm: LLM) -> TreeMetrics | None:
    """Since the engine started. Needs `LLM(..., disable_log_stats=False)`; raises ValueError without.

    vLLM keeps one registry per process, which a new engine clears: ask the engine that was made last.
    """
    if not llm.llm_engine.log_stats:
        raise ValueError("metrics are off: build the engine with disable_log_stats=False.")
    counts: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
    prefix = "vllm:spec_decode_num_"
    return TreeMetrics.from_counts(
        counts[prefix + "drafts"].value,
        counts[prefix + "draft_tokens"].value,
        counts[prefix + "accepted_tokens_per_pos"].values,
    )


class TreeStatLogger(StatLoggerBase):
    """Entry point `vllm.stat_logger_plugins`: a line in the server's log and gauges at /metrics, per interval."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.engine = str(engine_index)
        self.enabled = is_ctc(vllm_config.speculative_config)
        if self.enabled:
            self.num_depths = 0
            """With a gauge."""
            self.max_depth = vllm_config.speculative_config.num_speculative_tokens
            self.gauges = _gauges()
            # vLLM turns its own line off where each of several API servers sees a part of the requests.
            self.logs = vllm_config.parallel_config._api_process_count <= 1
        self._reset()

    def _reset(self) -> None:
        self.num_drafts = self.num_nodes = self.num_tokens = 0
        if self.enabled:
            self.accepted_by_depth = [0] * self.max_depth

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if not self.enabled:
            return
        self.num_tokens += iteration_stats.num_generation_tokens if iteration_stats is not None else 0
        stats = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
        if stats is None:
            return
        self.num_drafts += stats.num_drafts
        self.num_nodes += stats.num_draft_tokens
        for depth, accepted in enumerate(stats.num_accepted_tokens_per_pos):
            self.accepted_by_depth[depth] += accepted

    def log(self) -> None:
        if not self.enabled:
            return
        metrics = TreeMetrics.from_counts(self.num_drafts, self.num_nodes, self.accepted_by_depth)
        if metrics is not None and self.logs:
            logger.info("Engine %s: CTC trees: %s", self.engine, metrics)
        if metrics is None and self.num_tokens:
            metrics = UNDRAFTED
        if metrics is not None:
            self._show(metrics)
        self._reset()

    def _show(self, metrics: TreeMetrics) -> None:
        length, nodes, by_depth = self.gauges
        length.labels(self.engine).set(metrics.acceptance_length)
        nodes.labels(self.engine).set(metrics.nodes_per_step)
        rates = metrics.acceptance_by_depth
        # A depth that no path has reached in this interval has no acceptance, nor that of an earlier interval.
        self.num_depths = max(self.num_depths, len(rates))
        for depth in range(self.num_depths):
            by_depth.labels(self.engine, str(depth + 1)).set(rates[depth] if depth < len(rates) else math.nan)

    def log_engine_initialized(self) -> None:
        pass


@functools.cache
def _gauges() -> tuple[Gauge, Gauge, Gauge]:
    """Made once a process: several engines share them. vLLM clears every metric whose name has "vllm" in it.

    Of several API servers the last one that set a gauge is shown, as with vLLM's own.
    """
    gauge = functools.partial(Gauge, multiprocess_mode="mostrecent")
    return (
        gauge("ctc_spec:acceptance_length", "Tokens per target step, the target's own included.", ("engine",)),
        gauge("ctc_spec:nodes_per_step", "Draft nodes verified per request and step.", ("engine",)),
        gauge("ctc_spec:acceptance_by_depth", "Paths that reached a depth / the depth above.", ("engine", "depth")),
    )

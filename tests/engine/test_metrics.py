"""vLLM's counters and our metrics agree with the emitted tokens."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from tests.engine.conftest import NUM_NODES, engine, generate
from vllm_ctc_spec.engine import metrics
from vllm_ctc_spec.engine.metrics import TreeMetrics, TreeStatLogger, read_tree_metrics
from vllm_ctc_spec.engine.plugin import PROPOSER


def counts(llm: LLM) -> tuple[int, int, int, list[int]]:
    by_name = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()}
    totals = [by_name[name].value for name in ("drafts", "draft_tokens", "accepted_tokens")]
    return (*totals, by_name["accepted_tokens_per_pos"].values)


def test_counters_add_up_to_the_emitted_tokens(pair, prompts: list[list[int]]) -> None:
    """Each step emits its accepted path and the target's own token; the prefill emits one token."""
    with engine(pair, {}) as llm:
        outputs = generate(llm, prompts, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        drafts, nodes, accepted, by_depth = counts(llm)
        measured = read_tree_metrics(llm)
    # In a request's last step the engine cuts the path at max_tokens; the counters include all of the path.
    emitted = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert emitted <= len(prompts) + drafts + accepted < emitted + 10 * len(prompts)
    assert sum(by_depth) == accepted
    assert by_depth == sorted(by_depth, reverse=True)
    assert drafts < nodes <= NUM_NODES * drafts
    assert measured.acceptance_length == pytest.approx(1 + accepted / drafts)
    assert measured.acceptance_length > 1.3
    assert measured.nodes_per_step > NUM_NODES / 2


def test_acceptance_by_depth_is_conditional_on_the_depth_above() -> None:
    assert TreeMetrics.from_counts(0, 0, [0, 0]) is None
    assert TreeMetrics.from_counts(10, 80, [8, 4, 0, 0]) == TreeMetrics(2.2, 8.0, (0.8, 0.5))
    assert TreeMetrics.from_counts(10, 80, [0, 0]) == TreeMetrics(1.0, 8.0, ())


def config(num_servers: int) -> Any:
    """What a stat logger reads of a VllmConfig."""
    spec = SimpleNamespace(model=PROPOSER, num_speculative_tokens=4)
    return SimpleNamespace(speculative_config=spec, parallel_config=SimpleNamespace(_api_process_count=num_servers))


def record(stats: TreeStatLogger, accepted: list[int], num_tokens: int = 1) -> None:
    """Log one step of two nodes per request. accepted: accepted tokens of each request."""
    counts = SpecDecodingStats.new(4)
    for each in accepted:
        counts.observe_draft(2, each)
    scheduled = SchedulerStats(spec_decoding_stats=counts if accepted else None)
    iteration = IterationStats()
    iteration.num_generation_tokens = num_tokens
    stats.record(scheduled, iteration)
    stats.log()


def gauge(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"ctc_spec:{name}", {"engine": "7", **labels})


def test_gauges_show_the_last_interval_in_which_anything_was_generated() -> None:
    stats = TreeStatLogger(config(1), engine_index=7)
    record(stats, [2, 1])
    assert [gauge("acceptance_by_depth", depth=depth) for depth in ("1", "2", "3")] == [1.0, 0.5, None]
    record(stats, [1, 0])
    assert gauge("acceptance_by_depth", depth="1") == 0.5
    assert math.isnan(gauge("acceptance_by_depth", depth="2"))
    record(stats, [], num_tokens=0)
    assert (gauge("acceptance_length"), gauge("nodes_per_step")) == (1.5, 2.0)
    record(stats, [])
    assert (gauge("acceptance_length"), gauge("nodes_per_step")) == (1.0, 0.0)
    assert math.isnan(gauge("acceptance_by_depth", depth="1"))


@pytest.mark.parametrize(("num_servers", "num_lines"), [(1, 1), (2, 0)])
def test_only_a_single_api_server_logs_a_line(
    num_servers: int, num_lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    monkeypatch.setattr(metrics.logger, "info", lambda *line: lines.append(line))
    record(TreeStatLogger(config(num_servers), engine_index=7), [1])
    assert len(lines) == num_lines


def test_several_api_servers_report_one_gauge(tmp_path: Path) -> None:
    program = (
        "import sys; from tests.engine.test_metrics import *; record(TreeStatLogger(config(2), 7), [2, 1]); "
        "from vllm.v1.metrics.prometheus import get_prometheus_registry; "
        "from prometheus_client import generate_latest; "
        "print(generate_latest(get_prometheus_registry()).decode())"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.findall(r"^ctc_spec:nodes_per_step.*$", done.stdout, re.MULTILINE) == [
        'ctc_spec:nodes_per_step{engine="7"} 2.0'
    ]

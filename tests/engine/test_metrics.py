"""vLLM's counters and ours, against what the engine emitted."""

from __future__ import annotations

import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import NUM_NODES, engine, generate
from vllm_ctc_spec.engine.metrics import TreeMetrics, read_tree_metrics


def counts(llm: LLM) -> tuple[int, int, int, list[int]]:
    by_name = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()}
    totals = [by_name[name].value for name in ("drafts", "draft_tokens", "accepted_tokens")]
    return (*totals, by_name["accepted_tokens_per_pos"].values)


def test_counters_add_up_to_the_emitted_tokens(pair, prompts: list[list[int]]) -> None:
    """Every step emits its accepted path and one token of the target's; the prefill emits one."""
    with engine(pair, {}) as llm:
        outputs = generate(llm, prompts, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        drafts, nodes, accepted, by_depth = counts(llm)
        metrics = read_tree_metrics(llm)
    # A path may run over max_tokens in a request's last step; the engine cuts it, the counters do not.
    emitted = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert emitted <= len(prompts) + drafts + accepted < emitted + 10 * len(prompts)
    assert sum(by_depth) == accepted
    assert by_depth == sorted(by_depth, reverse=True)
    assert drafts < nodes <= NUM_NODES * drafts
    assert metrics.acceptance_length == pytest.approx(1 + accepted / drafts)
    assert metrics.acceptance_length > 1.3
    assert metrics.nodes_per_step > NUM_NODES / 2


def test_acceptance_by_depth_is_conditional_on_the_depth_above() -> None:
    assert TreeMetrics.from_counts(0, 0, [0, 0]) is None
    assert TreeMetrics.from_counts(10, 80, [8, 4, 0, 0]) == TreeMetrics(2.2, 8.0, (0.8, 0.5, 0.0))

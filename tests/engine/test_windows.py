"""A target one of whose layers has a sliding window, which is shorter than the paths of its trees."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams

from tests.engine.conftest import complete, engine, seeded
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.engine.metrics import read_tree_metrics

WINDOW = 4


def test_a_window_is_measured_in_positions_and_not_in_rows(pair: TinyPair, prompts: list[list[int]]) -> None:
    options: dict[str, Any] = {
        "hf_overrides": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW},
        "disable_hybrid_kv_cache_manager": True,
    }
    every = [SamplingParams(temperature=0, max_tokens=40), seeded(len(prompts), temperature=0.8, max_tokens=40)]
    with engine(pair, None, **options) as llm:
        expected = [complete(llm, prompts, params) for params in every]
    with engine(pair, {}, **options) as llm:
        assert [complete(llm, prompts, params) for params in every] == expected
        metrics = read_tree_metrics(llm)
    assert metrics is not None and metrics.acceptance_length > 1.3

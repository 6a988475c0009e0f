"""One layer of the target has a window that is shorter than the trees are deep.

vLLM keeps three KV groups, which share memory: of this layer, of the other layer and of the drafter's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import Completion, complete, engine, generate, num_preemptions, seeded
from tests.engine.probe import decide_by_rule
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.engine.metrics import read_tree_metrics

WINDOW = 4
FULL, WINDOWED = "full_attention", "sliding_attention"


@contextmanager
def windowed(pair: TinyPair, spec: dict[str, Any] | None, layers: tuple[str, str], **options: Any) -> Iterator[LLM]:
    overrides = {"layer_types": list(layers), "sliding_window": WINDOW}
    # On a CPU plain vLLM fails where the prompt of a seeded request is read in chunks.
    chunks = {} if spec is None else {"max_num_batched_tokens": 96}
    options = {"block_size": 32, "max_model_len": 320, **chunks, **options}
    with engine(pair, spec, hf_overrides=overrides, **options) as llm:
        yield llm


def params(count: int) -> list[list[SamplingParams]]:
    greedy = [SamplingParams(temperature=0, max_tokens=20 + 2 * index) for index in range(count)]
    return [greedy, seeded(count, temperature=0.8, max_tokens=80, ignore_eos=True)]


@pytest.fixture(scope="module")
def expected(pair: TinyPair, prompts: list[list[int]]) -> list[list[Completion]]:
    with windowed(pair, None, (WINDOWED, FULL)) as llm:
        return [complete(llm, prompts, each) for each in params(len(prompts))]


def test_chunks_preemption_and_cached_prefixes_are_exact(
    pair: TinyPair, prompts: list[list[int]], expected: list[list[Completion]]
) -> None:
    with windowed(pair, {}, (WINDOWED, FULL), num_gpu_blocks_override=32) as llm:
        assert [complete(llm, prompts, each) for each in params(len(prompts))] == expected
        longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
        [first], [again] = (generate(llm, [prompts[longest]], params(len(prompts))[0][longest]) for _ in range(2))
        assert list(first.outputs[0].token_ids) == list(again.outputs[0].token_ids) == expected[0][longest].tokens
        assert again.num_cached_tokens >= 96
        assert num_preemptions(llm) > 0
        metrics = read_tree_metrics(llm)
    assert metrics is not None and metrics.acceptance_length > 1.3


def test_steps_without_drafts_among_others_are_exact(
    pair: TinyPair, prompts: list[list[int]], expected: list[list[Completion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter's keys and values are stored at once, because blocks move between KV groups."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    with windowed(pair, {"adaptive_budget": True}, (WINDOWED, FULL), num_gpu_blocks_override=32) as llm:
        assert llm.collective_rpc(decide_by_rule) == [True]
        assert [complete(llm, prompts, each) for each in params(len(prompts))] == expected


def test_a_target_of_windows_alone_is_exact(pair: TinyPair, prompts: list[list[int]]) -> None:
    """The drafter has the window, too, so that there is one KV group."""
    answers = []
    for spec in (None, {}):
        with windowed(pair, spec, (WINDOWED, WINDOWED)) as llm:
            answers.append([complete(llm, prompts, each) for each in params(len(prompts))])
            acceptance = read_tree_metrics(llm) if spec is not None else None
    assert answers[0] == answers[1]
    assert acceptance is not None and acceptance.acceptance_length > 1.1

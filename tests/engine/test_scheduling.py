"""Answers are plain vLLM's with chunked prompts, preemption, cached prefixes and structured output."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.conftest import (
    NUM_NODES,
    NUM_PROMPTS,
    assert_a_cached_prefix_changes_no_token,
    assert_logprobs_are_equal,
    assert_prompt_logprobs_are_equal,
    complete,
    engine,
    generate,
    num_preemptions,
    seeded,
)
from tests.engine.probe import forget_trees
from vllm_ctc_spec.engine.metrics import read_tree_metrics


def mixed(max_tokens: int) -> list[SamplingParams]:
    """Seeded requests; a third have penalties, a third have bad words of several tokens."""
    kinds: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"presence_penalty": 0.5, "repetition_penalty": 1.1},
        {"bad_words": ["import os", "self.", "return ", "):"]},
    ]
    return [
        SamplingParams(temperature=0.8, seed=index, max_tokens=max_tokens, ignore_eos=True, **kinds[index % 3])
        for index in range(NUM_PROMPTS)
    ]


def test_seeded_requests_survive_chunked_prefill(pair, plain: LLM, prompts: list[list[int]]) -> None:
    """Expected are the answers of plain vLLM that reads each prompt in one step.

    Plain vLLM 0.32 fails with chunks on a CPU: it takes back a draw, which CPU generators cannot.
    """
    # Cached prompts would not be chunked the second time.
    options = {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "enable_prefix_caching": False}
    with engine(pair, {}, **options) as chunked:
        for params in (SamplingParams(temperature=0, max_tokens=20), mixed(20)):
            assert complete(chunked, prompts, params) == complete(plain, prompts, params)
        for params in (
            [SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=2, logprobs=2)] * NUM_PROMPTS,
            seeded(NUM_PROMPTS, temperature=0.9, max_tokens=5, prompt_logprobs=2, logprobs=2),
        ):
            got, expected = generate(chunked, prompts, params), generate(plain, prompts, params)
            assert_prompt_logprobs_are_equal(got, expected)
            assert_logprobs_are_equal(got, expected, 2)


def test_preempted_requests_resume_exactly(pair, plain: LLM, prompts: list[list[int]]) -> None:
    params = mixed(120)
    with engine(pair, {}, num_gpu_blocks_override=24, block_size=32) as small:
        assert complete(small, prompts, params) == complete(plain, prompts, params)
        assert num_preemptions(small) > 0


def test_one_token_prompts_join_a_running_batch(pair, plain: LLM, prompts: list[list[int]]) -> None:
    """The scheduler pads such a request with placeholder drafts."""
    short = [prompt[:1] for prompt in prompts]
    params = [SamplingParams(temperature=0, max_tokens=5 + index, ignore_eos=True) for index in range(NUM_PROMPTS)]
    with engine(pair, {}, max_num_seqs=4) as narrow:
        assert complete(narrow, short, params) == complete(plain, short, params)


def test_a_cached_prefix_changes_no_token(trees: LLM, plain: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    assert_a_cached_prefix_changes_no_token(trees, plain, prompts, params)


def test_drafts_after_a_cached_prefix_are_as_good_as_without(pair, prompts: list[list[int]]) -> None:
    """Cached blocks hold the drafter's keys and values, too."""
    long_prompt = [token for prompt in prompts for token in prompt][:400]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with engine(pair, {}) as llm:
        generate(llm, [long_prompt], params)
        without = read_tree_metrics(llm)
        assert generate(llm, [long_prompt], params)[0].num_cached_tokens >= 256
        # The metrics are means over both runs.
        assert read_tree_metrics(llm) == without


def test_structured_output_is_served_exactly(plain: LLM, trees: LLM, prompts: list[list[int]]) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ab", "cd"]}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    constraints = [{"json": schema}, {"regex": r"(ab|cd)[0-9]{6}x"}, {"choice": ["import os", "import sys"]}]
    params = [
        SamplingParams(
            temperature=0.0 if index % 2 else 0.8,
            seed=index,
            max_tokens=60,
            structured_outputs=StructuredOutputsParams(**constraints[index % 3]) if index % 4 else None,
        )
        for index in range(NUM_PROMPTS)
    ]
    answers = complete(trees, prompts, params)
    assert answers == complete(plain, prompts, params)
    for index, answer in enumerate(answers):
        if index % 4 and index % 3 == 0 and answer.finish_reason == "stop":
            assert json.loads(answer.text)["name"] in ("ab", "cd")


def test_several_choices_of_one_seeded_request_are_equal(plain: LLM, trees: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(n=3, seed=7, temperature=0.9, max_tokens=30)
    for expected, got in zip(generate(plain, prompts[:8], params), generate(trees, prompts[:8], params)):
        assert [list(c.token_ids) for c in got.outputs] == [list(c.token_ids) for c in expected.outputs]


def test_a_custom_logits_processor_works_and_processed_logprobs_are_equal(pair, prompts: list[list[int]]) -> None:
    """vLLM refuses custom processors with its own speculative methods."""
    options = {"logits_processors": ["tests.engine.processors:AvoidRepeat"], "logprobs_mode": "processed_logprobs"}
    kinds: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.9, "presence_penalty": 0.5}]
    params = [
        SamplingParams(temperature=0.8, seed=index, max_tokens=30, logprobs=2, **kinds[index % 3])
        for index in range(NUM_PROMPTS)
    ]
    answers = []
    for spec in (None, {}):
        with engine(pair, spec, **options) as llm:
            answers.append(generate(llm, prompts, params))
    expected, got = answers
    assert_logprobs_are_equal(got, expected, 2)
    tokens = [each.outputs[0].token_ids for each in got]
    assert all(left != right for answer in tokens for left, right in itertools.pairwise(answer))


@pytest.mark.parametrize(("threshold", "share"), [(0.1, 3 / 4), (0.5, 1 / 8)])
def test_improbable_nodes_are_not_verified(
    pair, plain: LLM, prompts: list[list[int]], threshold: float, share: float
) -> None:
    params = SamplingParams(temperature=0, max_tokens=30)
    with engine(pair, {"min_prefix_probability": threshold}) as llm:
        assert complete(llm, prompts, params) == complete(plain, prompts, params)
        metrics = read_tree_metrics(llm)
        assert metrics is not None and metrics.nodes_per_step < share * NUM_NODES


def test_drafts_without_their_tree_are_verified_as_a_chain_and_logged_once(
    pair, plain: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    params = SamplingParams(temperature=0, max_tokens=30)
    with engine(pair, {}) as llm:
        llm.collective_rpc(forget_trees)
        assert complete(llm, prompts, params) == complete(plain, prompts, params)
        metrics = read_tree_metrics(llm)
    assert metrics is not None and metrics.acceptance_length > 1.1
    assert "".join(capfd.readouterr()).count("draft tokens are not those of the tree") == 1

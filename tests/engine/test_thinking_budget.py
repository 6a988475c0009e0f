"""Thinking budgets, which end a thought after a number of tokens, act as in plain vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.engine.conftest import NUM_PROMPTS, Completion, complete, engine
from tests.tiny_pair import TinyPair

THOUGHTS = {"reasoning_start_str": "(", "reasoning_end_str": "):\n"}
"""The tiny target writes these texts, so that thoughts begin and end in prompts and in answers."""
BUDGETS = (0, 1, 3, 8, 20)


@pytest.fixture(scope="module")
def engines(pair: TinyPair) -> Iterator[tuple[LLM, LLM]]:
    """Plain vLLM, and vLLM with trees."""
    with engine(pair, None, reasoning_config=THOUGHTS) as plain, engine(pair, {}, reasoning_config=THOUGHTS) as trees:
        yield plain, trees


@pytest.fixture(scope="module")
def started_thoughts(engines: tuple[LLM, LLM], prompts: list[list[int]]) -> list[list[int]]:
    """Every second prompt ends within a thought."""
    start = engines[0].get_tokenizer().encode("(")
    return [prompt + start * (index % 2) for index, prompt in enumerate(prompts)]


def budgets(temperature: float, unlimited: int = 0, **params: Any) -> list[SamplingParams]:
    """unlimited: one request in this many has no budget; 0: all have one."""
    return [
        SamplingParams(
            temperature=temperature,
            seed=1000 + index,
            max_tokens=40,
            ignore_eos=True,
            thinking_token_budget=None if unlimited and index % unlimited == 0 else BUDGETS[index % len(BUDGETS)],
            **params,
        )
        for index in range(NUM_PROMPTS)
    ]


@pytest.fixture(scope="module")
def answers(engines: tuple[LLM, LLM], started_thoughts: list[list[int]]) -> dict[float, list[tuple[Completion, ...]]]:
    """Plain vLLM's answers to each prompt with its budget and without, by temperature.

    In two batches, because in vLLM 0.32 a request without a budget can take over the budget of its batch row.
    """
    return {
        temperature: list(
            zip(*(complete(engines[0], started_thoughts, budgets(temperature, unlimited)) for unlimited in (0, 1)))
        )
        for temperature in (0.0, 0.9)
    }


@pytest.mark.parametrize(("temperature", "unlimited"), [(0.0, 0), (0.0, 2), (0.9, 0), (0.9, 3)])
def test_budgets_in_a_batch_are_plain_vllms(
    engines: tuple[LLM, LLM],
    started_thoughts: list[list[int]],
    answers: dict[float, list[tuple[Completion, ...]]],
    temperature: float,
    unlimited: int,
) -> None:
    params = budgets(temperature, unlimited)
    expected = [pair[own.thinking_token_budget is None] for pair, own in zip(answers[temperature], params)]
    assert complete(engines[1], started_thoughts, params) == expected


def test_the_budgets_of_these_tests_change_the_answers(answers: dict[float, list[tuple[Completion, ...]]]) -> None:
    for pairs in answers.values():
        assert sum(limited != free for limited, free in pairs) > NUM_PROMPTS / 2


def test_a_budget_alone_is_plain_vllms(engines: tuple[LLM, LLM], started_thoughts: list[list[int]]) -> None:
    plain, trees = engines
    for prompt, params in list(zip(started_thoughts, budgets(0.0)))[:10]:
        assert complete(trees, [prompt], params) == complete(plain, [prompt], params)


def test_budgets_beside_penalties_are_plain_vllms(engines: tuple[LLM, LLM], started_thoughts: list[list[int]]) -> None:
    plain, trees = engines
    params = budgets(0.8, presence_penalty=0.6, top_p=0.9, logprobs=2)
    assert complete(trees, started_thoughts, params) == complete(plain, started_thoughts, params)


def test_streamed_budgets_are_plain_vllms(
    engines: tuple[LLM, LLM], started_thoughts: list[list[int]], answers: dict[float, list[tuple[Completion, ...]]]
) -> None:
    params = budgets(0.0, 3)
    expected = [pair[own.thinking_token_budget is None].tokens for pair, own in zip(answers[0.0], params)]
    assert streamed(engines[1], started_thoughts, params) == expected


def test_requests_with_a_budget_are_drafted(engines: tuple[LLM, LLM], started_thoughts: list[list[int]]) -> None:
    trees = engines[1]
    before = accepted(trees)
    complete(trees, started_thoughts, budgets(0.0))
    assert accepted(trees) - before > NUM_PROMPTS


def accepted(llm: LLM) -> int:
    [count] = [each.value for each in llm.get_metrics() if each.name == "vllm:spec_decode_num_accepted_tokens"]
    return count


def streamed(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """Tokens of each answer, joined from its pieces; a request is added every second step."""
    waiting = list(enumerate(zip(prompts, params)))
    answers: dict[str, list[int]] = {}
    steps = 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        if waiting and steps % 2 == 0:
            index, (prompt, own) = waiting.pop(0)
            own.output_kind = RequestOutputKind.DELTA
            llm.llm_engine.add_request(str(index), {"type": "token", "prompt_token_ids": prompt}, own)
        for output in llm.llm_engine.step():
            answers.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
        steps += 1
    return [answers[str(index)] for index in range(len(prompts))]

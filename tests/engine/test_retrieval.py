"""Retrieval with a drafter and without: answers are plain vLLM's, and ended requests are freed.

The cache has so few blocks that requests are preempted in most tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.conftest import (
    NUM_PROMPTS,
    assert_a_cached_prefix_changes_no_token,
    complete,
    engine,
    generate,
    num_preemptions,
    seeded,
)
from tests.engine.probe import record_trees, recorded_trees
from tests.tiny_pair import DRAFTER, TinyPair
from vllm_ctc_spec.algorithm.source_weights import FIRST_GAIN
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.engine import retrieval
from vllm_ctc_spec.engine.adaptive.budget import DraftPlan
from vllm_ctc_spec.engine.host_tree import EMPTY_TREE, HostTree
from vllm_ctc_spec.engine.metrics import read_tree_metrics
from vllm_ctc_spec.engine.retrieval import LONGEST_MATCH, Retrieval

SOURCES: dict[str, dict[str, Any]] = {
    "drafter and request": {"retrieval": "request", "adaptive_budget": True},
    "request and answers alone": {"model": None, "retrieval": "request+answers", "retrieval_depth": 20},
}


@pytest.fixture(scope="module", params=SOURCES.values(), ids=SOURCES)
def retrieving(pair: TinyPair, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """With a drafter, two of three steps use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with engine(pair, request.param, num_gpu_blocks_override=24, block_size=32) as llm:
            llm.collective_rpc(ask_by_rule)
            yield llm


def ask_by_rule(worker: Any) -> None:
    """Replace the decisions of an adaptive budget, which depend on measured times."""
    control, steps = worker.model_runner.control, count()
    if control is not None:
        control.budget.plan = lambda num_requests: DraftPlan(num_requests, 0.0, 0.0)
        control.budget.should_draft = lambda plan, gain: next(steps) % 3 > 0


PARAMETERS: dict[str, Any] = {
    "greedy": SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
    "seeded": seeded(NUM_PROMPTS, temperature=0.8, top_p=0.95, max_tokens=60, ignore_eos=True),
    "penalties": seeded(
        NUM_PROMPTS, temperature=0.9, repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.2, max_tokens=40
    ),
    "mixed": [
        SamplingParams(seed=index, max_tokens=50, **({}, {"temperature": 0}, {"presence_penalty": 0.5})[index % 3])
        for index in range(NUM_PROMPTS)
    ],
    "log probabilities": SamplingParams(temperature=0, max_tokens=30, logprobs=2),
    "structured": [
        SamplingParams(
            temperature=0.8,
            seed=index,
            max_tokens=40,
            structured_outputs=StructuredOutputsParams(regex=r"(ab|cd)+[0-9]{6}x") if index % 2 else None,
        )
        for index in range(NUM_PROMPTS)
    ],
}


@pytest.mark.parametrize("params", PARAMETERS.values(), ids=PARAMETERS)
def test_answers_are_plain_vllms(plain: LLM, retrieving: LLM, prompts: list[list[int]], params: Any) -> None:
    assert complete(retrieving, prompts, params) == complete(plain, prompts, params)


def test_preempted_requests_resume_exactly(plain: LLM, retrieving: LLM, prompts: list[list[int]]) -> None:
    params = seeded(12, temperature=0.8, max_tokens=120, ignore_eos=True)
    assert complete(retrieving, prompts[:12], params) == complete(plain, prompts[:12], params)
    assert num_preemptions(retrieving) > 0


def test_stop_strings_cut_inside_a_path(plain: LLM, retrieving: LLM, prompts: list[list[int]]) -> None:
    free = complete(plain, prompts, SamplingParams(temperature=0, max_tokens=30))
    stops = [answer.text[20:24] for answer in free[:6] if len(answer.text) > 24]
    params = SamplingParams(temperature=0, max_tokens=80, stop=stops)
    answers = complete(retrieving, prompts, params)
    assert answers == complete(plain, prompts, params)
    assert any(answer.stop_reason in stops for answer in answers)


def test_a_cached_prefix_changes_no_token(plain: LLM, retrieving: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    assert_a_cached_prefix_changes_no_token(retrieving, plain, prompts, params)


def test_several_choices_of_one_request_are_separate(plain: LLM, retrieving: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(n=3, seed=7, temperature=0.9, max_tokens=30)
    for expected, got in zip(generate(plain, prompts[:8], params), generate(retrieving, prompts[:8], params)):
        assert [list(each.token_ids) for each in got.outputs] == [list(each.token_ids) for each in expected.outputs]


def test_copies_are_accepted_far_beyond_the_frames(plain: LLM, retrieving: LLM, prompts: list[list[int]]) -> None:
    """A small target repeats itself where it may not stop."""
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    assert complete(retrieving, prompts[:4], params) == complete(plain, prompts[:4], params)
    metrics = read_tree_metrics(retrieving)
    assert metrics is not None and len(metrics.acceptance_by_depth) > DRAFTER["num_frames"] + 4


def test_ended_and_aborted_requests_leave_nothing(retrieving: LLM, prompts: list[list[int]]) -> None:
    core = retrieving.llm_engine
    endless = SamplingParams(max_tokens=400, ignore_eos=True)
    for number in range(3):
        core.add_request(f"aborted-{number}", {"prompt_token_ids": prompts[number]}, endless)
    for _ in range(6):
        core.step()
    assert retrieving.collective_rpc(live_states) == [(3, 3)]
    core.abort_request([f"aborted-{number}" for number in range(3)])
    short = [prompts[index % NUM_PROMPTS][:8] for index in range(300)]
    complete(retrieving, short, SamplingParams(temperature=0, max_tokens=4))
    # The worker frees ended requests in its next step.
    counts = [retrieving.collective_rpc(live_states) for _ in range(20)]
    assert counts[-1] == [(0, 0)]


def test_an_earlier_answer_is_drafted_whole(retrieving: LLM, prompts: list[list[int]]) -> None:
    """With "request+answers". Keep this test last: it records all trees."""
    params = SamplingParams(temperature=0.8, seed=11, max_tokens=60, ignore_eos=True)
    [first] = complete(retrieving, [prompts[9]], params)
    retrieving.collective_rpc(record_trees)
    [second] = complete(retrieving, [prompts[9]], params)
    [trees] = retrieving.collective_rpc(recorded_trees)
    assert first == second
    options = retrieving.llm_engine.vllm_config.additional_config["ctc_spec"]["options"]
    assert (len(trees) < 15) == (options["retrieval"] == "request+answers")
    # The node budget would allow more.
    assert max(max(each.tree.depths) for each in trees) <= options["retrieval_depth"]


def live_states(worker: Any) -> tuple[int, int]:
    retrieval = worker.model_runner.retrieval
    return len(retrieval.states), len(retrieval._trees.active_requests)


def request(name: str, prompt: list[int], output: list[int]) -> Any:
    """The fields of the runner's request state that retrieval reads."""
    return SimpleNamespace(req_id=name, prompt_token_ids=prompt, output_token_ids=output, sampling_params=None)


def found_after(source: Retrieval, name: str, prompt: list[int], output: list[int]) -> HostTree:
    asked = [request(name, prompt, output)]
    source.find(asked)
    return source.join(asked, [])[0]


def test_what_followed_the_same_tokens_is_found() -> None:
    source = Retrieval(SpecOptions(retrieval="request", retrieval_depth=5), num_nodes=16)
    tree = found_after(source, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [2, 3])
    assert tree.tokens == [4, 5, 6, 7, 8] and tree.is_chain
    # By the rule of succession, after a match of two tokens.
    assert tree.probabilities == pytest.approx([3 / 4, 3 / 5, 3 / 6, 3 / 7, 3 / 8])


def test_different_continuations_are_branches() -> None:
    source = Retrieval(SpecOptions(retrieval="request"), num_nodes=16)
    tree = found_after(source, "a", [7, 1, 7, 1, 7, 1, 7, 2, 9], [7])
    first = {token: psi for token, depth, psi in zip(tree.tokens, tree.depths, tree.probabilities) if depth == 1}
    assert first == pytest.approx({1: 2 / 3 * 3 / 4, 2: 2 / 3 * 1 / 4})


def test_without_a_match_the_drafters_tree_is_unchanged() -> None:
    source = Retrieval(SpecOptions(retrieval="request"), num_nodes=16)
    drafted, asked = HostTree([5, 6], [0, 1], [1, 2], [0.5, 0.4]), [request("a", [1, 2, 3], [4])]
    source.find(asked)
    assert source.join(asked, [drafted]) == [drafted]
    assert source.join(asked, []) == [EMPTY_TREE]


def test_the_source_that_was_right_gains_weight() -> None:
    """One request copies its text, the other continues as drafted."""
    text = list(range(20, 60))
    source = Retrieval(SpecOptions(retrieval="request"), num_nodes=16)
    outputs = {"copies": [20], "drafted": [20]}
    weights = {}
    for step in range(1, 6):
        asked = [request(name, text, output) for name, output in outputs.items()]
        source.find(asked)
        source.join(asked, [HostTree([100 + step], [0], [1], [0.6])] * 2)
        weights = {
            name: source.weights.weight(max(state.match, 1), state.evidence) for name, state in source.states.items()
        }
        outputs["copies"].append(20 + step)
        outputs["drafted"] += [100 + step, 20 + step]
    assert weights["copies"] < 0.2 < 0.8 < weights["drafted"]


def test_what_the_drafter_adds_is_learnt_by_the_length_of_the_match() -> None:
    source = Retrieval(SpecOptions(retrieval="request"), num_nodes=32)
    copied = list(range(20, 80))
    copying, new = request("copying", copied, copied[:LONGEST_MATCH]), request("new", [1], [2])
    source.find([copying, new])
    assert source.gain_of_drafter([copying]) == source.gain_of_drafter([new]) == FIRST_GAIN
    for step in range(30):
        # Both drafts are right.
        end = LONGEST_MATCH + step
        of_copy = HostTree(copied[end : end + 2], [0, 1], [1, 2], [0.9, 0.8])
        of_new = HostTree([100 + step, 101 + step], [0, 1], [1, 2], [0.9, 0.8])
        source.join([copying, new], [of_copy, of_new])
        copying.output_token_ids, new.output_token_ids = copied[: end + 1], [*new.output_token_ids, 100 + step]
        source.find([copying, new])
    after_copy, after_new = source.gain_of_drafter([copying]), source.gain_of_drafter([new])
    assert after_copy < 0.1 < 0.9 < after_new
    for end in range(LONGEST_MATCH + 31, 59):
        source.join([copying], [])
        copying.output_token_ids = copied[:end]
        source.find([copying])
    assert after_copy < source.gain_of_drafter([copying]) < FIRST_GAIN / 2


def test_answers_are_kept_to_a_number_and_prompts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "MAX_ANSWERS", 3)
    for which, tokens in (("request", []), ("request+answers", [43, 44])):
        source = Retrieval(SpecOptions(retrieval=which, retrieval_depth=2), num_nodes=8)
        for number in range(10):
            found_after(source, str(number), [1, 2, 3, 4], [40 + number % 5, 42, 43, 44])
            source.free([str(number)])
        assert len(source._trees.cached_requests) == (3 if tokens else 0) and not source.states
        assert found_after(source, "new", [90], [91, 42]).tokens == tokens
        assert found_after(source, "newer", [90], [91, 2]).tokens == []

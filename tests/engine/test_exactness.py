"""Same prompt, seed and sampling parameters give the answer of plain vLLM (float32)."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import (
    NUM_PROMPTS,
    SameCheck,
    assert_logprobs_are_equal,
    assert_prompt_logprobs_are_equal,
    complete,
    engine,
    generate,
    seeded,
)

SAMPLING = {
    "plain": {},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 20},
    "min_p": {"min_p": 0.05},
    "all": {"top_p": 0.95, "top_k": 50, "min_p": 0.02},
}

PENALTIES = {
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.7},
    "frequency": {"frequency_penalty": 0.4},
    "all": {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2},
}


def test_greedy_tokens_are_equal(same: SameCheck) -> None:
    same(SamplingParams(temperature=0, max_tokens=80))


def test_greedy_tokens_are_equal_one_request_at_a_time(plain: LLM, trees: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    for prompt in prompts:
        assert complete(trees, [prompt], params) == complete(plain, [prompt], params)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_a_seeded_request_gives_the_same_tokens(same: SameCheck, temperature: float, sampling: dict) -> None:
    same(seeded(NUM_PROMPTS, temperature=temperature, max_tokens=60, **sampling))


def test_a_seeded_request_gives_the_same_tokens_alone(plain: LLM, trees: LLM, prompts: list[list[int]]) -> None:
    for prompt, params in zip(prompts, seeded(NUM_PROMPTS, temperature=0.8, top_p=0.95, max_tokens=30)):
        assert complete(trees, [prompt], params) == complete(plain, [prompt], params)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("penalties", PENALTIES.values(), ids=PENALTIES)
def test_penalties_see_the_path_walked_so_far(same: SameCheck, temperature: float, penalties: dict) -> None:
    same(seeded(NUM_PROMPTS, temperature=temperature, max_tokens=60, **penalties))


def test_greedy_seeded_and_penalised_requests_share_a_batch(same: SameCheck) -> None:
    kinds = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "presence_penalty": 0.5, "top_k": 10}]
    same([SamplingParams(seed=index, max_tokens=50, **kinds[index % 3]) for index in range(NUM_PROMPTS)])


def test_min_tokens_logit_bias_bad_words_and_allowed_tokens_are_honoured_inside_a_path(
    same: SameCheck, prompts: list[list[int]], plain: LLM
) -> None:
    common = [answer.tokens for answer in complete(plain, prompts, SamplingParams(temperature=0, max_tokens=8))]
    stop = common[0][0]
    encode, decode = plain.get_tokenizer().encode, plain.get_tokenizer().decode
    # Of several tokens, so that a step may end inside a word. vLLM refuses words of spaces alone.
    words = [decode(tokens[at : at + 2]) for tokens in common[2::4] for at in (0, 3)]
    several = [word for word in words if word.strip() and len(encode(word)) > 1]
    assert several
    kinds = [
        {"min_tokens": 7, "stop_token_ids": [stop, common[1][0], common[2][0]]},
        {"logit_bias": {common[3][0]: -100.0, common[4][0]: 2.0}},
        {"bad_words": several},
        {"allowed_token_ids": list(range(256))},
    ]
    for temperature in (0.0, 0.9):
        same(
            [
                SamplingParams(temperature=temperature, seed=index, max_tokens=40, **kinds[index % 4])
                for index in range(NUM_PROMPTS)
            ]
        )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_of_returned_tokens_are_equal(
    plain: LLM, trees: LLM, prompts: list[list[int]], temperature: float
) -> None:
    params = seeded(NUM_PROMPTS, temperature=temperature, max_tokens=40, logprobs=3)
    assert_logprobs_are_equal(generate(trees, prompts, params), generate(plain, prompts, params), 3)


def test_prompt_logprobs_are_equal(plain: LLM, trees: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=1)
    assert_prompt_logprobs_are_equal(generate(trees, prompts[:8], params), generate(plain, prompts[:8], params))


def test_stop_strings_cut_inside_a_path(same: SameCheck, plain: LLM, prompts: list[list[int]]) -> None:
    free = complete(plain, prompts, SamplingParams(temperature=0, max_tokens=30))
    stops = [answer.text[20:24] for answer in free[:6] if len(answer.text) > 24]
    for kept in (False, True):
        answers = same(SamplingParams(temperature=0, max_tokens=80, stop=stops, include_stop_str_in_output=kept))
        assert any(answer.finish_reason == "stop" and answer.stop_reason in stops for answer in answers)


def test_stop_tokens_cut_inside_a_path(same: SameCheck, plain: LLM, prompts: list[list[int]]) -> None:
    free = complete(plain, prompts, SamplingParams(temperature=0, max_tokens=30))
    stops = sorted({answer.tokens[index % 20 + 3] for index, answer in enumerate(free)})
    answers = same(SamplingParams(temperature=0, max_tokens=80, stop_token_ids=stops))
    assert any(answer.finish_reason == "stop" and answer.stop_reason in stops for answer in answers)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 17])
def test_max_tokens_inside_a_path_gives_the_same_length(same: SameCheck, max_tokens: int) -> None:
    for answer in same(SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)):
        assert (len(answer.tokens), answer.finish_reason) == (max_tokens, "length")


def test_max_model_len_inside_a_path_gives_the_same_length(
    same: SameCheck, plain: LLM, trees: LLM, prompts: list[list[int]]
) -> None:
    text = [token for prompt in prompts for token in prompt]
    long_prompts = [text[: 512 - room] for room in range(1, 20)]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    expected = complete(plain, long_prompts, params)
    assert complete(trees, long_prompts, params) == expected
    assert [len(answer.tokens) for answer in expected] == list(range(1, 20))


@pytest.mark.parametrize(
    "spec",
    [{"tree": "chain"}, {"tree": "template"}, {"num_speculative_tokens": 1}, {"num_speculative_tokens": 63}],
    ids=lambda spec: "-".join(map(str, *spec.items())),
)
def test_every_kind_and_size_of_tree_is_exact(pair, plain: LLM, prompts: list[list[int]], spec: dict) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=40)
    sampled = seeded(NUM_PROMPTS, temperature=0.8, max_tokens=40)
    with engine(pair, spec) as other:
        for params in (greedy, sampled):
            assert complete(other, prompts, params) == complete(plain, prompts, params)


def test_compiled_mode_is_exact_and_the_second_engine_loads_what_the_first_compiled(
    pair, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled is vLLM's default; most tests are eager."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    params = [SamplingParams(temperature=0, max_tokens=60), seeded(NUM_PROMPTS, temperature=0.8, max_tokens=60)]
    answers, compiled = [], []
    for spec in ({}, {}, None):
        with engine(pair, spec, enforce_eager=False) as llm:
            answers.append([complete(llm, prompts, each) for each in params])
        targets = tmp_path.glob("torch_compile_cache/torch_aot_compile/*/*/model")
        compiled.append({(target, target.stat().st_mtime_ns) for target in targets})
    assert answers[0] == answers[1] == answers[2]
    assert len(compiled[0]) == 1 and compiled[0] == compiled[1]

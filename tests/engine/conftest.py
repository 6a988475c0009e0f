"""Real engines on CPU, over a tiny target and a drafter trained for it here (about a minute, then cached)."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from filelock import FileLock

# vLLM compiles with its own thread and process settings; a test run must not depend on the caller's.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from vllm import LLM, RequestOutput, SamplingParams

from tests.tiny_pair import TinyPair, build_tiny_pair
from vllm_ctc_spec.engine.lifetime import started

NUM_PROMPTS = 32
NUM_NODES = 32
IN_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The worker in the engine core's process: in one of its own, vLLM's default, it imports everything once more."""


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest) -> TinyPair:
    folder = request.config.cache.mkdir("ctc-tiny-pair")
    # `make test` has several processes, of which one trains.
    with FileLock(f"{folder}.lock"):
        return build_tiny_pair(folder)


Made = TypeVar("Made")


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[], Made]) -> Made:
    """What `make` returns, which can be pickled: one of the processes of `make test` makes it for all of them."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"{name}.pickle"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
    made: Made = pickle.loads(path.read_bytes())
    return made


@contextmanager
def engine(pair: TinyPair, spec: dict[str, Any] | None, **options: Any) -> Iterator[LLM]:
    """spec: our options beside method and model; None is plain vLLM."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": NUM_PROMPTS,
        "kv_cache_memory_bytes": 1 << 27,
        "disable_log_stats": False,
        "distributed_executor_backend": IN_CORE,
    }
    if spec is not None:
        # What an adaptive budget chooses depends on how long steps take; tests of trees need trees.
        ours = {"method": "ctc", "model": str(pair.drafter), "num_speculative_tokens": NUM_NODES}
        # Many tests compare with the drafter's trees alone.
        spec = {**ours, "adaptive_budget": False, "retrieval": "off", **spec}
    with started(str(pair.target), speculative_config=spec, **{**settings, **options}) as llm:
        yield llm
        # Two interpreters that come to their end by themselves take more than the five seconds that vLLM gives them.
        llm.llm_engine.engine_core.shutdown(timeout=0)


@pytest.fixture(scope="session")
def plain(pair: TinyPair) -> Iterator[LLM]:
    with engine(pair, None, distributed_executor_backend=None) as llm:
        yield llm


FIRST_ROW = {"prompt_token_ids": [5, 6], "token_ids": [7, 8, 9]}


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine of `trees` records what it serves. A server was killed here: the last row is cut."""
    path = tmp_path_factory.mktemp("record") / "rows.jsonl"
    line = json.dumps(FIRST_ROW, separators=(",", ":"))
    path.write_text(f"{line}\n{line[:30]}")
    return path


@pytest.fixture(scope="session")
def trees(pair: TinyPair, record: Path) -> Iterator[LLM]:
    spec = {"record": str(record), "record_limit_mb": 64}
    with engine(pair, spec, distributed_executor_backend=None) as llm:
        yield llm


@pytest.fixture(scope="session")
def prompts(pair: TinyPair, plain: LLM) -> list[list[int]]:
    """Token ids, from one token to some two hundred."""
    tokenizer = plain.get_tokenizer()
    rows = [json.loads(line)["prompt"] for line in pair.prompts.open(encoding="utf-8")]
    tokens = [token for row in rows for token in tokenizer.encode(row)]
    lengths = [1 + (index * 37) % 200 for index in range(NUM_PROMPTS)]
    starts = [sum(lengths[:index]) % (len(tokens) - 200) for index in range(NUM_PROMPTS)]
    return [tokens[start : start + length] for start, length in zip(starts, lengths)]


@dataclass(frozen=True)
class Completion:
    """All that a user sees of one answer."""

    tokens: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None


def complete(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Completion]:
    return [_completion(output) for output in generate(llm, prompts, params)]


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def _completion(output: RequestOutput) -> Completion:
    answer = output.outputs[0]
    return Completion(list(answer.token_ids), answer.text, answer.finish_reason, answer.stop_reason)


def num_preemptions(llm: LLM) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def assert_a_cached_prefix_changes_no_token(
    llm: LLM, plain: LLM, prompts: list[list[int]], params: SamplingParams
) -> None:
    """One long prompt, twice, by an engine that caches prefixes; greedy."""
    long_prompt = [token for prompt in prompts for token in prompt][:400]
    expected = complete(plain, [long_prompt], params)
    first, second = generate(llm, [long_prompt], params)[0], generate(llm, [long_prompt], params)[0]
    assert second.num_cached_tokens >= 256
    assert list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids) == expected[0].tokens


def seeded(count: int, **params: Any) -> list[SamplingParams]:
    return [SamplingParams(seed=1000 + index, **params) for index in range(count)]


SameCheck = Callable[[SamplingParams | list[SamplingParams]], list[Completion]]


@pytest.fixture
def same(plain: LLM, trees: LLM, prompts: list[list[int]]) -> SameCheck:
    """Assert that both engines give every prompt the same answer, in one batch; returns the answers."""

    def check(params: SamplingParams | list[SamplingParams]) -> list[Completion]:
        expected = complete(plain, prompts, params)
        assert complete(trees, prompts, params) == expected
        return expected

    return check


def assert_logprobs_are_equal(got: list[RequestOutput], expected: list[RequestOutput], number: int) -> None:
    """Of the tokens returned, with the ranks of these and the `number` largest of each place."""
    for ours, theirs in zip((each.outputs[0] for each in got), (each.outputs[0] for each in expected), strict=True):
        assert ours.token_ids == theirs.token_ids and ours.logprobs and theirs.logprobs
        for token, mine, reference in zip(ours.token_ids, ours.logprobs, theirs.logprobs, strict=True):
            assert math.isclose(mine[token].logprob, reference[token].logprob, abs_tol=1e-4)
            # By place, not by token: rounding may order two equally probable ones either way.
            assert abs(mine[token].rank - reference[token].rank) <= 1
            places = [sorted((entry.logprob for entry in each.values()), reverse=True) for each in (mine, reference)]
            for value, other in zip(*(place[:number] for place in places), strict=True):
                assert math.isclose(value, other, abs_tol=1e-4)


def assert_prompt_logprobs_are_equal(got: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.prompt_logprobs and theirs.prompt_logprobs
        for mine, reference in zip(ours.prompt_logprobs, theirs.prompt_logprobs, strict=True):
            assert (mine is None) == (reference is None)
            for token, entry in (reference or {}).items():
                assert math.isclose(mine[token].logprob, entry.logprob, abs_tol=1e-4)

"""Real engines on a CPU with a tiny target and its drafter, trained here in about a minute and then cached."""

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

# Before the import of vLLM, which sets up logging.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from vllm import LLM, RequestOutput, SamplingParams

from tests.tiny_pair import TinyPair, build_tiny_pair
from vllm_ctc_spec.engine.lifetime import started

NUM_PROMPTS = 32
NUM_NODES = 32
IN_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the worker in the engine core's process. vLLM's default is one more process, with all imports again."""


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest) -> TinyPair:
    folder = request.config.cache.mkdir("ctc-tiny-pair")
    # One process of `make test` trains; the others wait.
    with FileLock(f"{folder}.lock"):
        return build_tiny_pair(folder)


Made = TypeVar("Made")


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[], Made]) -> Made:
    """The result of `make`, which one process of `make test` calls for all; it must be picklable."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"{name}.pickle"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
    made: Made = pickle.loads(path.read_bytes())
    return made


@contextmanager
def engine(pair: TinyPair, spec: dict[str, Any] | None, **options: Any) -> Iterator[LLM]:
    """spec: keys of `speculative_config` besides method and model; None for plain vLLM."""
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
        # The choices of an adaptive budget depend on measured times.
        ours = {"method": "ctc", "model": str(pair.drafter), "num_speculative_tokens": NUM_NODES}
        # Many tests expect trees of the drafter alone.
        spec = {**ours, "adaptive_budget": False, "retrieval": "off", **spec}
    with started(str(pair.target), speculative_config=spec, **{**settings, **options}) as llm:
        yield llm
        # Engine core and worker take longer to exit than vLLM's limit of five seconds.
        llm.llm_engine.engine_core.shutdown(timeout=0)


@pytest.fixture(scope="session")
def plain(pair: TinyPair) -> Iterator[LLM]:
    with engine(pair, None, distributed_executor_backend=None) as llm:
        yield llm


FIRST_ROW = {"prompt_token_ids": [5, 6], "token_ids": [7, 8, 9]}


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of `record` of the engine `trees`. It begins with a whole row and a cut one, as after a kill."""
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
    """Token ids of NUM_PROMPTS prompts of 1 to 200 tokens."""
    tokenizer = plain.get_tokenizer()
    rows = [json.loads(line)["prompt"] for line in pair.prompts.open(encoding="utf-8")]
    tokens = [token for row in rows for token in tokenizer.encode(row)]
    lengths = [1 + (index * 37) % 200 for index in range(NUM_PROMPTS)]
    starts = [sum(lengths[:index]) % (len(tokens) - 200) for index in range(NUM_PROMPTS)]
    return [tokens[start : start + length] for start, length in zip(starts, lengths)]


@dataclass(frozen=True)
class Completion:
    """What vLLM returns for one request."""

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
    """Send one long prompt twice, greedy; the second answer reads cached blocks."""
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
    """Compare log probability and rank of each token, and the `number` largest log probabilities at its position."""
    for ours, theirs in zip((each.outputs[0] for each in got), (each.outputs[0] for each in expected), strict=True):
        assert ours.token_ids == theirs.token_ids and ours.logprobs and theirs.logprobs
        for token, mine, reference in zip(ours.token_ids, ours.logprobs, theirs.logprobs, strict=True):
            assert math.isclose(mine[token].logprob, reference[token].logprob, abs_tol=1e-4)
            # Rounding may swap two equally probable tokens.
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

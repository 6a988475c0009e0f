"""Real engines on CPU, over a tiny target and a drafter trained for it here (about a minute, then cached)."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
        spec = {**ours, "adaptive_budget": False, **spec}
    with started(str(pair.target), speculative_config=spec, **{**settings, **options}) as llm:
        yield llm
        # Two interpreters that come to their end by themselves take more than the five seconds that vLLM gives them.
        llm.llm_engine.engine_core.shutdown(timeout=0)


@pytest.fixture(scope="session")
def plain(pair: TinyPair) -> Iterator[LLM]:
    with engine(pair, None, distributed_executor_backend=None) as llm:
        yield llm


@pytest.fixture(scope="session")
def trees(pair: TinyPair) -> Iterator[LLM]:
    with engine(pair, {}, distributed_executor_backend=None) as llm:
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

"""The defaults: adaptive budget, retrieval, compiled target, our executor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.config import CompilationMode

from tests.engine.conftest import NUM_PROMPTS, complete, engine, seeded
from tests.engine.probe import decide_by_rule, record_trees, recorded_trees
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.checkpoint import check_drafter
from vllm_ctc_spec.engine.executor import CTCExecutor
from vllm_ctc_spec.engine.settings import DEFAULT_NUM_NODES, EngineSettings


@pytest.fixture(scope="module")
def default(pair: TinyPair) -> Iterator[LLM]:
    """In float32, because other types may change near-ties."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        options: dict[str, Any] = {"enforce_eager": False, "distributed_executor_backend": None}
        defaults = {"adaptive_budget": SpecOptions().adaptive_budget, "retrieval": SpecOptions().retrieval}
        with engine(pair, defaults, **options) as llm:
            yield llm


def test_all_defaults_are_in_effect(pair: TinyPair, default: LLM) -> None:
    config = default.llm_engine.vllm_config
    layers = tuple(check_drafter(str(pair.drafter)).target_layers)
    expected = EngineSettings(str(pair.drafter), DEFAULT_NUM_NODES, SpecOptions(retrieval="request"), layers)
    assert EngineSettings.from_dict(config.additional_config["ctc_spec"]) == expected and expected.options.adapts
    assert config.compilation_config.mode != CompilationMode.NONE
    assert config.parallel_config.distributed_executor_backend == f"{CTCExecutor.__module__}.{CTCExecutor.__name__}"
    assert default.collective_rpc(has_budget) == [True]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_plain_vllms(plain: LLM, default: LLM, prompts: list[list[int]], temperature: float) -> None:
    params = seeded(NUM_PROMPTS, temperature=temperature, max_tokens=60)
    assert complete(default, prompts, params) == complete(plain, prompts, params)
    alone = SamplingParams(temperature=temperature, seed=5, max_tokens=60)
    for prompt in prompts[:4]:
        assert complete(default, [prompt], alone) == complete(plain, [prompt], alone)


def test_answers_do_not_depend_on_what_the_budget_decides(plain: LLM, default: LLM, prompts: list[list[int]]) -> None:
    """Keep this test last: it replaces the budget's plan by `decide_by_rule`."""
    default.collective_rpc(decide_by_rule)
    default.collective_rpc(record_trees)
    params = seeded(NUM_PROMPTS, temperature=0.8, max_tokens=40)
    assert complete(default, prompts, params) == complete(plain, prompts, params)
    [recorded] = default.collective_rpc(recorded_trees)
    sizes = [len(each.tree.tokens) for each in recorded]
    assert min(sizes) < 4 and max(sizes) == DEFAULT_NUM_NODES


def has_budget(worker: Any) -> bool:
    return worker.model_runner.control is not None

"""A target some of whose layers have a window, so that vLLM keeps several groups of blocks, which share memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig
from vllm import LLM, SamplingParams

from tests.engine.conftest import IN_CORE, complete, generate
from tests.engine.families import FULL, GATED, TREES, WINDOW, WINDOWED, write_drafter
from vllm_ctc_spec.engine.lifetime import started
from vllm_ctc_spec.engine.metrics import read_tree_metrics

NUM_PROMPTS = 6
SHARED = [index * index % 61 for index in range(100)]
PROMPTS = [[*SHARED, index, *range(1, 4 * index)] for index in range(NUM_PROMPTS)]
"""Token ids: of two windows and more, in several chunks."""
LENGTH = 60


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target of two groups, and a drafter."""
    folder = tmp_path_factory.mktemp("windows")
    torch.manual_seed(0)
    sizes = {**GATED, **WINDOW, "num_hidden_layers": 3, "max_position_embeddings": 256, "sliding_window": 20}
    config = Gemma3TextConfig(**sizes, layer_types=[WINDOWED, FULL, WINDOWED])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "target")
    write_drafter(AutoConfig.from_pretrained(folder / "target"), folder / "drafter")
    return folder


@contextmanager
def engine(pair: Path, **options: Any) -> Iterator[LLM]:
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    settings |= {"max_model_len": 256, "max_num_seqs": NUM_PROMPTS, "max_num_batched_tokens": 64, "block_size": 32}
    settings |= {"kv_cache_memory_bytes": 1 << 26, "disable_log_stats": False, "distributed_executor_backend": IN_CORE}
    with started(str(pair / "target"), **settings, **options) as llm:
        yield llm
        llm.llm_engine.engine_core.shutdown(timeout=0)


def spec(pair: Path, **options: Any) -> dict[str, Any]:
    return {"method": "ctc", "model": str(pair / "drafter"), **TREES, **options}


def params(**sampling: Any) -> list[SamplingParams]:
    return [
        SamplingParams(seed=index, max_tokens=LENGTH - 5 * index, ignore_eos=True, **sampling)
        for index in range(NUM_PROMPTS)
    ]


KINDS = {"greedy": params(temperature=0), "seeded": params(temperature=0.8, top_p=0.95)}


@pytest.fixture(scope="module")
def expected(pair: Path) -> dict[str, list[Any]]:
    with engine(pair) as llm:
        return {kind: complete(llm, PROMPTS, each) for kind, each in KINDS.items()}


def test_chunks_preemption_and_cached_prefixes_are_exact(pair: Path, expected: dict[str, list[Any]]) -> None:
    with engine(pair, speculative_config=spec(pair), num_gpu_blocks_override=24) as llm:
        for kind, each in KINDS.items():
            assert complete(llm, PROMPTS, each) == expected[kind]
        [again] = generate(llm, PROMPTS[:1], KINDS["greedy"][:1])
        assert list(again.outputs[0].token_ids) == expected["greedy"][0].tokens
        assert again.num_cached_tokens >= 96
        assert sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions") > 0
        metrics = read_tree_metrics(llm)
    assert metrics is not None and metrics.acceptance_length > 1.05


def test_steps_without_drafts_between_others_are_exact(
    pair: Path, expected: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows wait in other targets; here blocks go from group to group meanwhile."""
    from tests.engine.probe import decide_by_rule

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    adaptive = spec(pair, adaptive_budget=True)
    with engine(pair, speculative_config=adaptive, num_gpu_blocks_override=24) as llm:
        assert llm.collective_rpc(decide_by_rule) == [True]
        for kind, each in KINDS.items():
            assert complete(llm, PROMPTS, each) == expected[kind]


def test_one_group_for_all_layers_is_exact(pair: Path, expected: dict[str, list[Any]]) -> None:
    with engine(pair, speculative_config=spec(pair), disable_hybrid_kv_cache_manager=True) as llm:
        for kind, each in KINDS.items():
            assert complete(llm, PROMPTS, each) == expected[kind]

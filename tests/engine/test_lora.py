"""Requests with and without LoRA adapters, in one batch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest

from tests.engine.adapters import LORA, write_adapter
from tests.engine.conftest import NUM_PROMPTS, engine
from tests.engine.probe import embeddings_and_unit_logits
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.engine.metrics import read_tree_metrics

OPTIONS = {**LORA, "enable_prefix_caching": True, "max_num_batched_tokens": 8192}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest | None]:
    """None for the target alone, and two adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    return [None, write_adapter(folder / "first", 1), write_adapter(folder / "second", 2)]


@pytest.fixture(scope="module")
def plain_lora(pair: TinyPair) -> Iterator[LLM]:
    with engine(pair, None, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def rows_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of `record` of the engine `trees_lora`."""
    return tmp_path_factory.mktemp("record") / "rows.jsonl"


@pytest.fixture(scope="module")
def trees_lora(pair: TinyPair, rows_lora: Path) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with engine(pair, {"record": str(rows_lora)}, **OPTIONS) as llm:
            yield llm


def ask(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], adapters: list[LoRARequest | None]
) -> list[RequestOutput]:
    """Request i has adapter i modulo the number of adapters; all are one batch."""
    requests: Any = [adapters[index % len(adapters)] for index in range(len(prompts))]
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, lora_request=requests, use_tqdm=False
    )


def mixed_params(max_tokens: int = 40) -> list[SamplingParams]:
    """Two kinds in turn, so that each of the three adapters gets both."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    ]
    return [
        SamplingParams(seed=index, max_tokens=max_tokens, logprobs=0, **kinds[index % 2])
        for index in range(NUM_PROMPTS)
    ]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprobs_of(outputs: list[RequestOutput]) -> list[float]:
    answers = [output.outputs[0] for output in outputs]
    return [entry[token].logprob for each in answers for token, entry in zip(each.token_ids, each.logprobs or [])]


def test_a_batch_with_adapters_and_without_is_answered_as_by_plain_vllm(
    plain_lora: LLM, trees_lora: LLM, prompts: list[list[int]], adapters: list[LoRARequest | None]
) -> None:
    params = mixed_params()
    for turned in (adapters, adapters[1:] + adapters[:1], adapters):
        expected, got = (ask(llm, prompts, params, turned) for llm in (plain_lora, trees_lora))
        assert tokens_of(got) == tokens_of(expected)
        assert len(logprobs_of(got)) == sum(map(len, tokens_of(expected)))
        for ours, theirs in zip(logprobs_of(got), logprobs_of(expected), strict=True):
            assert math.isclose(ours, theirs, abs_tol=1e-4)
    # The last batch reads the cached blocks of the first, and not those of the second, which has other adapters.
    assert all(output.num_cached_tokens for output in got if len(output.prompt_token_ids or []) > 150)
    metrics = read_tree_metrics(trees_lora)
    assert metrics is not None and metrics.acceptance_length > 1.1


def test_an_adapter_changes_the_answer(
    trees_lora: LLM, prompts: list[list[int]], adapters: list[LoRARequest | None]
) -> None:
    params = [SamplingParams(temperature=0, max_tokens=20)] * len(prompts)
    alone, first, second = (tokens_of(ask(trees_lora, prompts, params, [adapter])) for adapter in adapters)
    assert not any(one == other for one, other in zip(alone, first))
    assert not any(one == other for one, other in zip(first, second))


def test_answers_with_an_adapter_are_not_recorded_as_the_targets(
    trees_lora: LLM, rows_lora: Path, prompts: list[list[int]], adapters: list[LoRARequest | None]
) -> None:
    rows_lora.unlink()
    params = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)] * len(prompts)
    answers = tokens_of(ask(trees_lora, prompts, params, adapters))
    rows = [json.loads(line) for line in rows_lora.read_text().splitlines()]
    recorded = [(row["prompt_token_ids"], row["token_ids"]) for row in rows]
    assert sorted(recorded) == sorted(zip(prompts[::3], answers[::3]))


def test_the_drafter_uses_embedding_and_lm_head_without_adapters(
    pair: TinyPair, trees_lora: LLM, prompts: list[list[int]], adapters: list[LoRARequest | None]
) -> None:
    """After a step in which every row has an adapter."""
    ask(trees_lora, prompts, mixed_params(max_tokens=4), adapters[1:])
    weight = load_file(pair.target / "model.safetensors")["model.embed_tokens.weight"].float()
    [found] = trees_lora.collective_rpc(embeddings_and_unit_logits)
    torch.testing.assert_close(found["embeddings"], weight, rtol=0, atol=0)
    torch.testing.assert_close(found["unit logits"], weight.T)


def test_the_cost_of_steps_is_measured_with_adapters(
    pair: TinyPair, plain_lora: LLM, prompts: list[list[int]], adapters: list[LoRARequest | None]
) -> None:
    expected = tokens_of(ask(plain_lora, prompts, mixed_params(), adapters))
    with engine(pair, {"adaptive_budget": True}, **OPTIONS) as llm:
        assert tokens_of(ask(llm, prompts, mixed_params(), adapters)) == expected

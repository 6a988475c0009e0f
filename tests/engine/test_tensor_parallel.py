"""Several ranks of tensor parallelism: plain vLLM's answers on as many, and one tree for all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.conftest import NUM_NODES, NUM_PROMPTS, complete, engine, generate, seeded
from tests.engine.probe import (
    decide_by_rule,
    draft_otherwise,
    proposed_tokens,
    record_proposals,
    record_trees,
    recorded_trees,
)
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.config import CTCDrafterConfig, SpecOptions
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.drafter.checkpoint import load_drafter
from vllm_ctc_spec.drafter.drafting import set_tables_from
from vllm_ctc_spec.engine.metrics import read_tree_metrics
from vllm_ctc_spec.engine.plugin import EXECUTOR
from vllm_ctc_spec.reference import draft, run_target

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ranks_on_any_cores() -> Iterator[None]:
    """vLLM would look for a NUMA node for each rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        yield


def ranks(
    pair: TinyPair, spec: dict[str, Any] | None, num_ranks: int = 2, **options: Any
) -> AbstractContextManager[LLM]:
    return engine(pair, spec, tensor_parallel_size=num_ranks, distributed_executor_backend=None, **options)


@pytest.fixture(scope="module")
def plain_ranks(pair: TinyPair) -> Iterator[LLM]:
    with ranks(pair, None) as llm:
        yield llm


@pytest.fixture(scope="module")
def tree_ranks(pair: TinyPair) -> Iterator[LLM]:
    with ranks(pair, {}) as llm:
        yield llm


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.02},
    {"temperature": 0.7, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.8, "structured_outputs": StructuredOutputsParams(regex=r"(ab|cd)[0-9]{6}x")},
]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=60),
        seeded(NUM_PROMPTS, temperature=0.8, max_tokens=60),
        [SamplingParams(seed=index, max_tokens=40, **MIXED[index % len(MIXED)]) for index in range(NUM_PROMPTS)],
    ],
    ids=["greedy", "seeded", "mixed"],
)
def test_tokens_are_plain_vllms_on_as_many_ranks(
    plain_ranks: LLM, tree_ranks: LLM, prompts: list[list[int]], params: Any
) -> None:
    assert tree_ranks.llm_engine.vllm_config.parallel_config.distributed_executor_backend == EXECUTOR
    assert complete(tree_ranks, prompts, params) == complete(plain_ranks, prompts, params)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_log_probabilities_are_plain_vllms(
    plain_ranks: LLM, tree_ranks: LLM, prompts: list[list[int]], temperature: float
) -> None:
    params = seeded(NUM_PROMPTS, temperature=temperature, max_tokens=30, logprobs=2)
    for expected, got in zip(generate(plain_ranks, prompts, params), generate(tree_ranks, prompts, params)):
        [theirs], [ours] = expected.outputs, got.outputs
        assert ours.token_ids == theirs.token_ids
        for token, mine, reference in zip(ours.token_ids, ours.logprobs, theirs.logprobs, strict=True):
            assert math.isclose(mine[token].logprob, reference[token].logprob, abs_tol=1e-4)


def test_two_ranks_draft_and_accept_what_one_does(pair: TinyPair, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    seen = []
    for num_ranks in (1, 2):
        with ranks(pair, {}, num_ranks) as llm:
            seen.append((complete(llm, prompts, params), read_tree_metrics(llm)))
    (one_answer, one), (two_answer, two) = seen
    assert two_answer == one_answer
    assert one is not None and two is not None
    assert two.acceptance_length > 1.3
    assert two.acceptance_length == pytest.approx(one.acceptance_length, abs=0.02)
    assert two.nodes_per_step == pytest.approx(one.nodes_per_step, abs=0.5)


def test_chunks_preemption_and_cached_prefixes_change_nothing(
    pair: TinyPair, plain_ranks: LLM, prompts: list[list[int]]
) -> None:
    params = seeded(NUM_PROMPTS, temperature=0.8, max_tokens=120, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=40)
    long_prompt = [token for prompt in prompts for token in prompt][:400]
    options = {"num_gpu_blocks_override": 24, "block_size": 32, "max_num_batched_tokens": 256}
    with ranks(pair, {}, **options) as small:
        assert complete(small, prompts, params) == complete(plain_ranks, prompts, params)
        preemptions = [metric.value for metric in small.get_metrics() if metric.name == "vllm:num_preemptions"]
        [expected] = complete(plain_ranks, [long_prompt], greedy)
        [first], [second] = (generate(small, [long_prompt], greedy) for _ in range(2))
    assert sum(preemptions) > 0
    assert second.num_cached_tokens >= 256
    assert list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids) == expected.tokens


def test_every_rank_verifies_the_trees_of_the_first(pair: TinyPair, plain_ranks: LLM, prompts: list[list[int]]) -> None:
    """The second rank's drafter is another one, and only the first has a budget."""
    params = seeded(NUM_PROMPTS, temperature=0.8, max_tokens=40)
    with ranks(pair, {"adaptive_budget": True}) as llm:
        assert llm.collective_rpc(decide_by_rule) == [True, False]
        for probe in (draft_otherwise, record_proposals, record_trees):
            llm.collective_rpc(probe)
        answers = complete(llm, prompts, params)
        first_proposed, second_proposed = llm.collective_rpc(proposed_tokens)
        first, second = ([(each.text, each.tree) for each in trees] for trees in llm.collective_rpc(recorded_trees))
    assert answers == complete(plain_ranks, prompts, params)
    assert len(first_proposed) == len(second_proposed) and first_proposed != second_proposed
    assert first == second
    sizes = [len(tree.tokens) for _, tree in first]
    assert min(sizes) < 4 and max(sizes) == NUM_NODES


@pytest.fixture(scope="module")
def wide(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """Untrained: two key-value heads, a vocabulary that is no multiple of what is padded to, and a part of it drafted.

    Its weights are large, so that probabilities differ by more than rounding.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    sizes = {
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
    }
    head_dim = 32
    target = LlamaConfig(num_hidden_layers=2, head_dim=head_dim, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(target).save_pretrained(folder / "target")
    AutoTokenizer.from_pretrained(pair.target).save_pretrained(folder / "target")
    drafter = CTCDrafter(CTCDrafterConfig(head_dim=head_dim, condition_rank=32, target_layers=[1], **sizes))
    drafter.draft_only(torch.randperm(500)[:150])
    drafter.save_pretrained(folder / "drafter")
    return dataclasses.replace(pair, target=folder / "target", drafter=folder / "drafter")


@pytest.mark.parametrize(("name", "num_ranks"), [("pair", 2), ("wide", 2), ("wide", 4)])
@torch.inference_mode()
def test_trees_are_those_of_the_reference_loop(
    request: pytest.FixtureRequest, prompts: list[list[int]], name: str, num_ranks: int
) -> None:
    """Of which the drafter is whole: with as many key-value heads as ranks, with fewer, and with a single one."""
    pair: TinyPair = request.getfixturevalue(name)
    with ranks(pair, {}, num_ranks) as llm:
        llm.collective_rpc(record_trees)
        known = [[token % 500 for token in prompt] for prompt in prompts[:6]]
        generate(llm, known, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        every, *_ = llm.collective_rpc(recorded_trees)
    assert len(every) > 10
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()
    drafter = load_drafter(str(pair.drafter), torch.float32)
    set_tables_from(drafter, target)
    for each in every[::3]:
        hidden = run_target(target, drafter.config.target_layers, torch.tensor([each.text[:-1]]))
        tree = draft(target, drafter, hidden, each.text[-2:], NUM_NODES, SpecOptions())
        psi = torch.tensor(each.tree.probabilities, dtype=torch.float32)
        torch.testing.assert_close(psi, tree.prefix_logp.exp()[0, : len(psi)], rtol=1e-3, atol=1e-4)
        assert each.tree.tokens[0] == int(tree.tokens[0, 0])


def test_compiled_ranks_are_exact_and_load_what_ranks_before_them_compiled(
    pair: TinyPair, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's default, with the adaptive budget, which is ours."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    params = seeded(NUM_PROMPTS, temperature=0.8, max_tokens=60)
    answers, compiled = [], []
    for spec in ({"adaptive_budget": True}, {"adaptive_budget": True}, None):
        with ranks(pair, spec, enforce_eager=False) as llm:
            answers.append(complete(llm, prompts, params))
        targets = tmp_path.glob("torch_compile_cache/torch_aot_compile/*/*/model")
        compiled.append({(target, target.stat().st_mtime_ns) for target in targets})
    assert answers[0] == answers[1] == answers[2]
    # One for each rank.
    assert len(compiled[0]) == 2 and compiled[0] == compiled[1]

"""Tensor parallel: answers are plain vLLM's on as many ranks, and all ranks verify the same trees."""

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

from tests.engine.conftest import NUM_NODES, engine, generate, made_once, num_preemptions
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

NUM_REQUESTS = 12


@pytest.fixture(scope="module", autouse=True)
def ranks_on_any_cores() -> Iterator[None]:
    """Otherwise vLLM asks for a NUMA node for each rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        yield


def ranks(
    pair: TinyPair, spec: dict[str, Any] | None, num_ranks: int = 2, **options: Any
) -> AbstractContextManager[LLM]:
    return engine(pair, spec, tensor_parallel_size=num_ranks, distributed_executor_backend=None, **options)


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "logprobs": 2},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.02},
    {"temperature": 0.7, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.8, "structured_outputs": StructuredOutputsParams(regex=r"(ab|cd)[0-9]{6}x")},
    {"temperature": 0.0, "logprobs": 2},
]

LONG = SamplingParams(temperature=0.8, seed=7, max_tokens=100, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Answer:
    tokens: list[int]
    text: str
    finish_reason: str | None
    logprobs: list[float]
    """Of the returned tokens, if requested."""


def ask(llm: LLM, prompts: list[list[int]], params: Any) -> list[Answer]:
    answers = [output.outputs[0] for output in generate(llm, prompts, params)]
    return [
        Answer(
            list(answer.token_ids),
            answer.text,
            answer.finish_reason,
            [entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs or [])],
        )
        for answer in answers
    ]


def ask_mixed(llm: LLM, prompts: list[list[int]]) -> list[Answer]:
    kinds = [SamplingParams(seed=i, max_tokens=40, **MIXED[i % len(MIXED)]) for i in range(NUM_REQUESTS)]
    return ask(llm, prompts[:NUM_REQUESTS], kinds)


def assert_equal(got: list[Answer], expected: list[Answer]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert dataclasses.replace(ours, logprobs=[]) == dataclasses.replace(theirs, logprobs=[])
        for mine, reference in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert math.isclose(mine, reference, abs_tol=1e-4)


@pytest.fixture(scope="module")
def long_prompt(prompts: list[list[int]]) -> list[int]:
    return [token for prompt in prompts for token in prompt][:400]


@pytest.fixture(scope="module")
def expected(
    pair: TinyPair, prompts: list[list[int]], long_prompt: list[int], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Answer]]:
    """Plain vLLM's answers on two ranks."""

    def answer() -> dict[str, list[Answer]]:
        with ranks(pair, None) as llm:
            return {
                "mixed": ask_mixed(llm, prompts),
                "long": ask(llm, prompts[:NUM_REQUESTS], LONG),
                "cached": ask(llm, [long_prompt], SamplingParams(temperature=0, max_tokens=40)),
            }

    return made_once(tmp_path_factory, "plain-ranks", answer)


def test_two_ranks_answer_as_plain_vllm_and_draft_as_the_reference_loop(
    pair: TinyPair, expected: dict[str, list[Answer]], prompts: list[list[int]], long_prompt: list[int]
) -> None:
    """Prompts are read in chunks, long answers are preempted, and one prompt is cached."""
    greedy = SamplingParams(temperature=0, max_tokens=40)
    options = {"num_gpu_blocks_override": 40, "block_size": 32, "max_num_batched_tokens": 256}
    with ranks(pair, {}, **options) as llm:
        assert llm.llm_engine.vllm_config.parallel_config.distributed_executor_backend == EXECUTOR
        assert_equal(ask_mixed(llm, prompts), expected["mixed"])
        assert_equal(ask(llm, prompts[:NUM_REQUESTS], LONG), expected["long"])
        assert num_preemptions(llm) > 0
        assert_equal(ask(llm, [long_prompt], greedy), expected["cached"])
        [again] = generate(llm, [long_prompt], greedy)
        assert list(again.outputs[0].token_ids) == expected["cached"][0].tokens
        assert again.num_cached_tokens >= 256
        metrics = read_tree_metrics(llm)
        assert metrics is not None and metrics.acceptance_length > 1.3
        assert_trees_are_those_of_the_reference_loop(llm, pair, prompts)


@torch.inference_mode()
def assert_trees_are_those_of_the_reference_loop(llm: LLM, pair: TinyPair, prompts: list[list[int]]) -> None:
    """The reference loop's drafter is not divided between ranks."""
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


@pytest.fixture(scope="module")
def wide(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """An untrained pair: two key-value heads, a vocabulary that needs padding, of which a part is drafted.

    Large weights make probabilities differ by more than rounding.
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


def test_four_ranks_with_copies_of_two_key_value_heads_draft_as_the_reference_loop(
    wide: TinyPair, prompts: list[list[int]]
) -> None:
    with ranks(wide, {}, num_ranks=4) as llm:
        assert_trees_are_those_of_the_reference_loop(llm, wide, prompts)


def test_compiled_ranks_load_the_compile_cache_and_verify_the_first_ranks_trees(
    pair: TinyPair,
    expected: dict[str, list[Answer]],
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all defaults. In the second engine the second rank's drafter differs from the first's."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    compiled = []
    for is_second in (False, True):
        with ranks(pair, {"adaptive_budget": True, "retrieval": "auto"}, enforce_eager=False) as llm:
            if is_second:
                # Only the first rank has a budget.
                assert llm.collective_rpc(decide_by_rule) == [True, False]
                for probe in (draft_otherwise, record_proposals, record_trees):
                    llm.collective_rpc(probe)
            assert_equal(ask_mixed(llm, prompts), expected["mixed"])
            targets = tmp_path.glob("torch_compile_cache/torch_aot_compile/*/*/model")
            compiled.append({(target, target.stat().st_mtime_ns) for target in targets})
            if is_second:
                first_proposed, second_proposed = llm.collective_rpc(proposed_tokens)
                first, second = (
                    [(each.text, each.tree) for each in trees] for trees in llm.collective_rpc(recorded_trees)
                )
    # One for each rank.
    assert len(compiled[0]) == 2 and compiled[0] == compiled[1]
    assert len(first_proposed) == len(second_proposed) and first_proposed != second_proposed
    assert first == second
    sizes = [len(tree.tokens) for _, tree in first]
    assert min(sizes) < 4 and max(sizes) == NUM_NODES

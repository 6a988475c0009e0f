"""The CUDA path in the real engine: vLLM's TRITON_ATTN backend and our kernels, interpreted."""

from __future__ import annotations

import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import complete, engine, seeded
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.engine import plugin
from vllm_ctc_spec.engine.metrics import read_tree_metrics

NUM_REQUESTS = 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worker", "attention"),
    [("InterpretedWorker", "TritonTreeAttention"), ("XformersWorker", "XformersTreeAttention")],
)
def test_trees_over_vllms_gpu_cache_change_no_token(
    worker: str,
    attention: str,
    pair: TinyPair,
    plain: LLM,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = [prompt[:20] for prompt in prompts[1 : NUM_REQUESTS + 1]]
    greedy = SamplingParams(temperature=0, max_tokens=16)
    sampling = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 10}
    sampled = seeded(NUM_REQUESTS, **sampling)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(plugin.WORKERS, "cpu", f"tests.engine.interpreted.{worker}")
    # A step has so few tokens that prompts are read beside other requests' trees.
    options = {"max_num_seqs": NUM_REQUESTS, "max_num_batched_tokens": 48, "max_model_len": 64, "block_size": 32}
    with engine(pair, {"num_speculative_tokens": 12}, **options) as llm:
        answers = [complete(llm, few, params) for params in (greedy, sampled)]
        [seen] = llm.collective_rpc("what_was_seen")
        metrics = read_tree_metrics(llm)
        llm.collective_rpc("sample_as_on_a_gpu")
        at_once = complete(llm, few, sampled)
        # With log probabilities the walk goes level by level, with vLLM's sampler.
        by_levels = complete(llm, few, seeded(NUM_REQUESTS, **sampling, logprobs=0))
    assert answers == [complete(plain, few, params) for params in (greedy, sampled)]
    assert at_once == by_levels != answers[1]
    assert metrics is not None and metrics.acceptance_length > 1.2
    assert seen["attention"] == attention
    assert min(seen["whole"], seen["mixed"], seen["moves"], seen["captured"]) > 0, seen

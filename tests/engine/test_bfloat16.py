"""In bfloat16 answers may differ at near-ties, because batched matrix products round differently.

At the first difference of two answers the logits of plain vLLM must be a near-tie.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from tests.engine.conftest import complete, engine, generate
from tests.engine.quantized import FORMATS, quantize
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.bench.equality import first_difference, gap_between, is_near_tie
from vllm_ctc_spec.bench.worker import scores
from vllm_ctc_spec.engine.metrics import read_tree_metrics


@pytest.mark.parametrize("quantization", [None, *FORMATS])
def test_greedy_answers_differ_at_near_ties_only(
    pair: TinyPair, prompts: list[list[int]], quantization: str | None, tmp_path: Path
) -> None:
    """Also with a quantized target, which both engines serve."""
    if quantization is not None:
        quantize(pair.target, quantization, tmp_path / "target")
        pair = replace(pair, target=tmp_path / "target")
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with engine(pair, {}, dtype="bfloat16") as llm:
        trees = [answer.tokens for answer in complete(llm, prompts, params)]
        metrics = read_tree_metrics(llm)
    with engine(pair, None, dtype="bfloat16", logprobs_mode="raw_logits") as llm:
        plain = [answer.tokens for answer in complete(llm, prompts, params)]
        places = {
            index: place
            for index, pair in enumerate(zip(plain, trees))
            if (place := first_difference(*pair)) is not None
        }
        shared = [prompts[index] + plain[index][:place] for index, place in places.items()]
        asked = generate(llm, shared, SamplingParams(temperature=0, max_tokens=1, logprobs=20)) if shared else []
    for (index, place), output in zip(places.items(), asked):
        [logits] = scores(output.outputs[0])
        gap = gap_between(logits, plain[index][place], trees[index][place])
        assert gap is not None and is_near_tie(gap.logits, gap.top_logit, torch.bfloat16), (index, place, gap)
    assert len(places) <= len(prompts) // 2
    assert metrics is not None and metrics.acceptance_length > 1.2

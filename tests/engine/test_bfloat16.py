"""bfloat16: batched matrix products round differently, so a near-tie of the top two logits may flip.

Exactness is judged at the first difference of an answer: the target's own top-2 gap there must be within rounding.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from tests.engine.conftest import complete, engine

MAX_GAP = 0.15
"""Logits of size 8 to 16 are 2^-4 = 0.0625 apart in bfloat16; two roundings on either side."""


def test_greedy_answers_differ_at_near_ties_only(pair, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    answers = []
    for spec in (None, {}):
        with engine(pair, spec, dtype="bfloat16") as llm:
            answers.append([answer.tokens for answer in complete(llm, prompts, params)])
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()
    num_same = 0
    for prompt, plain, trees in zip(prompts, *answers):
        first = next((index for index, (a, b) in enumerate(zip(plain, trees)) if a != b), None)
        if first is None:
            num_same += 1
            continue
        with torch.inference_mode():
            logits = target(torch.tensor([[*prompt, *plain[:first]]])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        assert best - second < MAX_GAP
        assert {plain[first], trees[first]} <= set(logits.topk(4).indices.tolist())
    assert num_same >= len(prompts) // 2

"""Unseeded sampling through trees follows the target's distribution."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from tests.engine.conftest import engine, generate
from vllm_ctc_spec.engine.metrics import read_tree_metrics

NUM_SAMPLES = 6000
P_VALUE = 1e-4
"""A correct engine fails one run in ten thousand; a bias of a few percent fails every run."""


def test_unseeded_samples_follow_the_target(pair, prompts: list[list[int]]) -> None:
    prompt = prompts[5]
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()

    def distribution(text: list[int], allowed: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return target(torch.tensor([text])).logits[0, -1, allowed].softmax(-1)

    with torch.inference_mode():
        likely = target(torch.tensor([prompt])).logits[0, -1].topk(2).indices.tolist()
        likely += target(torch.tensor([[*prompt, likely[0]]])).logits[0, -1].topk(4).indices.tolist()
    allowed = sorted(dict.fromkeys(likely))[:4]
    expected = {}
    for path in itertools.product(allowed, repeat=3):
        probability = 1.0
        for depth, token in enumerate(path):
            probability *= float(distribution([*prompt, *path[:depth]], allowed)[allowed.index(token)])
        expected[path] = probability

    params = SamplingParams(temperature=1.0, max_tokens=3, allowed_token_ids=allowed, ignore_eos=True)
    with engine(pair, {}) as llm:
        outputs = generate(llm, [prompt] * NUM_SAMPLES, params)
        metrics = read_tree_metrics(llm)
    # Many of the samples are accepted nodes.
    assert metrics is not None and metrics.acceptance_length > 1.2
    counts = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    assert sum(counts.values()) == NUM_SAMPLES

    # Chi-square needs at least five expected samples in a cell.
    rare = [path for path, probability in expected.items() if probability * NUM_SAMPLES < 5]
    cells = [path for path in expected if path not in rare]
    observed = [*(counts[path] for path in cells), sum(counts[path] for path in rare)]
    wanted = [*(expected[path] * NUM_SAMPLES for path in cells), sum(expected[path] for path in rare) * NUM_SAMPLES]
    if wanted[-1] < 5:
        observed, wanted = [*observed[:-2], sum(observed[-2:])], [*wanted[:-2], sum(wanted[-2:])]
    scale = NUM_SAMPLES / sum(wanted)
    assert chisquare(observed, [each * scale for each in wanted]).pvalue > P_VALUE

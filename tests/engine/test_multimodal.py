"""A multimodal target whose positions are those of a text model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm import LLM, SamplingParams

from tests.engine.blip import IMAGE_SIZE, write_blip
from tests.engine.conftest import complete, engine
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.engine.metrics import read_tree_metrics
from vllm_ctc_spec.training.fit import FitSettings, fit
from vllm_ctc_spec.training.loop import Budget

DRAFTER = {"num_frames": 4, "label_length": 4, "condition_rank": 32, "target_layers": []}
"""vLLM's BLIP-2 does not give the outputs of its layers."""
TEXTS = ["def read(", "import os\n", "class Reader:\n    def", "for line in", "if not "]


@pytest.fixture(scope="module")
def blip(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("blip")
    settings = FitSettings(budget=Budget(max_steps=30), learning_rate=8e-3, drafter=DRAFTER)
    drafter = fit(str(pair.target), pair.rows, folder / "drafter", settings)
    return dataclasses.replace(pair, target=write_blip(pair.target, folder / "target"), drafter=drafter)


def answers(llm: LLM) -> list[list[int]]:
    """Answers to each text without and with an image: greedy, then seeded with cached prompts."""
    noise = np.random.default_rng(0).integers(0, 256, (len(TEXTS), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    requests: list[dict[str, Any]] = [{"prompt": text} for text in TEXTS]
    requests += [
        {"prompt": text, "multi_modal_data": {"image": Image.fromarray(pixels)}} for text, pixels in zip(TEXTS, noise)
    ]
    greedy = [SamplingParams(temperature=0, max_tokens=30 + index) for index in range(len(requests))]
    sampled = [SamplingParams(temperature=0.8, seed=index, max_tokens=30) for index in range(len(requests))]
    outputs = [output for params in (greedy, sampled) for output in llm.generate(requests, params, use_tqdm=False)]
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_requests_with_images_and_without_are_exact(blip: TinyPair) -> None:
    with engine(blip, None) as llm:
        expected = answers(llm)
    with engine(blip, {}) as llm:
        assert answers(llm) == expected
        metrics = read_tree_metrics(llm)
    assert metrics is not None and metrics.acceptance_length > 1.1
    of_texts, of_images = expected[: len(TEXTS)], expected[len(TEXTS) : 2 * len(TEXTS)]
    assert any(text[:20] != image[:20] for text, image in zip(of_texts, of_images, strict=True))


def test_with_language_model_only_answers_are_those_of_the_text_model(
    blip: TinyPair, plain: LLM, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    with engine(blip, {}, language_model_only=True) as llm:
        assert complete(llm, prompts, params) == complete(plain, prompts, params)

"""A multimodal target as a text model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vllm import LLM, SamplingParams

from tests.engine.blip import write_blip
from tests.engine.conftest import complete, engine
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.engine.metrics import read_tree_metrics
from vllm_ctc_spec.training.fit import FitSettings, fit
from vllm_ctc_spec.training.loop import Budget

DRAFTER = {"num_frames": 4, "label_length": 4, "condition_rank": 32, "target_layers": []}
"""BLIP-2 hands out no layers in vLLM."""


def test_it_is_served_with_trees_where_its_other_inputs_are_turned_off(
    pair: TinyPair, plain: LLM, prompts: list[list[int]], tmp_path: Path
) -> None:
    settings = FitSettings(budget=Budget(max_steps=30), learning_rate=8e-3, drafter=DRAFTER)
    drafter = fit(str(pair.target), pair.rows, tmp_path / "drafter", settings)
    blip = dataclasses.replace(pair, target=write_blip(pair.target, tmp_path / "blip"), drafter=drafter)
    params = SamplingParams(temperature=0, max_tokens=40)
    with engine(blip, {}, language_model_only=True) as llm:
        assert complete(llm, prompts, params) == complete(plain, prompts, params)
        metrics = read_tree_metrics(llm)
    assert metrics is not None and metrics.acceptance_length > 1.1

"""Drafting and acceptance never wait for the device: on meta tensors, which hold no values, reading one would raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from vllm_ctc_spec.algorithm import (
    accept_greedy,
    build_chains,
    build_prefix_trees,
    child_of,
    conditioned_emissions,
    emissions,
    independent_emissions,
)


@pytest.mark.parametrize("build", [build_prefix_trees, build_chains])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("vocabulary_above_exact", [False, True])
def test_all_shapes_are_known_without_any_value(
    build: Callable, conditioned: bool, vocabulary_above_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if vocabulary_above_exact:
        monkeypatch.setattr(emissions, "EXACT_NORMALISER_MAX_VOCABULARY", 0)
    logits = torch.empty(3, 8, 101, device="meta")
    anchors = torch.empty(3, dtype=torch.int64, device="meta")
    tables = torch.empty(100, 4, device="meta"), torch.empty(101, 4, device="meta")
    made = conditioned_emissions(logits, anchors, *tables, 16) if conditioned else independent_emissions(logits, 16)
    trees = build(made, 32)
    assert {tuple(getattr(trees, field.name).shape) for field in fields(trees)} == {(3, 32), (3,)}
    accepted = accept_greedy(trees, torch.empty(3, 33, dtype=torch.int64, device="meta"), max_depth=8)
    assert accepted.nodes.shape == (3, 8) and accepted.num_accepted.shape == (3,)
    assert child_of(trees, anchors, anchors).shape == (3,)

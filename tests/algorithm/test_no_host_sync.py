"""Drafting and acceptance never wait for the device: on meta tensors, which hold no values, reading one would raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from vllm_ctc_spec.algorithm import (
    Conditioning,
    accept_greedy,
    build_chains,
    build_prefix_trees,
    child_of,
    conditioned_emissions,
    independent_emissions,
)


@pytest.mark.parametrize("build", [build_prefix_trees, build_chains])
@pytest.mark.parametrize("conditioned", [False, True])
def test_all_shapes_are_known_without_any_value(build: Callable, conditioned: bool) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, tokens = meta(3, 8, 101), meta(3, dtype=torch.int64)
    tables = Conditioning(meta(100, 4), meta(4, 4), meta(101, 4))
    if conditioned:
        made = conditioned_emissions(logits, meta(3, 4), meta(3, 4), tables, 16)
    else:
        made = independent_emissions(logits, 16)
    trees = build(made, 32)
    assert {tuple(getattr(trees, field.name).shape) for field in fields(trees)} == {(3, 32), (3,)}
    accepted = accept_greedy(trees, meta(3, 33, dtype=torch.int64), max_depth=8)
    assert accepted.nodes.shape == (3, 8) and accepted.num_accepted.shape == (3,)
    assert child_of(trees, tokens, tokens).shape == (3,)

"""From logits to accepted paths nothing waits for the device, and few kernels are launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.launches import Launches
from vllm_ctc_spec.algorithm import (
    Conditioning,
    TokenTrees,
    accept_greedy,
    build_chains,
    build_prefix_trees,
    child_of,
    conditioned_emissions,
    independent_emissions,
)

FAMILIES = ("independent", "conditioned", "without blank")
LAUNCHES_PER_LEVEL = {"independent": 25, "conditioned": 39, "without blank": 15}

Emit = Callable[[], Any]


def emissions_of(family: str, num_frames: int, make: Callable[..., Tensor]) -> Emit:
    num_labels = 100 if family == "without blank" else 101
    logits = make(3, num_frames, num_labels)
    if family == "independent":
        return lambda: independent_emissions(logits, 16)
    conditions = make(3, 4), make(3, 4), Conditioning(make(100, 4), make(4, 4), make(num_labels, 4))
    return lambda: conditioned_emissions(logits, *conditions, 16)


@pytest.mark.parametrize("build", [build_prefix_trees, build_chains])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_shapes_are_known_without_any_value(build: Callable[..., TokenTrees], family: str) -> None:
    """On meta tensors, which hold no values, reading one would raise."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = meta(3, dtype=torch.int64)
    trees = build(emissions_of(family, 8, meta)(), 32)
    assert {tuple(getattr(trees, field.name).shape) for field in fields(trees)} == {(3, 32), (3,)}
    accepted = accept_greedy(trees, meta(3, 33, dtype=torch.int64), max_depth=8)
    assert accepted.nodes.shape == (3, 8) and accepted.num_accepted.shape == (3,)
    assert child_of(trees, tokens, tokens).shape == (3,)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_level_of_the_tree_takes_few_launches(family: str) -> None:
    counts = []
    for num_frames in (7, 8):
        made = emissions_of(family, num_frames, torch.randn)()
        with Launches() as launches:
            build_prefix_trees(made, 32)
        counts.append(len(launches.names))
    assert 0 < counts[1] - counts[0] <= LAUNCHES_PER_LEVEL[family], launches.names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_is_never_waited_for_and_replays_the_build_as_a_graph(family: str) -> None:
    torch.manual_seed(0)
    emit = emissions_of(family, 8, lambda *shape: torch.randn(shape, device="cuda"))

    def step() -> tuple[TokenTrees, Tensor]:
        trees = build_prefix_trees(emit(), 32)
        return trees, accept_greedy(trees, trees.tokens.new_zeros(3, 33), max_depth=8).num_accepted

    torch.cuda.set_sync_debug_mode("error")
    try:
        expected, expected_accepted = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trees, accepted = step()
    graph.replay()
    assert torch.equal(accepted, expected_accepted)
    for field in fields(TokenTrees):
        torch.testing.assert_close(getattr(trees, field.name), getattr(expected, field.name))

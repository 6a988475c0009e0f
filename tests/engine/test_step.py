"""Which rows of a step our tree attention computes."""

from __future__ import annotations

import pytest

from vllm_ctc_spec.engine.host_tree import EMPTY_TREE, HostTree
from vllm_ctc_spec.engine.step import Step

BRANCHING = HostTree([5, 6, 7], [0, 0, 1], [1, 1, 2], [0.5, 0.3, 0.2])
CHAIN = HostTree([5, 6], [0, 1], [1, 2], [0.5, 0.3])


def step_of(*requests: tuple[HostTree, int]) -> Step:
    """A step of trees, each with the number of rows before its nodes."""
    trees = [tree for tree, _ in requests]
    num_rows = [len(tree.tokens) + rows for tree, rows in requests]
    starts = [sum(num_rows[:index]) for index in range(len(num_rows))]
    return Step(trees, starts, num_rows, [10 * index for index in range(len(trees))], [[] for _ in trees])


def test_without_prompts_our_kernel_computes_all_rows() -> None:
    trees = step_of((CHAIN, 1), (BRANCHING, 1), (EMPTY_TREE, 1)).branching_trees()
    assert trees is not None and trees.are_whole_step
    assert (trees.requests, trees.starts, trees.context_lens) == ([0, 1, 2], [0, 3, 7], [0, 10, 20])
    assert trees.masks == [[0b1, 0b11, 0b111], [0b1, 0b11, 0b101, 0b1011], [0b1]]


def test_beside_a_prompt_our_kernel_computes_branching_trees_only() -> None:
    trees = step_of((CHAIN, 1), (BRANCHING, 1), (EMPTY_TREE, 9)).branching_trees()
    assert trees is not None and not trees.are_whole_step
    assert (trees.requests, trees.starts, trees.context_lens) == ([1], [3], [10])


@pytest.mark.parametrize("tree", [CHAIN, EMPTY_TREE])
def test_without_branches_vllms_kernel_computes_all_rows(tree: HostTree) -> None:
    assert step_of((tree, 1), (CHAIN, 1)).branching_trees() is None

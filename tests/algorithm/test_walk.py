"""Token trees and the walk through them, compared with plain versions on random trees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_ctc_spec.algorithm import TokenTrees, accept_greedy, child_of

_settings = settings(max_examples=60, deadline=None)


@st.composite
def token_trees(draw: st.DrawFn) -> TokenTrees:
    """Random trees of up to 63 nodes with distinct siblings, padded with token 0, which is also a real token."""
    num_requests, num_columns = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 32, 63]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    tokens = torch.zeros(num_requests, num_columns, dtype=torch.int64)
    parents, depths = torch.zeros_like(tokens), torch.zeros_like(tokens)
    num_nodes = torch.randint(num_columns + 1, (num_requests,), generator=generator)
    branching = draw(st.sampled_from([1, 2, 40]))
    for request in range(num_requests):
        num_children, depth_of = [0] * 64, [0] * 64
        for column in range(int(num_nodes[request])):
            open_nodes = [node for node in range(column + 1) if num_children[node] < branching]
            parent = open_nodes[int(torch.randint(len(open_nodes), (), generator=generator))]
            tokens[request, column], parents[request, column] = num_children[parent], parent
            num_children[parent] += 1
            depth_of[column + 1] = depth_of[parent] + 1
            depths[request, column] = depth_of[column + 1]
    return TokenTrees(tokens, parents, depths, torch.zeros(tokens.shape), num_nodes)


def _choices(trees: TokenTrees, seed: int) -> Tensor:
    """Small tokens, so that the walk often goes on."""
    generator = torch.Generator().manual_seed(seed)
    shape = trees.tokens.shape[0], trees.tokens.shape[1] + 1
    return torch.randint(2, shape, generator=generator)


def _plain_child(trees: TokenTrees, request: int, node: int, token: int) -> int:
    for column in range(int(trees.num_nodes[request])):
        if trees.parents[request, column] == node and trees.tokens[request, column] == token:
            return column + 1
    return 0


@_settings
@given(token_trees())
def test_ancestor_masks_equal_following_parents(trees: TokenTrees) -> None:
    masks = trees.ancestor_masks()
    for request in range(trees.tokens.shape[0]):
        for node in range(trees.tokens.shape[1] + 1):
            expected, above = {node, 0}, node
            while above:
                above = int(trees.parents[request, above - 1])
                expected.add(above)
            assert {bit for bit in range(64) if int(masks[request, node]) >> bit & 1} == expected


@_settings
@given(token_trees(), st.integers(0, 1000))
def test_accepted_paths_equal_stepping_from_child_to_child(trees: TokenTrees, seed: int) -> None:
    choices = _choices(trees, seed)
    accepted = accept_greedy(trees, choices)
    for request in range(trees.tokens.shape[0]):
        path, node = [], 0
        while node := _plain_child(trees, request, node, int(choices[request, node])):
            path.append(node)
        num_columns = trees.tokens.shape[1]
        assert accepted.nodes[request].tolist() == path + [-1] * (num_columns - len(path))
        assert int(accepted.num_accepted[request]) == len(path)


@_settings
@given(token_trees(), st.integers(0, 1000))
def test_accepted_paths_fit_the_depth_of_the_trees(trees: TokenTrees, seed: int) -> None:
    choices, depth = _choices(trees, seed), int(trees.depths.max())
    fitted, whole = accept_greedy(trees, choices, max_depth=depth), accept_greedy(trees, choices)
    assert torch.equal(fitted.nodes, whole.nodes[:, :depth])
    assert torch.equal(fitted.num_accepted, whole.num_accepted)


@_settings
@given(token_trees(), st.integers(0, 1000))
def test_child_of_finds_the_child_that_carries_the_token(trees: TokenTrees, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_requests = trees.tokens.shape[0]
    tokens = torch.randint(3, (num_requests,), generator=generator)
    nodes = (torch.rand(num_requests, generator=generator) * (trees.num_nodes + 1)).long()
    expected = [_plain_child(trees, r, int(nodes[r]), int(tokens[r])) for r in range(num_requests)]
    assert child_of(trees, nodes, tokens).tolist() == expected


def test_choices_without_a_column_for_the_anchor_are_refused() -> None:
    empty = torch.zeros(1, 4, dtype=torch.int64)
    trees = TokenTrees(empty, empty, empty, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        accept_greedy(trees, empty)

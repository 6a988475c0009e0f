"""Laws of the paper's template tree."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_ctc_spec.algorithm import build_template_trees
from vllm_ctc_spec.algorithm.template_tree import MEDUSA_63

from .brute_force import IndependentCase, Prefix, independent_cases, node_prefixes, prefix_probabilities


def test_the_template_is_a_tree_of_63_paths_with_parents_first() -> None:
    assert len(MEDUSA_63) == len(set(MEDUSA_63)) == 63
    for node, path in enumerate(MEDUSA_63):
        assert len(path) == 1 or path[:-1] in MEDUSA_63[:node]


@settings(max_examples=60, deadline=None)
@given(independent_cases(max_frames=5), st.integers(1, 63))
def test_nodes_are_distinct_prefixes_and_no_value_exceeds_their_prefix_probability(
    case: IndependentCase, num_nodes: int
) -> None:
    psi = prefix_probabilities(case.outcomes())
    trees = build_template_trees(case.logits[None], num_nodes)
    prefixes = node_prefixes(trees)
    assert len(set(prefixes)) == len(prefixes)
    for prefix, path_logp in zip(prefixes, trees.prefix_logp[0].tolist()):
        assert 0 < math.exp(path_logp) <= psi[prefix] * (1 + 1e-5)
    assert [len(prefix) for prefix in prefixes] == trees.depths[0, : len(prefixes)].tolist()


def _labels(best: list[list[int]], num_labels: int) -> Tensor:
    """[1, T, V + 1] logits whose most probable labels per frame are `best`, in this order, the others impossible."""
    frames = torch.full((1, len(best), num_labels), -torch.inf)
    for frame, labels in enumerate(best):
        for rank, label in enumerate(labels):
            frames[0, frame, label] = -float(rank)
    return frames


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ([[2], [2], [1]], [(2,), (2, 1)]),
        ([[2], [3], [2]], [(2,), (2, 2)]),
        ([[3], [3], [3]], []),
        ([[3, 1], [1, 3]], [(1,)]),
        ([[0, 3], [1]], [(0,), (0, 1), (1,)]),
    ],
)
def test_paths_lose_repeats_and_blanks_and_merge(best: list[list[int]], expected: list[Prefix]) -> None:
    trees = build_template_trees(_labels(best, num_labels=4), 8)
    assert node_prefixes(trees) == expected


def test_the_value_of_a_prefix_is_that_of_the_best_path_that_leads_to_it() -> None:
    trees = build_template_trees(_labels([[3, 1], [1, 3]], num_labels=4), 8)
    first, second = torch.tensor([0.0, -1.0]).log_softmax(-1).tolist()
    assert trees.prefix_logp[0, 0].item() == pytest.approx(max(first + first, second, second + first, second + second))

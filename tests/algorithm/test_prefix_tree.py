"""Laws of the two tree builders, batched and best first, checked against all alignments and all trees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ctc_spec.algorithm import (
    ConditionedEmissions,
    Conditioning,
    TokenTrees,
    build_chains,
    build_prefix_trees,
    conditioned_emissions,
    independent_emissions,
    search_chains,
    search_prefix_trees,
)

from .brute_force import Case, best_connected_sum, cases, node_prefixes, prefix_probabilities

_settings = settings(max_examples=40, deadline=None)


def _prefix_trees(case: Case, num_nodes: int, least: float = 0.0) -> Iterator[TokenTrees]:
    """The trees of each builder that supports the case."""
    emissions = case.emissions()
    yield build_prefix_trees(emissions, num_nodes, least)
    if isinstance(emissions, ConditionedEmissions) and emissions.blank_logp is None:
        yield search_prefix_trees(emissions, num_nodes, least)


def _chains(case: Case, num_nodes: int) -> Iterator[TokenTrees]:
    emissions = case.emissions()
    yield build_chains(emissions, num_nodes)
    if isinstance(emissions, ConditionedEmissions) and emissions.blank_logp is None:
        yield search_chains(emissions, num_nodes)


@_settings
@given(cases(), st.integers(1, 63))
def test_node_probabilities_equal_the_sum_over_alignments_and_are_the_largest(case: Case, num_nodes: int) -> None:
    psi = prefix_probabilities(case.outcomes())
    for trees in _prefix_trees(case, num_nodes):
        prefixes = node_prefixes(trees)
        found = trees.prefix_logp[0, : len(prefixes)].exp().tolist()
        assert len(set(prefixes)) == len(prefixes) == min(num_nodes, len(psi))
        assert found == pytest.approx([psi[prefix] for prefix in prefixes], rel=1e-5)
        assert found == pytest.approx(sorted(psi.values(), reverse=True)[:num_nodes], rel=1e-5)


@_settings
@given(cases(max_frames=3, max_tokens=2), st.integers(1, 4))
def test_no_connected_tree_has_a_larger_sum_of_prefix_probabilities(case: Case, num_nodes: int) -> None:
    best = best_connected_sum(prefix_probabilities(case.outcomes()), num_nodes)
    for trees in _prefix_trees(case, num_nodes):
        assert trees.prefix_logp.exp().sum().item() == pytest.approx(best, rel=1e-5)


@_settings
@given(cases(), st.integers(1, 20))
def test_sum_of_prefix_probabilities_is_the_expected_accepted_length(case: Case, num_nodes: int) -> None:
    trees = build_prefix_trees(case.emissions(), num_nodes)
    nodes = set(node_prefixes(trees))
    expected = 0.0
    for output, chance in case.outcomes().items():
        length = 0
        while length < len(output) and output[: length + 1] in nodes:
            length += 1
        expected += chance * length
    assert trees.prefix_logp.exp().sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@_settings
@given(cases(), st.integers(1, 63))
def test_every_leading_slice_is_a_tree_in_descending_probability(case: Case, num_nodes: int) -> None:
    for trees in _prefix_trees(case, num_nodes):
        num_real = int(trees.num_nodes[0])
        parents, depths, logp = trees.parents[0].tolist(), trees.depths[0].tolist(), trees.prefix_logp[0].tolist()
        assert all(parents[column] <= column for column in range(num_real))
        assert logp[:num_real] == sorted(logp[:num_real], reverse=True)
        assert depths[:num_real] == [len(prefix) for prefix in node_prefixes(trees)]
        padding = slice(num_real, None)
        assert not any(trees.tokens[0, padding]) and not any(parents[padding]) and not any(depths[padding])
        assert all(value == -math.inf for value in logp[padding]) and len(logp) == num_nodes


@_settings
@given(cases(), st.integers(1, 20), st.floats(0.0, 0.9))
def test_min_prefix_probability_cuts_the_tail_of_the_same_tree(case: Case, num_nodes: int, least: float) -> None:
    for whole, cut in zip(_prefix_trees(case, num_nodes), _prefix_trees(case, num_nodes, least), strict=True):
        found = whole.prefix_logp[0].exp()
        # The logarithm moves a value by an ulp, so nodes at the very threshold may fall on either side.
        assert (found > least * (1 + 1e-6)).sum() <= cut.num_nodes[0] <= (found >= least * (1 - 1e-6)).sum()
        assert node_prefixes(cut) == node_prefixes(whole)[: int(cut.num_nodes[0])]


@_settings
@given(cases(), st.integers(1, 6))
def test_a_chain_steps_to_the_most_probable_child_each_time(case: Case, num_nodes: int) -> None:
    psi = prefix_probabilities(case.outcomes())
    for trees in _chains(case, num_nodes):
        prefixes = node_prefixes(trees)
        assert [len(prefix) for prefix in prefixes] == list(range(1, len(prefixes) + 1))
        for prefix in prefixes:
            siblings = [
                value for other, value in psi.items() if len(other) == len(prefix) and other[:-1] == prefix[:-1]
            ]
            assert psi[prefix] == pytest.approx(max(siblings), rel=1e-5)
        last = prefixes[-1] if prefixes else ()
        assert len(prefixes) == num_nodes or not any(other[:-1] == last for other in psi)


@pytest.mark.parametrize(
    ("build", "family"),
    [
        *product([build_prefix_trees, build_chains], ["independent", "conditioned", "without blank"]),
        *product([search_prefix_trees, search_chains], ["without blank"]),
    ],
)
def test_a_batch_gives_the_trees_of_its_requests(build, family: str) -> None:
    torch.manual_seed(0)
    num_labels = 40 if family == "without blank" else 41
    logits, start, gate = 2 * torch.randn(5, 6, num_labels), torch.randn(5, 4), torch.randn(5, 4)
    tables = Conditioning(torch.randn(40, 4), torch.randn(4, 4) / 4, torch.randn(num_labels, 4))

    def trees(rows: slice) -> TokenTrees:
        if family != "independent":
            return build(conditioned_emissions(logits[rows], start[rows], gate[rows], tables, 12), 32)
        return build(independent_emissions(logits[rows], 12), 32)

    batch = trees(slice(None))
    for request in range(5):
        single = trees(slice(request, request + 1))
        for field in fields(TokenTrees):
            got, expected = getattr(batch, field.name)[request], getattr(single, field.name)[0]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_candidates", [12, 200])
@pytest.mark.parametrize("num_nodes", [1, 16, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_search_finds_the_trees_that_are_built_level_by_level(
    dtype: torch.dtype, num_nodes: int, num_candidates: int
) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 8, 200)
    states, *tables = torch.randn(2, 4, 32), torch.randn(200, 32), torch.randn(32, 32) / 8, torch.randn(200, 32) / 8
    states, *tables = (each.to(dtype) for each in (states, *tables))

    def emissions(dtype: torch.dtype) -> ConditionedEmissions:
        conditioning = Conditioning(*(table.to(dtype) for table in tables))
        start, gate = states.to(dtype)
        return conditioned_emissions(logits, start, gate, conditioning, num_candidates)

    # The search is in float32 always.
    for search, build in ((search_prefix_trees, build_prefix_trees), (search_chains, build_chains)):
        found, built = search(emissions(dtype), num_nodes), build(emissions(torch.float32), num_nodes)
        torch.testing.assert_close(found.prefix_logp, built.prefix_logp, rtol=0.0, atol=1e-4)
        for request in range(4):
            assert set(node_prefixes(found, request)) == set(node_prefixes(built, request))


def test_a_token_that_is_not_a_number_is_in_no_tree() -> None:
    logits = torch.zeros(1, 3, 5)
    logits[:, 1] = torch.nan
    zero, tables = torch.zeros(1, 2), Conditioning(torch.zeros(5, 2), torch.zeros(2, 2), torch.zeros(5, 2))
    trees = search_prefix_trees(conditioned_emissions(logits, zero, zero, tables, 5), 20)
    assert trees.depths.amax() <= 1


def test_without_blank_and_bias_a_prefix_has_the_product_of_its_positions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 5, 8)
    zero, tables = torch.zeros(1, 2), Conditioning(torch.zeros(8, 2), torch.zeros(2, 2), torch.zeros(8, 2))
    trees = build_prefix_trees(conditioned_emissions(logits, zero, zero, tables, 8), 32)
    logp = logits[0].log_softmax(-1)
    for prefix, prefix_logp in zip(node_prefixes(trees), trees.prefix_logp[0].tolist(), strict=True):
        assert prefix_logp == pytest.approx(
            sum(logp[frame, token].item() for frame, token in enumerate(prefix)), abs=1e-5
        )


@pytest.mark.parametrize("num_nodes", [1, 16, 63])
def test_parents_come_first_even_when_every_step_is_all_but_certain(num_nodes: int) -> None:
    torch.manual_seed(0)
    start, gate, carry = torch.zeros(64, 3), torch.ones(64, 3), torch.randn(3, 3) / 3
    biased = Conditioning(torch.randn(7, 3), carry, torch.randn(8, 3))
    unbiased = Conditioning(torch.zeros(7, 3), carry, torch.zeros(8, 3))
    logits = torch.randn(64, 16, 8)
    logits[:, torch.arange(16), torch.arange(16) % 3] += 18.0
    aligned = Conditioning(biased.state_in, carry, biased.logit_out[:-1])
    hesitant = 2 + torch.randn(64, 16, 8)
    hesitant[..., 1:-1] -= 30.0
    without_blank = conditioned_emissions(logits[..., :-1], start, gate, aligned, 7)
    for build, emissions in (
        (build_prefix_trees, independent_emissions(logits, 7)),
        (build_prefix_trees, conditioned_emissions(logits, start, gate, biased, 7)),
        (build_prefix_trees, without_blank),
        (build_prefix_trees, conditioned_emissions(hesitant, start, gate, unbiased, 7)),
        (search_prefix_trees, without_blank),
    ):
        trees = build(emissions, num_nodes)
        assert (trees.parents <= torch.arange(num_nodes)).all()
        assert (trees.prefix_logp.diff(dim=1) <= 0).all() and trees.num_nodes.eq(num_nodes).all()


def test_a_node_budget_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="num_nodes=0"):
        build_prefix_trees(independent_emissions(torch.zeros(1, 2, 3), 2), 0)

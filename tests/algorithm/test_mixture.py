"""Laws of the tree of two sources, against all prefixes and all trees."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ctc_spec.algorithm import NOTHING, Prefixes, build_prefix_trees, likeliest_path, mix

from .brute_force import Case, Prefix, best_connected_sum, cases, node_prefixes, prefix_probabilities

_settings = settings(max_examples=100, deadline=None)
Psi = dict[Prefix, float]

# Few distinct values make exact ties common.
_CHANCES = st.sampled_from([0.0, 0.1, 0.1, 0.25, 0.5])
_OUTPUTS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)


@st.composite
def sources(draw: st.DrawFn, max_outputs: int = 5) -> Psi:
    """psi of a sub-distribution over some texts, of different lengths."""
    outputs = draw(st.dictionaries(_OUTPUTS, _CHANCES, max_size=max_outputs))
    total = max(sum(outputs.values()), 1.0)
    return prefix_probabilities({output: chance / total for output, chance in outputs.items()})


def tree_of(psi: Psi) -> Prefixes:
    """By length, so that parents come first."""
    prefixes = sorted(psi, key=len)
    node_of = {prefix: node for node, prefix in enumerate(prefixes, 1)} | {(): 0}
    parents = [node_of[prefix[:-1]] for prefix in prefixes]
    return Prefixes([prefix[-1] for prefix in prefixes], parents, [psi[prefix] for prefix in prefixes])


def psi_of(tree: Prefixes) -> Psi:
    prefixes: list[Prefix] = [()]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        prefixes.append((*prefixes[parent], token))
    assert len(set(prefixes)) == len(prefixes)
    return dict(zip(prefixes[1:], tree.psi, strict=True))


def mixture(first: Psi, second: Psi, weight: float) -> Psi:
    every = {
        prefix: weight * first.get(prefix, 0.0) + (1 - weight) * second.get(prefix, 0.0)
        for prefix in first.keys() | second.keys()
    }
    return {prefix: value for prefix, value in every.items() if value > 0}


@_settings
@given(sources(), sources(), st.floats(0, 1), st.integers(1, 63))
def test_equal_prefixes_are_one_node_and_the_largest_are_kept(
    first: Psi, second: Psi, weight: float, num_nodes: int
) -> None:
    expected = mixture(first, second, weight)
    found = psi_of(mix(tree_of(first), tree_of(second), weight, num_nodes))
    assert found == pytest.approx({prefix: expected[prefix] for prefix in found})
    assert len(found) == min(num_nodes, len(expected))
    assert list(found.values()) == pytest.approx(sorted(expected.values(), reverse=True)[:num_nodes])


@_settings
@given(sources(max_outputs=3), sources(max_outputs=3), st.floats(0, 1), st.integers(1, 4))
def test_no_connected_tree_has_a_larger_expected_accepted_length(
    first: Psi, second: Psi, weight: float, num_nodes: int
) -> None:
    found = mix(tree_of(first), tree_of(second), weight, num_nodes)
    assert sum(found.psi) == pytest.approx(best_connected_sum(mixture(first, second, weight), num_nodes))


@_settings
@given(sources(), sources(), st.floats(0, 1), st.integers(1, 63))
def test_every_leading_part_is_a_tree_in_descending_probability(
    first: Psi, second: Psi, weight: float, num_nodes: int
) -> None:
    found = mix(tree_of(first), tree_of(second), weight, num_nodes)
    assert all(parent <= index for index, parent in enumerate(found.parents))
    assert list(found.psi) == sorted(found.psi, reverse=True)
    above = [1.0, *found.psi]
    assert all(value <= above[parent] for value, parent in zip(found.psi, found.parents))


@_settings
@given(cases(), sources(), st.integers(1, 63))
def test_a_weight_of_one_gives_the_drafters_tree(case: Case, other: Psi, num_nodes: int) -> None:
    trees = build_prefix_trees(case.emissions(), num_nodes)
    count = int(trees.num_nodes[0])
    parents, psi = trees.parents[0, :count].tolist(), trees.prefix_logp[0, :count].exp().tolist()
    drafted = Prefixes(trees.tokens[0, :count].tolist(), parents, psi)
    assert list(psi_of(drafted)) == node_prefixes(trees)
    assert mix(drafted, tree_of(other), 1.0, num_nodes) == drafted


@_settings
@given(sources(), sources(), st.integers(1, 63))
def test_a_weight_of_zero_gives_the_other_sources_tree(first: Psi, second: Psi, num_nodes: int) -> None:
    # Of equally probable prefixes either may be cut off.
    for one in (tree_of(first), NOTHING):
        found = mix(one, tree_of(second), 0.0, num_nodes)
        assert psi_of(found).items() <= second.items()
        assert list(found.psi) == sorted(second.values(), reverse=True)[:num_nodes]


@_settings
@given(sources(), sources(), st.floats(0, 1), st.floats(0.01, 0.9))
def test_improbable_prefixes_are_left_out(first: Psi, second: Psi, weight: float, least: float) -> None:
    every = psi_of(mix(tree_of(first), tree_of(second), weight, 63))
    found = psi_of(mix(tree_of(first), tree_of(second), weight, 63, least))
    assert found == {prefix: value for prefix, value in every.items() if value >= least}


@_settings
@given(sources())
def test_the_likeliest_path_steps_to_the_most_probable_child(psi: Psi) -> None:
    path = likeliest_path(tree_of(psi))
    assert list(path.parents) == list(range(len(path.parents)))
    prefix: Prefix = ()
    for token, value in zip(path.tokens, path.psi, strict=True):
        assert value == max(other for each, other in psi.items() if each[:-1] == prefix and len(each) > len(prefix))
        prefix = (*prefix, token)
        assert psi[prefix] == value
    assert not any(each[:-1] == prefix and each for each in psi)


@_settings
@given(sources(), _OUTPUTS)
def test_what_a_source_gave_to_a_text_is_by_the_definition_of_a_conditional_probability(psi: Psi, text: Prefix) -> None:
    found = tree_of(psi).along(text)
    for length, each in enumerate(found):
        before = text[:length]
        above = psi[before] if before else 1.0
        children = [value for prefix, value in psi.items() if len(prefix) == length + 1 and prefix[:-1] == before]
        assert each.mass == pytest.approx(sum(children) / above)
        assert each.probability == pytest.approx(psi.get(text[: length + 1], 0.0) / above)
    followed = [length for length in range(len(text) + 1) if length == 0 or text[:length] in psi]
    longest = max(followed)
    # One more where the tree goes on, with other tokens.
    goes_on = longest < len(text) and any(len(each) == longest + 1 and each[:-1] == text[:longest] for each in psi)
    assert len(found) == longest + goes_on
